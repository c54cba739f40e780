"""The replay server: answers with bytes that were encoded before, so that it is never what is measured.

It speaks just enough WebSocket for the clients of the suite, over blocking sockets, without a library: a
thread of each connection reads and one writes, so that it never stops reading while it sends. The URL says
what it does: ``/ids/PLAN?...`` with request ids and cancels, ``/single/PLAN?...`` without; see `PLANS`.

``python -m benchmarks.server [CPU]`` prints the port, and ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import parse_qsl, urlsplit

from anyagent import IM, OM, ProtocolError

from . import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["PLANS", "ReplayServer"]

_TICK: Final = 0.001  # seconds
_WRITE: Final = 1 << 15  # bytes: what is written at once, if that much is due


class Plan(Protocol):
    """What a connection answers; made anew for each."""

    def prompt(self, message: IM.UserMessage) -> Iterator[bytes] | None:
        """Take in one prompt. What is returned is written by the connection's writer, piece by piece."""


class Round:
    """``round``: waits for `requests` prompts, then sends `chunks` (``warm`` in a warm-up) of `size` to each.

    `order` is ``burst`` or ``interleaved``; with ``end=0`` the requests are left open. With ``hold=1`` the
    client says when: see `wire.READY` and `wire.GO`.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        self._requests = int(options["requests"])
        self._chunks = int(options["chunks"])
        self._warm = int(options.get("warm", self._chunks))
        self._size = int(options["size"])
        self._order: wire.Order = "interleaved" if options.get("order") == "interleaved" else "burst"
        self._with_end = options.get("end") != "0"
        self._hold = options.get("hold") == "1"
        self._ids: list[str | None] = []
        self._warms_up = False
        self._ready: list[bytes] = []

    def prompt(self, message: IM.UserMessage) -> Iterator[bytes] | None:
        if self._hold and message.text == wire.READY:
            self._ready.append(wire.frame(wire.end(message.id)))
        elif self._hold and message.text == wire.GO:
            return self._answer(wire.frame(wire.end(message.id)))
        else:
            self._ids.append(message.id)
            self._warms_up = message.text == wire.WARM_UP
        if len(self._ids) < self._requests:
            return None
        if self._hold:
            ready, self._ready = self._ready, []
            return iter(ready)
        return self._answer(b"")

    def _answer(self, before: bytes) -> Iterator[bytes]:
        ids, self._ids = tuple(self._ids), []
        chunks = self._warm if self._warms_up else self._chunks
        yield before + wire.round_frames(ids, chunks, self._size, self._order, self._with_end)


class Paced:
    """``paced``: `requests` prompts, then `rate` chunks a second to each, `chunks` in all, in turn."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._requests = int(options["requests"])
        self._chunks = int(options["chunks"])
        self._size = int(options["size"])
        self._period = round(1 / int(options["rate"]) / _TICK)  # ticks
        self._ids: list[str | None] = []

    def prompt(self, message: IM.UserMessage) -> Iterator[bytes] | None:
        self._ids.append(message.id)
        return self._answer() if len(self._ids) == self._requests else None

    def _answer(self) -> Iterator[bytes]:
        groups = _groups(self._ids, self._size, self._period)
        ends = [
            b"".join(
                wire.frame(wire.end(request_id, self._chunks)) for request_id in self._ids[n :: self._period]
            )
            for n in range(self._period)
        ]
        last = (self._chunks - 1) * self._period
        for tick in _ticks(self._chunks * self._period):
            group = tick % self._period
            yield groups[group] + ends[group] if tick >= last else groups[group]


