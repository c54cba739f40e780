"""The class that anyagent replaces, written anew on its own stack: aiohttp, pydantic and one shared queue."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import aiohttp
from pydantic import BaseModel, Field, TypeAdapter

from ._base import Adapter
from ._messages import MESSAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ._base import Client

__all__ = ["ADAPTERS"]


class UserMessage(BaseModel):
    type: Literal["USER_MESSAGE"] = "USER_MESSAGE"
    text: str


class Status(BaseModel):
    type: Literal["STATUS"]
    state: str


class EventTextChunk(BaseModel):
    type: Literal["AGENT_EVENT_TEXT_CHUNK"]
    text: str


class EventEnd(BaseModel):
    type: Literal["AGENT_EVENT_END"]
    tokens_used: int


class Error(BaseModel):
    type: Literal["ERROR"]
    code: str | int
    details: str


class GracefulDisconnect(BaseModel):
    type: Literal["GRACEFUL_DISCONNECT"]


Message: TypeAlias = Annotated[
    Status | EventTextChunk | EventEnd | Error | GracefulDisconnect, Field(discriminator="type")
]
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class Reply(BaseModel):
    text: str


class AgentApi:
    """One connection; of two answers at once, each would take chunks of the other's."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self._websocket = websocket
        self._queue: asyncio.Queue[EventTextChunk | EventEnd | None] = asyncio.Queue()

    async def read(self) -> None:
        try:
            async for frame in self._websocket:
                if frame.type is aiohttp.WSMsgType.TEXT:
                    message = _MESSAGE.validate_json(frame.data)
                    if isinstance(message, EventTextChunk | EventEnd):
                        self._queue.put_nowait(message)
        finally:
            self._queue.put_nowait(None)  # unlike the original, which left the iterator hanging

    async def send_message(self, text: str) -> AgentResponse:
        await self._websocket.send_str(UserMessage(text=text).model_dump_json())
        return AgentResponse(self._queue)

    async def ask(self, text: str) -> Reply:
        response = await self.send_message(text)
        return Reply(text="".join([chunk.text async for chunk in response]))


class AgentResponse:
    def __init__(self, queue: asyncio.Queue[EventTextChunk | EventEnd | None]) -> None:
        self._queue = queue

    def __aiter__(self) -> AgentResponse:
        return self

    async def __anext__(self) -> EventTextChunk:
        event = await self._queue.get()
        if event is None:
            raise ConnectionError("the connection was lost")
        if isinstance(event, EventEnd):
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> AgentResponse:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Nothing: it had no way to cancel."""


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Client]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, heartbeat=30, max_msg_size=MESSAGE_SIZE) as websocket,
    ):
        if not isinstance(_MESSAGE.validate_json(await websocket.receive_str()), Status):
            raise ConnectionError("the agent sent no status")
        agent = AgentApi(websocket)
        reader = asyncio.create_task(agent.read())
        try:
            yield agent
        finally:
            reader.cancel()
            await asyncio.wait([reader])


ADAPTERS = (
    Adapter(
        name="replaced",
        label="aiohttp + pydantic",
        backend="asyncio",
        distributions=("aiohttp", "pydantic"),
        modules=("asyncio", "aiohttp", "pydantic"),
        multiplexes=False,
        connect=_connect,
    ),
)
