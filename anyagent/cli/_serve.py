"""``anyagent serve``: the embedded agent on a port."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Literal, cast

from ..testing import echo, embedded_agent
from ._errors import HandlerStuck, NotListening, UsageError
from ._signals import SIGNAL_POLL, Terminated

if TYPE_CHECKING:
    from ..im import UserMessage
    from ..testing import AgentReply, Handler
    from ._display import Display
    from ._signals import Signals

__all__ = ["serve"]


def serve(
    name: str | None,
    host: str,
    port: int,
    wire: Literal["native", "single"],
    display: Display,
    signals: Signals,
) -> None:
    """Serve the handler `name` (``"MODULE:HANDLER"``; ``None``: `echo`) until a signal stops it.

    Raises `UsageError` if there is no such handler, `NotListening`, and `HandlerStuck`.
    """
    handler = echo if name is None else _reporting(_load(name), display)
    with contextlib.ExitStack() as stack:
        try:
            agent = stack.enter_context(embedded_agent(handler, wire=wire, host=host, port=port))
        except (OSError, UnicodeError) as exc:
            raise NotListening(f"cannot listen on {host}:{port}: {_reason(exc)}") from exc
        display.line(agent.url)
        display.hint("Ctrl-C stops the agent")
        with contextlib.suppress(KeyboardInterrupt, Terminated), signals.raised():
            while True:
                time.sleep(SIGNAL_POLL)
        display.interrupted()
        display.hint("stopping. Another Ctrl-C does not wait for the handlers")
        try:
            stack.close()
        except RuntimeError as exc:
            raise HandlerStuck(str(exc)) from exc


def _load(name: str) -> Handler:
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UsageError("the handler must be given as MODULE:HANDLER")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as exc:
        raise UsageError(f"cannot import {module_name}: {exc}") from exc
    if not hasattr(module, attribute):
        raise UsageError(f"{module_name} has no {attribute}")
    handler = getattr(module, attribute)
    if not inspect.iscoroutinefunction(handler):
        raise UsageError(f"{name} is not an async function")
    return cast("Handler", handler)


def _reporting(handler: Handler, display: Display) -> Handler:
    """`handler`, with its errors shown; all that the client gets to know is their type."""

    async def report(message: UserMessage, reply: AgentReply) -> None:
        try:
            await handler(message, reply)
        except Exception:
            display.block(traceback.format_exc())
            raise

    return report


def _reason(exc: OSError | UnicodeError) -> str:
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno)
    return str(exc)
