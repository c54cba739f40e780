"""The embedded agent's server: a thread with an asyncio event loop of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.protocol import State

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable, Iterable

    from ._link import Link

__all__ = ["ServerThread"]

_CLOSE_TIMEOUT: Final = 1.0  # seconds for a client to answer a close frame
_GRACE: Final = 2.0  # seconds for handlers to end, after the closing and again after being cancelled by force
_MESSAGE_SIZE: Final = 16 * 2**20  # bytes

_silent_logger: Final = logging.Logger("anyagent.testing")  # of no hierarchy; prompts and tokens go nowhere
_silent_logger.disabled = True


class ServerThread:
    """Serves connections in a thread between `start` and `stop`.

    `on_connect` is run for each connection, in the thread, and `links` says which ones there are to close.
    """

    def __init__(
        self,
        listener: socket.socket,
        ssl_context: ssl.SSLContext | None,
        on_connect: Callable[[ServerConnection], Awaitable[None]],
        links: Callable[[], Iterable[Link]],
    ) -> None:
        self._listener = listener
        self._ssl_context = ssl_context
        self._on_connect = on_connect
        self._links = links
        self._loop = asyncio.SelectorEventLoop()  # the same everywhere, whatever the application has set
        self._stopping = asyncio.Event()
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._stuck = False
        self._thread = threading.Thread(target=self._run, name="anyagent embedded agent")

    def start(self) -> None:
        """Start, and wait until connections are accepted. An error in that is raised as it is."""
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Close all connections with code 1001 and join the thread, also after a `start` that failed.

        Takes seven seconds at most. Raises `RuntimeError` if handlers were still running after that.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed when the start has failed
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(3 * _GRACE + _CLOSE_TIMEOUT)
        if self._thread.is_alive():
            raise RuntimeError("a handler blocks the thread of the embedded agent")
        if self._stuck:
            raise RuntimeError("a handler of the embedded agent did not end when it was cancelled")

    def broadcast(self, data: str) -> None:
        """Have a message written to every open connection; from any thread, and without waiting.

        Raises `RuntimeError` after `stop`.
        """
        self._loop.call_soon_threadsafe(self._broadcast, data)

    def _broadcast(self, data: str) -> None:
        broadcast([link.websocket for link in self._links()], data)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as exc:
            self._started.set_exception(exc)
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        opening: set[ServerConnection] = set()

        class TrackedConnection(ServerConnection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                opening.add(self)

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                opening.discard(self)

        server = await serve(
            self._on_connect,
            sock=self._listener,
            ssl=self._ssl_context,
            compression=None,
            ping_interval=None,
            close_timeout=_CLOSE_TIMEOUT,
            max_size=_MESSAGE_SIZE,
            logger=_silent_logger,
            create_connection=TrackedConnection,
        )
        self._started.set_result(None)
        await self._stopping.wait()
        for link in self._links():
            link.resume_reading()  # or no closing handshake could be completed
        for connection in opening:
            if connection.state is State.CONNECTING:
                connection.transport.abort()  # the server would wait for its handshake
        server.close()
        await asyncio.wait([asyncio.create_task(server.wait_closed())], timeout=_GRACE)
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        this = asyncio.current_task()
        tasks = asyncio.all_tasks() - {this}
        for task in tasks:
            task.cancel()
        tasks.add(asyncio.create_task(self._loop.shutdown_asyncgens()))
        _, stuck = await asyncio.wait(tasks, timeout=_GRACE)
        self._stuck = bool(stuck)
