"""Handlers for `embedded_agent` that misbehave, each in one way.

Each first sends the text chunk ``"partial"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from .. import om

if TYPE_CHECKING:
    from ..im import UserMessage
    from ._reply import AgentReply

__all__ = [
    "bad_field",
    "bad_json",
    "bad_utf8",
    "close_mid_answer",
    "drop_mid_answer",
    "graceful_disconnect",
    "late_events",
    "no_terminal",
    "reset_mid_answer",
    "stall",
    "wrong_id",
]


async def close_mid_answer(message: UserMessage, reply: AgentReply) -> None:
    """Closes the connection with the code 1011 and the reason "fault"."""
    await reply.text("partial")
    await reply.close(1011, "fault")


async def reset_mid_answer(message: UserMessage, reply: AgentReply) -> None:
    """Resets the connection (TCP RST), so that the chunk may be lost."""
    await reply.text("partial")
    reply.reset()


async def drop_mid_answer(message: UserMessage, reply: AgentReply) -> None:
    """Ends the connection (TCP FIN) without a close frame."""
    await reply.text("partial")
    reply.drop()


async def no_terminal(message: UserMessage, reply: AgentReply) -> None:
    """Sends no terminal, and regards the request as over."""
    await reply.text("partial")
    reply.end_silently()


async def late_events(message: UserMessage, reply: AgentReply) -> None:
    """Waits to be cancelled, and then sends the chunks "late" and "later" before the terminal."""
    await reply.text("partial")
    try:
        await reply.hang()
    finally:
        with anyio.CancelScope(shield=True):
            await reply.text("late")
            await reply.text("later")


async def bad_json(message: UserMessage, reply: AgentReply) -> None:
    """Sends a text message that is half an object, and completes the answer."""
    await reply.text("partial")
    await reply.raw('{"type":"AGENT_EVENT_TEXT_CHUNK","text":')


async def bad_field(message: UserMessage, reply: AgentReply) -> None:
    """Sends a chunk of the request whose text is a number, and completes the answer."""
    await reply.text("partial")
    chunk = om.encode(om.EventTextChunk(id=reply.id, text="")).decode()
    await reply.raw(chunk.replace('""', "5"))


async def bad_utf8(message: UserMessage, reply: AgentReply) -> None:
    """Sends a text frame whose payload is not UTF-8, and completes the answer."""
    await reply.text("partial")
    payload = b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":"\xff"}'
    reply.write(bytes([0x81, len(payload)]) + payload)


async def wrong_id(message: UserMessage, reply: AgentReply) -> None:
    """Sends a chunk and a terminal for the id "nobody", and completes the answer with the chunk "whole"."""
    await reply.text("partial")
    await reply.send(om.EventTextChunk(id="nobody", text="astray"))
    await reply.send(om.EventEnd(id="nobody", tokens_used=1))
    await reply.text("whole")


async def stall(message: UserMessage, reply: AgentReply) -> None:
    """Stops reading and answering: not even a ping is answered, and the connection's end goes unnoticed."""
    await reply.text("partial")
    reply.stop_reading()
    await reply.hang()


async def graceful_disconnect(message: UserMessage, reply: AgentReply) -> None:
    """Announces that it goes away, completes the answer, and closes: code 1001, reason "maintenance"."""
    await reply.text("partial")
    await reply.send(om.GracefulDisconnect(reason="maintenance", deadline=5))
    await reply.end()
    await reply.close(1001, "maintenance")
