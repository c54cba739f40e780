"""`embedded_agent`: a real agent on a loopback port, for tests."""

from __future__ import annotations

import collections
import contextlib
import itertools
import socket
import threading
from typing import TYPE_CHECKING, Final, Literal

from .. import im, om
from ._connection import Behaviour, Connection
from ._handlers import echo
from ._server import ServerThread

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Sequence

    from websockets.asyncio.server import ServerConnection

    from ._reply import Handler

__all__ = ["EmbeddedAgent", "embedded_agent"]

_READY: Final = om.Status("ready")  # stands for a status made from the other options
_FEATURES: Final = {"native": ("ids", "cancel"), "single": ()}
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # a wildcard address is none to connect to


class EmbeddedAgent:
    """A running agent, made by `embedded_agent`. Everything here may be used from any thread.

    * `url`: where to connect to; for an agent that listens on all interfaces, by way of loopback.
    * `port`: the port that it listens on.
    * `received`: the messages of all clients, decoded, in order of arrival; the newest 10,000.
    * `connections_total`: how many connections there have been.
    """

    def __init__(
        self, listener: socket.socket, ssl_context: ssl.SSLContext | None, behaviour: Behaviour
    ) -> None:
        host, self.port = listener.getsockname()[:2]
        self.url = _url("ws" if ssl_context is None else "wss", host, self.port)
        self.received: collections.deque[im.ClientMessage] = collections.deque(maxlen=10_000)
        self.connections_total = 0
        self._behaviour = behaviour
        self._connections: set[Connection] = set()
        self._changed = threading.Condition()
        self._server = ServerThread(
            listener,
            ssl_context,
            self._on_connect,
            lambda: [connection.link for connection in self._connections],
        )

    @property
    def connections(self) -> int:
        """How many connections there are; one counts until its handlers have ended."""
        return len(self._connections)

    def wait_for(
        self, predicate: Callable[[im.ClientMessage], object], timeout: float = 5.0
    ) -> im.ClientMessage:
        """Return the oldest message in `received` that `predicate` is true of, once there is one.

        Blocks the thread, so asynchronous code calls it with `anyio.to_thread.run_sync`. Raises
        `TimeoutError` after `timeout` seconds.
        """
        found: list[im.ClientMessage] = []

        def look() -> bool:
            found.extend(itertools.islice(filter(predicate, self.received), 1))
            return bool(found)

        self._wait_until(look, timeout)
        return found[0]

    def wait_for_connections(self, count: int, timeout: float = 5.0) -> None:
        """Return once there are `count` `connections`; blocks and times out as `wait_for` does."""
        self._wait_until(lambda: self.connections == count, timeout)

    def broadcast(self, message: om.ServerMessage) -> None:
        """Send a message to every open connection, as a notice is sent; does not wait.

        Raises `RuntimeError` when the agent has been stopped.
        """
        self._server.broadcast(om.encode(message).decode())

    def _wait_until(self, predicate: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(predicate, timeout):
                raise TimeoutError(f"the embedded agent did not see it within {timeout:g} s")

    async def _on_connect(self, websocket: ServerConnection) -> None:
        connection = Connection(websocket, self._behaviour, self._record)
        with self._changed:
            self.connections_total += 1
            self._connections.add(connection)
            self._changed.notify_all()
        try:
            await connection.serve()
        finally:
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()

    def _record(self, message: im.ClientMessage) -> None:
        with self._changed:
            self.received.append(message)
            self._changed.notify_all()


def _url(scheme: str, host: str, port: int) -> str:
    host = _LOOPBACK.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextlib.contextmanager
def embedded_agent(
    handler: Handler = echo,
    *,
    wire: Literal["native", "single"] = "native",
    host: str = "127.0.0.1",
    port: int = 0,
    max_in_flight: int | None = None,
    features: Sequence[str] | None = None,
    status: om.ServerMessage | str | bytes | None = _READY,
    ssl_context: ssl.SSLContext | None = None,
) -> Iterator[EmbeddedAgent]:
    """Serve an agent from a thread of its own while the block runs: a real WebSocket on a real port.

    A synchronous context manager, for synchronous code and for any event loop. Every prompt is answered
    by ``handler(message, reply)``, a coroutine function that is run on asyncio in the agent's thread;
    see `AgentReply`. When it returns, the request ends; when it raises, the client gets an
    ``OM.Error`` with the code ``"internal_error"`` and the exception's type; when the client cancels the
    request or the connection is lost, it is cancelled.

    * `wire`: ``"native"`` (ids, many requests at once, ``CANCEL``) or ``"single"`` (no ids; one request
      after the other).
    * `host`, `port`: where to listen; by default on any free port of the loopback interface.
    * `max_in_flight`: how many requests a connection may have in flight, on a wire with ids; one more
      gets an ``OM.Error`` with the code ``"busy"``. Default: no limit.
    * `features`: what to announce and honour, instead of what `wire` stands for; of ``"ids"``, ``"cancel"``.
    * `status`: the first message of each connection, instead of an `OM.Status` made from the above. A
      struct, or raw text or bytes; ``None`` sends nothing.
    * `ssl_context`: makes it a ``wss://`` agent.

    Raises `OSError` if it cannot listen there, `ValueError` for an unknown `wire`.

    When the block is left, connections are closed with code 1001 and handlers are cancelled; a client that
    does not answer, or a handler that is slow to end, holds this up for at most seven seconds. A handler
    that has not ended then is abandoned, with a `RuntimeError`.
    """
    if wire not in _FEATURES:
        raise ValueError(f"wire must be 'native' or 'single', not {wire!r}")
    if features is None:
        features = _FEATURES[wire]
    if status is _READY:
        status = om.Status("ready", features=tuple(features), max_in_flight=max_in_flight)
    if status is not None and not isinstance(status, str | bytes):
        status = om.encode(status).decode()
    behaviour = Behaviour(
        handler=handler,
        first=status,
        multiplexed="ids" in features,
        cancellable="cancel" in features,
        max_in_flight=max_in_flight,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        # Inherited by the connections; asyncio sets it only on those of listeners that it made itself.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        agent = EmbeddedAgent(listener, ssl_context, behaviour)
        try:
            agent._server.start()
            yield agent
        finally:
            agent._server.stop()
