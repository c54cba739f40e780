"""``anyagent ask``: one prompt, one answer."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import anyio
from anyio.from_thread import start_blocking_portal

from ._errors import Expired, UsageError
from ._relay import relay, send_answer

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectSendStream

    from .. import om
    from ._connection import Connection
    from ._display import Display
    from ._signals import Signals

__all__ = ["ask", "decode"]


def ask(text: str, connection: Connection, timeout: float | None, display: Display, signals: Signals) -> None:
    """Ask `text`, or standard input if that is ``-``, and show the answer as it arrives.

    Raises what can go wrong, as `_errors.run` expects it; `Expired` after `timeout` seconds.
    """
    if timeout is not None and not 0 < timeout < math.inf:
        raise UsageError("--timeout must be a positive number of seconds")
    with signals.raised():
        prompt = _read_prompt(text)

    async def produce(send: MemoryObjectSendStream[om.AgentEvent]) -> None:
        with anyio.move_on_after(timeout) as scope:
            async with served.open() as agent:
                await send_answer(agent, prompt, send)
        if scope.cancelled_caught:
            raise Expired(f"the answer was not complete within {timeout:g} s")

    with connection.served(display) as served, start_blocking_portal(served.backend) as portal:
        relay(portal, signals, produce, display.event)


def decode(data: bytes) -> str:
    """Text out of standard input; raises `UsageError` if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UsageError("the prompt is not valid UTF-8") from exc


def _read_prompt(text: str) -> str:
    if text == "-":
        text = decode(b"" if sys.stdin is None else sys.stdin.buffer.read())
    else:
        text = decode(text.encode(errors="surrogatepass"))  # undecodable arguments hold surrogates
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text
