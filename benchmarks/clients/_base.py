"""What a client of the benchmark has to offer, whichever library it is written over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

__all__ = ["Adapter", "Answer", "Backend", "Client", "Event", "Reply"]

Backend = Literal["asyncio", "uvloop", "trio"]


class Event(Protocol):
    """A piece of the answer."""

    @property
    def text(self) -> str: ...


class Reply(Protocol):
    """A whole answer."""

    @property
    def text(self) -> str: ...


class Answer(Protocol):
    """What comes for one request: ends by itself; leaving ``async with`` early cancels the request.

    A lost connection ends the iteration with an exception of the client's own choice.
    """

    # Any: anyagent yields all events of an agent, of which the servers here send text chunks alone.
    def __aiter__(self) -> AsyncIterator[Any]: ...

    async def __aenter__(self) -> Answer: ...

    async def __aexit__(self, *exc_info: Any) -> None: ...


class Client(Protocol):
    """One connection."""

    async def send_message(self, text: str, /) -> Answer: ...

    async def ask(self, text: str, /) -> Reply:
        """The whole answer to a prompt."""
        ...


@dataclass(frozen=True)
class Adapter:
    """A client by name.

    * `label`: for tables and figures.
    * `backend`: what it is run on; ``"uvloop"`` is asyncio with uvloop's event loop.
    * `distributions`: whose versions belong to a result.
    * `modules`: what is imported before it can connect.
    * `multiplexes`: whether it may have several requests in flight on one connection.
    * `connect`: opens a connection to a URL, and has awaited the agent's first status.
    """

    name: str
    label: str
    backend: Backend
    distributions: tuple[str, ...]
    modules: tuple[str, ...]
    multiplexes: bool
    connect: Callable[[str], AbstractAsyncContextManager[Client]]
