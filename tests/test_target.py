"""The URL and the headers are checked before anything is sent, and shown to nobody."""

from __future__ import annotations

import base64
import ssl
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from anyagent import open_agent
from anyagent._target import Target

from .wire_server import Peer, serve

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "s3cr3t"


def basic(userinfo: bytes) -> str:
    return "Basic " + base64.b64encode(userinfo).decode()


@pytest.mark.parametrize(
    ("url", "authority", "port", "resource"),
    [
        ("ws://agent", "agent", 80, "/"),
        ("WS://Agent", "agent", 80, "/"),
        ("ws://agent:", "agent", 80, "/"),
        ("ws://agent:80/", "agent", 80, "/"),
        ("ws://agent:443/", "agent:443", 443, "/"),
        ("wss://agent/", "agent", 443, "/"),
        ("wss://agent:443/", "agent", 443, "/"),
        ("wss://agent:80/", "agent:80", 80, "/"),
        ("ws://agent:8000/a/b", "agent:8000", 8000, "/a/b"),
        ("ws://agent?a=1&b=2", "agent", 80, "/?a=1&b=2"),
        ("ws://agent/?", "agent", 80, "/"),
        ("ws://agent/a%20b;c?d=%C3%A9", "agent", 80, "/a%20b;c?d=%C3%A9"),
        ("ws://127.0.0.1:8000/", "127.0.0.1:8000", 8000, "/"),
        ("ws://[::1]/", "[::1]", 80, "/"),
        ("ws://[::1]:8000/", "[::1]:8000", 8000, "/"),
        ("ws://user:password@agent:8000/", "agent:8000", 8000, "/"),
        ("ws://b\u00fccher.example/", "xn--bcher-kva.example", 80, "/"),
    ],
)
def test_a_url_says_where_to_connect_and_what_to_ask_for(
    url: str, authority: str, port: int, resource: str
) -> None:
    target = Target.parse(url)
    assert (target.authority, target.port, target.resource) == (authority, port, resource)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("", id="empty"),
        pytest.param("agent:8000", id="no scheme"),
        pytest.param("//agent/", id="no scheme but slashes"),
        pytest.param("http://agent/", id="http"),
        pytest.param("ws:/agent/", id="one slash"),
        pytest.param("ws:///path", id="no host"),
        pytest.param("ws://:80/", id="a port only"),
        pytest.param("ws://agent:0/", id="port 0"),
        pytest.param("ws://agent:65536/", id="port too large"),
        pytest.param("ws://agent:-1/", id="negative port"),
        pytest.param("ws://agent:eighty/", id="port no number"),
        pytest.param("ws://[::1/", id="bracket not closed"),
        pytest.param("ws://agent/#part", id="fragment"),
        pytest.param("ws://agent/#", id="empty fragment"),
        pytest.param("ws://agent/a b", id="space in the path"),
        pytest.param(" ws://agent/", id="space in front"),
        pytest.param("ws://agent/\r\nX-Injected: 1", id="CR LF in the path"),
        pytest.param("ws://agent/?a=\nb", id="LF in the query"),
        pytest.param("ws://age\rnt/", id="CR in the host"),
        pytest.param("ws://agent/\t", id="tab"),
        pytest.param("ws://agent/\x00", id="NUL"),
        pytest.param("ws://agent/\x7f", id="DEL"),
        pytest.param("ws://agent/\x85", id="C1 control"),
        pytest.param("ws://agent\\@other/", id="backslash"),
        pytest.param("ws://user\udc80@agent/", id="surrogate"),
        pytest.param("ws://agent/caf\u00e9", id="non-ASCII path"),
        pytest.param("ws://agent/?\u00e9", id="non-ASCII query"),
        pytest.param("ws://agent..example/", id="empty label"),
        pytest.param(f"ws://{'a' * 64}/", id="label too long"),
        pytest.param("ws://agent\u3000/", id="ideographic space in the host"),
        pytest.param("ws://agent\u00a0/", id="no-break space in the host"),
        pytest.param('ws://"agent"/', id="quotes in the host"),
        pytest.param("ws://agent\u2100/", id="host that would turn into a path"),
    ],
)
def test_a_bad_url_is_refused_and_not_quoted(url: str) -> None:
    secret = url.replace("://", f"://{SECRET}:{SECRET}@").replace("?", f"?{SECRET}=", 1) + SECRET
    for each in (url, secret):
        with pytest.raises(ValueError, match="URL") as caught:
            Target.parse(each)
        assert SECRET not in all_of(caught.value)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"X-A": "1\r\nX-Injected: 1"}, id="CR LF in a value"),
        pytest.param({"X-A": "1\n"}, id="LF at the end of a value"),
        pytest.param({"X-A": "1\x00"}, id="NUL in a value"),
        pytest.param({"X-A": "\x7f"}, id="DEL in a value"),
        pytest.param({"X-A": " 1"}, id="space before a value"),
        pytest.param({"X-A": "1 "}, id="space after a value"),
        pytest.param({"X-A": "caf\u00e9"}, id="non-ASCII value"),
        pytest.param({"X-A\r\nX-Injected": "1"}, id="CR LF in a name"),
        pytest.param({"X A": "1"}, id="space in a name"),
        pytest.param({"X:A": "1"}, id="colon in a name"),
        pytest.param({"X\u00c4": "1"}, id="non-ASCII name"),
        pytest.param({"": "1"}, id="empty name"),
        pytest.param([("X-A", "1"), ("X\n", "1")], id="in pairs"),
        pytest.param({"Host": "other"}, id="Host"),
        pytest.param({"UPGRADE": "h2c"}, id="Upgrade"),
        pytest.param({"connection": "close"}, id="Connection"),
        pytest.param({"Content-Length": "5"}, id="Content-Length"),
        pytest.param({"Transfer-Encoding": "chunked"}, id="Transfer-Encoding"),
        pytest.param({"Sec-WebSocket-Key": "x"}, id="Sec-WebSocket-Key"),
        pytest.param({"sec-websocket-extensions": "permessage-deflate"}, id="Sec-WebSocket-Extensions"),
        pytest.param({"X-A": b"1"}, id="bytes"),
        pytest.param({"X-A": None}, id="None"),
        pytest.param({1: "1"}, id="number"),
        pytest.param("X-A: 1", id="string"),
        pytest.param([("X-A", "1", "2")], id="triple"),
    ],
)
def test_a_bad_header_is_refused(headers: Any) -> None:
    with pytest.raises(ValueError, match=r"header|values to unpack"):
        Target.parse("ws://agent/", headers)


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {SECRET}\n"}, {"Sec-WebSocket-Protocol": SECRET}]
)
def test_a_refused_headers_value_is_not_quoted(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="header") as caught:
        Target.parse("ws://agent/", headers)
    assert SECRET not in all_of(caught.value)


