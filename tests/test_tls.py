"""Over TLS: verified by default, and as well behaved as without."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
import trustme

from anyagent import ConnectError, Disconnected, Timeouts, open_agent

from .wire_server import DEADLINE, Peer, chunk, end, serve, text

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

SHORT = Timeouts(connect=0.3)


class Certificates:
    def __init__(self) -> None:
        self.authority = trustme.CA()

    def server(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context

    def self_signed(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with (
            self.authority.private_key_pem.tempfile() as key,
            self.authority.cert_pem.tempfile() as certificate,
        ):
            context.load_cert_chain(certificate, key)
        return context

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


def over_tls(context: ssl.SSLContext, then: Callable[[Peer], None]) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.start_tls(context)
        then(peer)

    return script


def welcome(peer: Peer) -> None:
    peer.open()
    peer.finish()


@pytest.mark.parametrize(
    ("name", "address"), [("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1")]
)
async def test_an_agent_is_connected_to_if_its_certificate_is_valid(
    certificates: Certificates, name: str, address: str
) -> None:
    host = f"[{name}]" if ":" in name else name

    def script(peer: Peer) -> None:
        peer.start_tls(certificates.server(name))
        peer.open()
        assert peer.header("host") == [f"{host}:{server.port}"]
        peer.finish()

    async with (
        serve(script, address) as server,
        open_agent(f"wss://{host}:{server.port}/", ssl_context=certificates.client()) as agent,
    ):
        assert agent.status.state == "ready"


def untrusted(peer: Peer, context: ssl.SSLContext) -> None:
    """The client must break off the TLS handshake, before it sends anything through it."""
    with pytest.raises((ssl.SSLError, ConnectionError)):
        peer.start_tls(context)


async def test_a_certificate_of_an_unknown_authority_is_refused_by_default(
    certificates: Certificates,
) -> None:
    async with serve(lambda peer: untrusted(peer, certificates.server("localhost"))) as server:
        with pytest.raises(
            ConnectError, match=r"could not connect to localhost:.*CERTIFICATE_VERIFY"
        ) as caught:
            async with open_agent(f"wss://localhost:{server.port}/"):
                pass
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert server.connections == 1


async def test_a_self_signed_certificate_is_refused_by_default(
    certificates: Certificates, figure: Callable[[str], None]
) -> None:
    async with serve(lambda peer: untrusted(peer, certificates.self_signed())) as server:
        with pytest.raises(ConnectError, match="self-signed certificate") as caught:
            async with open_agent(f"wss://localhost:{server.port}/"):
                pass
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    figure("refused in the TLS handshake, before any data")


async def test_a_certificate_for_another_host_is_refused(
    certificates: Certificates, figure: Callable[[str], None]
) -> None:
    async with serve(lambda peer: untrusted(peer, certificates.server("other.example"))) as server:
        with pytest.raises(ConnectError, match="not valid for 'localhost'") as caught:
            async with open_agent(f"wss://localhost:{server.port}/", ssl_context=certificates.client()):
                pass
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    figure("refused in the TLS handshake, before any data")


async def test_a_client_certificate_is_shown_if_the_context_has_one(certificates: Certificates) -> None:
    ours = certificates.client()
    certificates.authority.issue_cert("client@example.org").configure_cert(ours)
    theirs = certificates.server("localhost")
    theirs.verify_mode = ssl.CERT_REQUIRED
    certificates.authority.configure_trust(theirs)

    async with (
        serve(over_tls(theirs, welcome)) as server,
        open_agent(f"wss://localhost:{server.port}/", ssl_context=ours),
    ):
        pass


async def test_a_missing_client_certificate_is_a_connect_error(certificates: Certificates) -> None:
    theirs = certificates.server("localhost")
    theirs.verify_mode = ssl.CERT_REQUIRED

    def script(peer: Peer) -> None:
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            peer.start_tls(theirs)

    async with serve(script) as server:
        with pytest.raises(ConnectError) as caught:
            async with open_agent(f"wss://localhost:{server.port}/", ssl_context=certificates.client()):
                pass
        assert caught.value.__cause__ is not None


def plain_http(peer: Peer) -> None:
    peer.sock.recv(65_536)
    peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    peer.wait_gone()


def garbage(peer: Peer) -> None:
    peer.send_until_gone(bytes(range(256)))


def gone_at_once(peer: Peer) -> None:
    peer.sock.recv(65_536)


def reset(peer: Peer) -> None:
    peer.sock.recv(1)
    peer.reset()


@pytest.mark.parametrize("script", [plain_http, garbage, gone_at_once, reset])
async def test_an_agent_without_tls_is_a_connect_error(script: Callable[[Peer], None]) -> None:
    async with serve(script) as server:
        with pytest.raises(ConnectError, match=f"could not connect to 127.0.0.1:{server.port}: .") as caught:
            async with open_agent(f"wss://{server.authority}/"):
                pass
        assert caught.value.__cause__ is not None


async def test_a_tls_handshake_that_takes_too_long_is_a_connect_error() -> None:
    async with serve(Peer.wait_gone) as server:
        with pytest.raises(ConnectError, match=r"no connection within 0\.3 s"):
            async with open_agent(f"wss://{server.authority}/", timeouts=SHORT):
                pass


async def test_cancelling_the_tls_handshake_leaves_nothing_behind() -> None:
    reached = threading.Event()

    def script(peer: Peer) -> None:
        assert peer.sock.recv(1) == b"\x16"  # the first byte of a ClientHello
        reached.set()
        peer.wait_gone()

    async def connect() -> None:
        async with open_agent(f"wss://{server.authority}/"):
            raise AssertionError("this agent cannot be opened")

    async with serve(script) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(connect)
        assert await anyio.to_thread.run_sync(reached.wait, DEADLINE)
        tasks.cancel_scope.cancel()


async def test_large_messages_pass_in_both_directions_at_once(certificates: Certificates) -> None:
    large = 2_000_000 * "x"

    def script(peer: Peer) -> None:
        peer.start_tls(certificates.server("localhost"))
        peer.open()
        for _ in range(5):
            request_id = peer.receive_prompt()
            peer.send(text(chunk(request_id, large)) + text(end(request_id)))
        peer.finish()

    async def ask() -> None:
        assert (await agent.ask(large)).text == large

    async with (
        serve(script) as server,
        open_agent(f"wss://localhost:{server.port}/", ssl_context=certificates.client()) as agent,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(5):
            tasks.start_soon(ask)


def truncated(peer: Peer) -> None:
    pass


def not_tls_any_more(peer: Peer) -> None:
    peer.sock = socket.socket(fileno=peer.sock.detach())
    peer.sock.settimeout(DEADLINE)
    peer.send(b"this is no TLS record")
    peer.wait_gone()


@pytest.mark.parametrize("then", [truncated, not_tls_any_more, Peer.reset])
async def test_a_connection_that_is_cut_in_an_answer_is_a_disconnected_with_what_had_arrived(
    certificates: Certificates, then: Callable[[Peer], None]
) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        peer.send(text(chunk(peer.receive_prompt(), "partial")))
        assert read.wait(DEADLINE)
        then(peer)

    read = threading.Event()
    async with (
        serve(over_tls(certificates.server("localhost"), script)) as server,
        open_agent(f"wss://localhost:{server.port}/", ssl_context=certificates.client()) as agent,
        await agent.send_message("hello") as response,
    ):
        await anext(response)
        read.set()
        with pytest.raises(Disconnected) as caught:
            await anext(response)
        assert (caught.value.code, caught.value.phase) == (1006, "started")


async def test_fifty_connections_leave_no_socket_behind(certificates: Certificates) -> None:
    context = certificates.client()
    async with serve(over_tls(certificates.server("localhost"), welcome)) as server:
        for _ in range(50):
            async with open_agent(f"wss://localhost:{server.port}/", ssl_context=context):
                pass