class Probe:
    """``probe``: one request gets a chunk every two ticks, which begins with the time in nanoseconds.

    `load` other requests get `rate` chunks a second each meanwhile; a probe's chunk is the last of its tick,
    in the same write. It begins when all prompts are there.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        self._load = int(options["load"])
        self._chunks = int(options["chunks"])
        self._size = int(options["size"])
        self._period = round(1 / int(options["rate"]) / _TICK)
        self._ids: list[str | None] = []
        self._probe: list[str | None] = []

    def prompt(self, message: IM.UserMessage) -> Iterator[bytes] | None:
        (self._probe if message.text == wire.PROBE else self._ids).append(message.id)
        return self._answer() if self._probe and len(self._ids) == self._load else None

    def _answer(self) -> Iterator[bytes]:
        groups = _groups(self._ids, self._size, self._period)
        ends = b"".join(wire.frame(wire.end(request_id)) for request_id in (*self._ids, *self._probe))
        digits = 20  # of a 64-bit number
        mark = b"*" * digits
        before, _, after = wire.frame(
            wire.chunk(self._probe[0], mark.decode() + wire.text_of(self._size - digits))
        ).partition(mark)
        for tick in _ticks(2 * self._chunks):
            group = groups[tick % self._period]
            if tick % 2:
                yield b"%b%b%020d%b" % (group, before, time.monotonic_ns(), after)
            elif group:
                yield group
        yield ends


class Answer:
    """``answer``: every prompt is answered as it comes, with `chunks` of `size` characters.

    The chunks of all that are in flight come in turn. Their text is that of the prompt, over and over, so
    that an answer can be told from another.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        self._chunks = int(options["chunks"])
        self._size = int(options["size"])
        self._numbers = itertools.count()
        self._arrived: deque[tuple[int, bytes, bytes]] = deque()  # a number, the frames of chunk and end

    def prompt(self, message: IM.UserMessage) -> Iterator[bytes] | None:
        piece = wire.frame(wire.chunk(message.id, wire.echo(message.text, self._size)))
        self._arrived.append((next(self._numbers), piece, wire.frame(wire.end(message.id, self._chunks))))
        return self._answer()  # has nothing to do if one before it was still busy

    def _answer(self) -> Iterator[bytes]:
        pieces: dict[int, bytes] = {}
        ends: deque[tuple[int, int, bytes]] = deque()  # after which turn it comes, the number, the frame
        turn = 0
        while True:
            while self._arrived:
                number, piece, end = self._arrived.popleft()
                pieces[number] = piece
                ends.append((turn + self._chunks, number, end))
            if not ends:
                return
            once = b"".join(pieces.values())
            turns = min(ends[0][0] - turn, max(1, _WRITE // len(once)))
            turn += turns
            data = [once * turns]
            while ends and ends[0][0] == turn:
                _, number, end = ends.popleft()
                del pieces[number]
                data.append(end)
            yield b"".join(data)


class Hold:
    """``hold``: never answers a prompt."""

    def __init__(self, options: Mapping[str, str]) -> None:
        pass

    def prompt(self, message: IM.UserMessage) -> Iterator[bytes] | None:
        return None


PLANS: Final[Mapping[str, Callable[[Mapping[str, str]], Plan]]] = {
    "round": Round,
    "paced": Paced,
    "probe": Probe,
    "answer": Answer,
    "hold": Hold,
}
"""What may follow ``/ids/`` and ``/single/`` in a URL."""


def _groups(ids: list[str | None], size: int, period: int) -> list[bytes]:
    """One chunk for every request, in as many groups as a period has ticks."""
    text = wire.text_of(size)
    frames = [wire.frame(wire.chunk(request_id, text)) for request_id in ids]
    return [b"".join(frames[n::period]) for n in range(period)]


def _ticks(count: int) -> Iterator[int]:
    """Count up to `count`, once a tick; after a delay, what is due comes at once."""
    start = time.monotonic()
    for tick in range(count):
        wait = start + tick * _TICK - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        yield tick


class Connection:
    """One client."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._outgoing: SimpleQueue[bytes | Iterator[bytes] | None] = SimpleQueue()  # None: no more
        self._pongs: SimpleQueue[bytes] = SimpleQueue()  # which do not wait for the end of an answer

    def run(self) -> None:
        """Serve until either side has closed."""
        with self._socket:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            writer = threading.Thread(target=self._write, daemon=True)
            try:
                plan, status = self._handshake()
                self._outgoing.put(wire.frame(OM.encode(status)))
                writer.start()
                self._read(plan)
            except (OSError, ValueError, ProtocolError) as exc:
                if not isinstance(exc, ConnectionError):
                    print(f"replay server: {exc}", file=sys.stderr)
            finally:
                self._outgoing.put(None)
                if writer.is_alive():
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)  # wakes a writer that nobody reads
                    writer.join()

    def _handshake(self) -> tuple[Plan, OM.Status]:
        request = b""
        while b"\r\n\r\n" not in request:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("closed within the handshake")
            request += data
        line, *lines = request.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (entry.partition(":") for entry in lines)
        }
        target = urlsplit(line.split(" ")[1])
        _, kind, name = target.path.split("/")
        if kind not in ("ids", "single") or name not in PLANS or "sec-websocket-key" not in headers:
            self._socket.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            raise ValueError(f"no such plan: {target.path}")
        plan = PLANS[name](dict(parse_qsl(target.query)))
        self._socket.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + wire.accept_key(headers["sec-websocket-key"]).encode() + b"\r\n\r\n"
        )
        return plan, OM.Status("ready", features=("ids", "cancel") if kind == "ids" else ())

    def _read(self, plan: Plan) -> None:
        reader = wire.FrameReader()
        while data := self._socket.recv(1 << 18):
            for opcode, payload in reader.feed(data):
                if opcode == wire.TEXT:
                    self._message(plan, IM.decode(payload))
                elif opcode == wire.PING:
                    self._pongs.put(wire.frame(payload, wire.PONG))
                    self._outgoing.put(b"")  # wakes the writer
                elif opcode == wire.CLOSE:
                    self._outgoing.put(wire.frame(payload[:2], wire.CLOSE))
                    self._outgoing.put(None)  # the writer ends the stream, the client then closes

    def _message(self, plan: Plan, message: IM.ClientMessage) -> None:
        match message:
            case IM.UserMessage(text=wire.SYNC, id=request_id):
                self._outgoing.put(wire.frame(wire.end(request_id)))
            case IM.UserMessage():
                answer = plan.prompt(message)
                if answer is not None:
                    self._outgoing.put(answer)
            case IM.Cancel(id=request_id):
                self._outgoing.put(wire.frame(wire.end(request_id, status="cancelled")))

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the client is gone, which the reader hears of as well
            while (item := self._outgoing.get()) is not None:
                for data in (item,) if isinstance(item, bytes) else item:
                    while not self._pongs.empty():
                        self._socket.sendall(self._pongs.get())
                    self._socket.sendall(data)
            self._socket.shutdown(socket.SHUT_WR)


class ReplayServer:
    """Listens on a free port of the loopback interface, and serves in threads until the process ends."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._socket.accept()
                threading.Thread(target=Connection(sock).run, daemon=True).start()


def main() -> None:
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, {int(sys.argv[1])})
    print(ReplayServer().port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
