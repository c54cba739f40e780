"""Where to connect, and with which headers: checked before anything is sent."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import re
import ssl
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

__all__ = ["HeadersLike", "Target"]

HeadersLike = Mapping[str, str] | Iterable[tuple[str, str]]

_NOT_IN_URL: Final = re.compile(r"[\x00-\x20\x7f-\x9f\ud800-\udfff\\]")
_HOST: Final = re.compile(r"[0-9A-Za-z._~!$&'()*+,;=%:-]+")  # RFC 3986, section 3.2.2, without brackets
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_FIELD_VALUE: Final = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?")  # RFC 9110, section 5.5, without obs-text
_RESERVED: Final = frozenset(
    ("connection", "content-length", "host", "transfer-encoding", "upgrade")
)  # what the handshake itself says (RFC 6455, section 4.1); sec-websocket-* as well


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A checked URL and headers. Its ``repr`` shows neither userinfo, path, query nor headers."""

    host: str
    port: int
    ssl_context: ssl.SSLContext | None
    resource: str = dataclasses.field(repr=False)
    headers: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)

    @classmethod
    def parse(
        cls, url: str, headers: HeadersLike | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> Target:
        """Check `url` (``ws://`` or ``wss://``) and `headers`. Raises `ValueError`, which quotes no secret.

        Userinfo becomes an ``Authorization: Basic`` header (RFC 7617). ``wss://`` without an `ssl_context`
        gets the default one, which verifies.
        """
        if not isinstance(url, str):
            raise TypeError(f"the URL must be a string, not {type(url).__name__}")
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"ssl_context must be an SSLContext, not {type(ssl_context).__name__}")
        if _NOT_IN_URL.search(url):
            raise ValueError("the URL holds a space, a control character, a surrogate or a backslash")
        try:
            parts, port = urlsplit(url), urlsplit(url).port
        except ValueError:
            parts, port = None, None
        if parts is None:  # raised out here: the original error may quote the URL
            raise ValueError("the URL has an invalid host or port")
        if parts.scheme not in ("ws", "wss"):
            raise ValueError("the URL must begin with ws:// or wss://")
        if not parts.hostname:
            raise ValueError("the URL names no host")
        if port == 0:
            raise ValueError("the URL's port must not be 0")
        if "#" in url:
            raise ValueError("a WebSocket URL has no fragment (RFC 6455, section 3)")
        resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not resource.isascii():
            raise ValueError("non-ASCII characters in the URL's path or query must be percent-encoded")
        secure = parts.scheme == "wss"
        if secure and ssl_context is None:
            ssl_context = ssl.create_default_context()
        elif not secure and ssl_context is not None:
            raise ValueError("an ssl_context needs a wss:// URL")
        checked = _check_headers(headers)
        if parts.username is not None:
            if any(name.lower() == "authorization" for name, _ in checked):
                raise ValueError("the URL's userinfo and an Authorization header exclude each other")
            userinfo = unquote_to_bytes(parts.username) + b":" + unquote_to_bytes(parts.password or "")
            credentials = base64.b64encode(userinfo).decode()
            checked = (*checked, ("Authorization", f"Basic {credentials}"))
        return cls(
            _ascii_host(parts.hostname), port or (443 if secure else 80), ssl_context, resource, checked
        )

    @property
    def authority(self) -> str:
        """The value of the ``Host`` header: the port stands in it unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (80 if self.ssl_context is None else 443) else f"{host}:{self.port}"


def _ascii_host(host: str) -> str:
    with contextlib.suppress(UnicodeError):
        ascii_host = host.encode("idna").decode()
        if _HOST.fullmatch(ascii_host):
            return ascii_host
    raise ValueError("the URL's host is not a valid host name")


def _check_headers(headers: HeadersLike | None) -> tuple[tuple[str, str], ...]:
    pairs = tuple(headers.items() if isinstance(headers, Mapping) else headers or ())
    for name, value in pairs:
        if not all(isinstance(part, str) for part in (name, value)):
            raise ValueError("headers must be a mapping, or pairs, of strings")
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError("a header's name holds a character that RFC 9110 does not allow")
        if name.lower() in _RESERVED or name.lower().startswith("sec-websocket-"):
            raise ValueError(f"the header {name} belongs to the WebSocket handshake")
        if value and not _FIELD_VALUE.fullmatch(value):
            raise ValueError(
                f"the value of the header {name} holds a control or non-ASCII character, "
                "or begins or ends with a space"
            )
    return pairs
