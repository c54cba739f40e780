"""From the event loop's thread to the main thread, which does all that may block and takes the signals."""

from __future__ import annotations

import contextlib
import queue
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from .. import om
from ..errors import AgentError, AnyAgentError
from ._signals import SIGNAL_POLL, Signals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    from anyio.from_thread import BlockingPortal
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from .._agent import Agent

__all__ = ["relay", "result_of", "send_answer"]

_T = TypeVar("_T")

_EVENTS_AHEAD: Final = 64
_NO_TOOLS: Final = "error: this client has no tools"


def relay(
    portal: BlockingPortal,
    signals: Signals,
    produce: Callable[[MemoryObjectSendStream[om.AgentEvent]], Awaitable[None]],
    show: Callable[[om.AgentEvent], None],
) -> None:
    """Run `produce` in the portal's thread, and call `show` here with each event that it sends.

    Raises what either raises, `produce` after its events were shown, or what a signal raises. Then
    `produce` is cancelled, if it has not ended; its end is not waited for.
    """
    send, receive = anyio.create_memory_object_stream[om.AgentEvent](_EVENTS_AHEAD)

    async def run() -> None:
        async with send:
            await produce(send)

    running = portal.start_task_soon(run)
    try:
        while events := result_of(portal.start_task_soon(_take, receive), signals):
            with signals.raised():
                for event in events:
                    show(event)
        running.result()
    finally:
        running.cancel()
        portal.call(receive.close)


async def send_answer(
    agent: Agent, text: str, send: MemoryObjectSendStream[om.AgentEvent], *, conversation: str | None = None
) -> None:
    """Ask, and send on each event of the answer and then its terminal, also if that is an `om.Error`.

    A tool call is answered: there are no tools. Raises what `Response` raises.
    """
    async with await agent.send_message(text, conversation=conversation) as response:
        try:
            async for event in response:
                await send.send(event)
                if isinstance(event, om.EventToolCall):
                    # An agent that does not wait for the result may have ended the answer.
                    with contextlib.suppress(AnyAgentError, anyio.ClosedResourceError):
                        await response.send_tool_result(event.call_id, _NO_TOOLS)
        except AgentError as exc:
            error = om.Error(exc.code, exc.details, exc.retry_after, id=response.id or None)
            await send.send(error)
            raise
        assert response.end is not None
        await send.send(response.end)


def result_of(future: Future[_T], signals: Signals) -> _T:
    """Wait for the result of `future`, or for what a signal raises.

    A signal that raised while `future` is at work with its locks would leave them locked for ever, so the
    wait is for a queue, which has none to leave. A signal interrupts that, but not if it arrives in the
    moment before; so no wait is without an end.
    """
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    future.add_done_callback(done.put)
    while not future.done():
        with signals.raised(), contextlib.suppress(queue.Empty):
            done.get(timeout=SIGNAL_POLL)
    return future.result()


async def _take(receive: MemoryObjectReceiveStream[om.AgentEvent]) -> list[om.AgentEvent]:
    """Wait for an event and take all there are; an empty list is the end."""
    try:
        events = [await receive.receive()]
    except anyio.EndOfStream:
        return []
    while receive.statistics().current_buffer_used:
        events.append(receive.receive_nowait())
    return events
