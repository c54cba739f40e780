"""A signal may arrive between any two instructions of the thread that shows an answer."""

from __future__ import annotations

import itertools
import signal
import sys
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.from_thread import start_blocking_portal

from anyagent import om
from anyagent.cli import _relay
from anyagent.cli._signals import Signals
from tests.cli_runner import BACKENDS

if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from anyio.streams.memory import MemoryObjectSendStream

WAITS = 3


class SignalAtInstruction:
    """Traces this thread, and sends it SIGINT before instruction `number` of what the relay calls."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.sent = False

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = frame.f_code.co_filename != _relay.__file__
        if event == "opcode":
            self._left -= 1
            if self._left == 0:
                self.sent = True
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self.trace


def relay_with_signal(backend: str, interruption: SignalAtInstruction) -> None:
    async def produce(send: MemoryObjectSendStream[om.AgentEvent]) -> None:
        for _ in range(WAITS):
            await send.send(om.EventTextChunk("x"))

    def trace_from_here_on(event: om.AgentEvent) -> None:
        sys.settrace(interruption.trace)

    traced_by = sys.gettrace()
    with Signals() as signals, start_blocking_portal(backend) as portal:
        try:
            _relay.relay(portal, signals, produce, trace_from_here_on)
        finally:
            sys.settrace(traced_by)
            portal.call(anyio.sleep, 0)  # the event loop is alive
        with signals.raised():
            pass  # which is where a signal that found no place before is raised


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_at_any_instruction_interrupts_and_never_hangs(backend: str) -> None:
    for number in itertools.count(1):
        interruption = SignalAtInstruction(number)
        try:
            relay_with_signal(backend, interruption)
        except KeyboardInterrupt:
            continue
        assert not interruption.sent
        break
    assert number > WAITS