@pytest.mark.parametrize("as_given", [dict, list, iter], ids=["mapping", "pairs", "iterator"])
def test_headers_are_a_mapping_or_pairs(as_given: Callable[[Any], Any]) -> None:
    pairs = [("X-Empty", ""), ("X-Word", "!"), ("X-Words", "a\t b  c")]
    assert Target.parse("ws://agent/", as_given(pairs)).headers == tuple(pairs)


@pytest.mark.parametrize(
    ("userinfo", "expected"),
    [
        ("user:password", b"user:password"),
        ("user", b"user:"),
        ("user:", b"user:"),
        (":password", b":password"),
        ("us%65r:p%40ss%3Aword%0A", b"user:p@ss:word\n"),
        ("user:p@ss", b"user:p@ss"),
        ("%ff:%c3%a9", b"\xff:\xc3\xa9"),
        ("us\u00e9r:p\u00e4ss", "us\u00e9r:p\u00e4ss".encode()),
    ],
)
def test_userinfo_becomes_basic_credentials_byte_for_byte(userinfo: str, expected: bytes) -> None:
    headers = Target.parse(f"ws://{userinfo}@agent/", {"X-A": "1"}).headers
    assert headers == (("X-A", "1"), ("Authorization", basic(expected)))


def test_userinfo_and_an_authorization_header_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other") as caught:
        Target.parse(f"ws://user:{SECRET}@agent/", {"authorization": SECRET})
    assert SECRET not in all_of(caught.value)


def test_an_ssl_context_is_for_wss_only_and_verifies_by_default() -> None:
    given = ssl.create_default_context()
    assert Target.parse("wss://agent/", ssl_context=given).ssl_context is given
    default = Target.parse("wss://agent/").ssl_context
    assert default is not None
    assert (default.verify_mode, default.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert Target.parse("ws://agent/").ssl_context is None
    with pytest.raises(ValueError, match="wss://"):
        Target.parse("ws://agent/", ssl_context=given)


@pytest.mark.parametrize(
    ("url", "ssl_context"), [(b"ws://agent/", None), (None, None), ("wss://agent/", True)]
)
def test_a_value_of_the_wrong_type_is_a_type_error(url: Any, ssl_context: Any) -> None:
    with pytest.raises(TypeError):
        Target.parse(url, None, ssl_context)


def test_a_target_shows_neither_userinfo_path_query_nor_headers() -> None:
    url = f"wss://{SECRET}:{SECRET}@agent/{SECRET}?{SECRET}={SECRET}"
    target = Target.parse(url, {f"X-{SECRET}": SECRET})
    for shown in (repr(target), str(target), f"{target}"):
        assert "agent" in shown
        assert SECRET not in shown
        assert basic(f"{SECRET}:{SECRET}".encode()) not in shown


@pytest.mark.anyio
@pytest.mark.sockets
@pytest.mark.parametrize(
    ("resource", "headers"),
    [
        ("a b", {}),
        ("\r\nX-Injected: 1", {}),
        ("", {"X-A": "1\r\nX-Injected: 1"}),
        ("", {"X-A\r\nX-Injected": "1"}),
        ("", {"Host": "other"}),
    ],
)
async def test_nothing_is_connected_to_with_a_bad_url_or_header(
    resource: str, headers: dict[str, str], figure: Callable[[str], None]
) -> None:
    async with serve(Peer.wait_gone) as server:
        with pytest.raises(ValueError, match=r"URL|header"):
            async with open_agent(server.url + resource, headers=headers):
                pass
    figure(f"{server.connections} connections")
    assert server.connections == 0


def all_of(exc: BaseException) -> str:
    """Everything that could be shown of an exception."""
    chain: list[BaseException] = [exc]
    for each in chain:
        chain += [other for other in (each.__cause__, each.__context__) if other is not None]
    return "".join(traceback.format_exception(exc)) + "".join(f"{each!r} {vars(each)}" for each in chain)
