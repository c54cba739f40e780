"""An agent that a test plays by hand, byte by byte: in this process, on blocking sockets.

A script is a plain function of a `Peer`; it runs in a thread of its own for every connection. Every wait in
it has a deadline, and what it raises comes out of `serve`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import stat
import struct
import threading
import traceback
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

    Script: TypeAlias = Callable[["Peer"], None]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

DEADLINE: Final = 20.0
"""Seconds. Nothing waits for so long unless the test fails."""

STATUS: Final = b'{"type":"STATUS","state":"ready","features":["ids","cancel"]}'


def chunk(request_id: str, text: str) -> bytes:
    return json.dumps({"type": "AGENT_EVENT_TEXT_CHUNK", "id": request_id, "text": text}).encode()


def end(request_id: str) -> bytes:
    return json.dumps({"type": "AGENT_EVENT_END", "id": request_id, "tokens_used": 1}).encode()


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = False,
    length: int | None = None,
) -> bytes:
    """A frame as a server sends it; `masked`, `rsv` and a false `length` make it an illegal one."""
    length = len(payload) if length is None else length
    first = bytes((fin << 7 | rsv << 4 | opcode,))
    mask_bit = masked << 7
    if length < 126:
        header = first + bytes((mask_bit | length,))
    elif length < 65_536:
        header = first + bytes((mask_bit | 126,)) + length.to_bytes(2)
    else:
        header = first + bytes((mask_bit | 127,)) + length.to_bytes(8)
    return header + (bytes(4) if masked else b"") + payload


def close_frame(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2) + reason)


def text(payload: bytes) -> bytes:
    return frame(TEXT, payload)


class Frame(NamedTuple):
    opcode: int
    payload: bytes


def _open_sockets() -> dict[int, int]:
    """This process' sockets: the inode by the file descriptor."""
    found = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found


