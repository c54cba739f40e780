"""A consumer: the task that sends one message and reads what answers it."""

from __future__ import annotations

import math
import warnings

import anyio

from anyagent import (
    OM,
    Agent,
    AgentError,
    AnyAgentError,
    Disconnected,
    ProtocolError,
    Response,
    SlowConsumerError,
)

from .reference import LEFT, Event, Outcome

__all__ = ["Consumer", "describe"]


class Consumer:
    """A task that sends one message and then iterates over the response as often as it is told to.

    * `events`, `outcome`: what it has got, and how it ended.
    * `orders`: how often it still has to iterate; 0 while it does nothing.
    """

    def __init__(self, agent: Agent, number: int) -> None:
        self.events: list[Event] = []
        self.outcome: Outcome | None = None
        self.response: Response | None = None
        self.scope = anyio.CancelScope()
        self.orders = 0
        self._agent = agent
        self._number = number
        self._tell, self._told = anyio.create_memory_object_stream[None](math.inf)

    def read(self, count: int) -> None:
        if self.outcome is None:
            self.orders += count
            for _ in range(count):
                self._tell.send_nowait(None)

    def drop(self) -> list[str]:
        """Let go of the response, while it is not being read; returns the warnings that this gives."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.response = None
        self.scope.cancel()
        return [warning.category.__name__ for warning in caught]

    async def run(self) -> None:
        with self.scope, self._tell, self._told:
            try:
                self.outcome = await self._consume()
            except anyio.get_cancelled_exc_class():
                self.outcome = LEFT
                raise
            finally:
                if self.response is not None:
                    with anyio.CancelScope(shield=True):
                        await self.response.aclose()

    async def _consume(self) -> Outcome:
        try:
            self.response = await self._agent.send_message(str(self._number))
            async for _ in self._told:
                self.events.append(describe(await self.response.__anext__()))
                self.orders -= 1
        except StopAsyncIteration:
            assert self.response is not None
            return ("completed", self.response.tokens_used)
        except (AnyAgentError, anyio.ClosedResourceError) as exc:
            return _outcome(exc)
        raise AssertionError("nobody closes the stream of orders but this task")


def _outcome(exc: Exception) -> Outcome:
    match exc:
        case AgentError(code=code):
            return ("AgentError", code)
        case Disconnected():
            return ("Disconnected", exc.code, exc.graceful, exc.phase)
        case ProtocolError():
            return ("ProtocolError", exc.request_id, exc.close_code)
        case SlowConsumerError():
            return ("SlowConsumerError", exc.limit, exc.value)
        case _:
            return LEFT


def describe(event: OM.AgentEvent) -> Event:
    match event:
        case OM.EventTextChunk(text=text):
            return ("text", text)
        case OM.EventReasoningChunk(text=text):
            return ("reasoning", text)
        case OM.EventToolCall(call_id=call_id):
            return ("tool", call_id)
        case OM.Unknown(type=kind):
            return ("unknown", kind)
        case _:
            raise AssertionError(f"a {type(event).__name__} is never yielded")
