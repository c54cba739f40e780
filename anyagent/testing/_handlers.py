"""Handlers of the embedded agent that behave well."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..im import UserMessage
    from ._reply import AgentReply

__all__ = ["echo"]

_WORD = re.compile(r"\S+\s*|\s+")  # matches everything: the chunks joined are the text


async def echo(message: UserMessage, reply: AgentReply) -> None:
    """Answer with the prompt's own text, a chunk for each word; the chunks joined are the text."""
    for word in _WORD.findall(message.text):
        await reply.text(word)