class Peer:
    """The agent's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = ""
        self._arrived = bytearray()

    def start_tls(self, context: ssl.SSLContext) -> None:
        self.sock = context.wrap_socket(self.sock, server_side=True)

    def client_socket(self) -> socket.socket:
        """A duplicate of the socket at the other end, which is in this process, too."""
        for number in _open_sockets():
            sock = socket.fromfd(number, self.sock.family, self.sock.type)
            if sock.getsockname() == self.sock.getpeername():
                return sock
            sock.close()
        raise AssertionError("the client has closed its socket")

    # Opening

    def read_request(self) -> str:
        """The client's HTTP request, up to its empty line."""
        while b"\r\n\r\n" not in self._arrived:
            self._receive_more()
        head, _, self._arrived = self._arrived.partition(b"\r\n\r\n")
        self.head = head.decode("ascii")
        return self.head

    def header(self, name: str) -> list[str]:
        """Every value of the request's header `name`."""
        fields = [line.partition(": ") for line in self.head.split("\r\n")[1:]]
        return [value for field, _, value in fields if field.lower() == name]

    def switching(self, *, accept: str | None = None, extra: str = "") -> bytes:
        """The response that opens the WebSocket, right unless told otherwise."""
        (key,) = self.header("sec-websocket-key")
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        accept = base64.b64encode(digest).decode() if accept is None else accept
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n{extra}\r\n"
        ).encode()

    def upgrade(self) -> None:
        """Read the request, and open the WebSocket."""
        self.read_request()
        self.send(self.switching())

    def open(self) -> None:
        """As `upgrade`; and send the status."""
        self.upgrade()
        self.send(text(STATUS))

    # Frames

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> Frame:
        """The client's next frame, which must be whole, masked and without reserved bits."""
        first, second = self._take(2)
        length = second & 0x7F
        assert (first & 0xF0, second & 0x80) == (0x80, 0x80)
        if length >= 126:
            length = int.from_bytes(self._take(2 if length == 126 else 8))
        mask = self._take(4) * (length // 4 + 1)
        payload = int.from_bytes(self._take(length)) ^ int.from_bytes(mask[:length])
        return Frame(first & 0x0F, payload.to_bytes(length))

    def receive_message(self) -> dict[str, Any]:
        opcode, payload = self.receive()
        assert opcode == TEXT
        message: dict[str, Any] = json.loads(payload)
        return message

    def receive_prompt(self) -> str:
        """The id of the request that comes next."""
        message = self.receive_message()
        assert message["type"] == "USER_MESSAGE"
        request_id: str = message["id"]
        return request_id

    def receive_close(self) -> tuple[int, str]:
        """Code and reason of the client's close frame, which comes next but for pongs and cancels."""
        received = self.receive()
        while received.opcode == PONG or (received.opcode == TEXT and b'"CANCEL"' in received.payload):
            received = self.receive()
        assert received.opcode == CLOSE
        return int.from_bytes(received.payload[:2]), received.payload[2:].decode()

    def finish(self) -> None:
        """Answer the client's close, which must come with 1000; then the client must be gone."""
        assert self.receive_close() == (1000, "")
        self.send(close_frame(1000))
        self.wait_gone()

    # The end

    def wait_gone(self) -> None:
        """Wait until the client has closed its socket; whatever else it sends is ignored."""
        try:
            while self.sock.recv(65_536):
                pass
        except ConnectionError:
            pass

    def send_until_gone(self, data: bytes) -> None:
        """Send `data` again and again, until the client has closed its socket."""
        try:
            while True:
                self.send(data)
        except ConnectionError:
            pass

    def dribble(self, data: bytes, pause: float) -> None:
        """Send `data` byte by byte, each after `pause` seconds without a byte from the client."""
        for byte in data:
            try:
                self.sock.settimeout(pause)
                if not self.sock.recv(1):
                    return
            except TimeoutError:
                self.send(bytes((byte,)))
            except ConnectionError:
                return
        self.sock.settimeout(DEADLINE)

    def reset(self) -> None:
        """End the connection with a TCP RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _take(self, size: int) -> bytes:
        while len(self._arrived) < size:
            self._receive_more()
        taken = bytes(self._arrived[:size])
        del self._arrived[:size]
        return taken

    def _receive_more(self) -> None:
        data = self.sock.recv(1 << 20)
        assert data, "the client has closed its socket"
        self._arrived += data


@dataclasses.dataclass(frozen=True)
class _Resources:
    """What a connection could leave behind."""

    sockets: frozenset[int]
    tasks: frozenset[int]

    @classmethod
    def now(cls) -> _Resources:
        tasks = frozenset(task.id for task in anyio.get_running_tasks())
        return cls(frozenset(_open_sockets().values()), tasks)

    async def wait_restored(self) -> None:
        """An event loop may need some turns to close a socket."""
        now = _Resources.now()
        with anyio.move_on_after(DEADLINE):
            while now.sockets - self.sockets or now.tasks - self.tasks:
                await anyio.lowlevel.checkpoint()
                now = _Resources.now()
        assert not now.sockets - self.sockets, "sockets are left over"
        assert not now.tasks - self.tasks, "tasks are left over"


class WireServer:
    """Where `serve` listens: its `port`, its `authority` (``host:port``) and its `url`."""

    def __init__(self, script: Script, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._script = script
        self._stopping = False
        self._peers: list[Peer] = []
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.port: int = self._listener.getsockname()[1]
        self.authority = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.url = f"ws://{self.authority}/"
        self._start(self._accept)

    @property
    def connections(self) -> int:
        """How many connections there were."""
        return len(self._peers)

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with self._listener:
            while True:
                sock, _ = self._listener.accept()
                if self._stopping:
                    sock.close()
                    return
                sock.settimeout(DEADLINE)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer = Peer(sock)
                self._peers.append(peer)
                self._start(self._play, peer)

    def _play(self, peer: Peer) -> None:
        try:
            self._script(peer)
        except BaseException as exc:
            self.errors.append(exc)
        finally:
            peer.sock.close()

    def stop(self) -> None:
        """Accept no more, and wait for the scripts to end."""
        self._stopping = True
        socket.create_connection(self._listener.getsockname()[:2]).close()
        while self._threads:
            self._threads.pop().join()  # first of all started, last to end: the one that starts the others

    def abort(self) -> None:
        """End all connections, whatever their scripts are waiting for."""
        for peer in self._peers:
            with contextlib.suppress(OSError):  # it is closed already
                peer.sock.shutdown(socket.SHUT_RDWR)


@contextlib.asynccontextmanager
async def serve(script: Script, host: str = "127.0.0.1") -> AsyncIterator[WireServer]:
    """Play `script` for whoever connects. When this is left, no socket and no task may be left over."""
    before = _Resources.now()
    server = WireServer(script, host)
    try:
        yield server
    except BaseException as exc:
        for error in server.errors:
            exc.add_note("".join(traceback.format_exception(error)))
        server.abort()
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.stop)
    for error in server.errors:
        raise error
    await before.wait_restored()
