"""What an application costs and leaves behind as a process: when it is interrupted, and when it rests."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ..wire_server import TEXT, Peer, chunk, close_frame, text
from .processes import BACKENDS, DEADLINE, measured, playing, started
from .programs import CLOSING, IDLE, IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS_TO_INTERRUPT = [
    pytest.param("interrupted", "asyncio.run", signal.SIGINT, 130, id="SIGINT in asyncio.run"),
    pytest.param("interrupted", "anyio.run", signal.SIGINT, 130, id="SIGINT in anyio.run"),
    pytest.param("interrupted", "trio.run", signal.SIGINT, 130, id="SIGINT in trio.run"),
    pytest.param("terminated", "asyncio", signal.SIGTERM, 143, id="SIGTERM in asyncio"),
    pytest.param("terminated", "trio", signal.SIGTERM, 143, id="SIGTERM in trio"),
]


class BusyAgent:
    """Begins `IN_FLIGHT` answers, and hears what it is told until its client has gone."""

    def __init__(self, *, answers_close: bool) -> None:
        self._answers_close = answers_close
        self.cancelled: list[str] = []
        self.asked: list[str] = []
        self.close = b""
        self.gone = threading.Event()

    def play(self, peer: Peer) -> None:
        try:
            self._play(peer)
        finally:
            self.gone.set()

    def _play(self, peer: Peer) -> None:
        peer.open()
        self.asked = [peer.receive_prompt() for _ in range(IN_FLIGHT)]
        peer.send(b"".join(text(chunk(request_id, "begun")) for request_id in self.asked))
        while (received := peer.receive()).opcode == TEXT:
            message = json.loads(received.payload)
            assert message.keys() == {"type", "id"}
            assert message["type"] == "CANCEL"
            self.cancelled.append(message["id"])
        self.close = received.payload
        if self._answers_close:
            peer.send(close_frame(1000))
        peer.wait_gone()


@pytest.mark.parametrize(("program", "runner", "number", "code"), WAYS_TO_INTERRUPT)
@pytest.mark.parametrize("answers_close", [True, False], ids=["polite agent", "silent agent"])
def test_an_application_that_is_interrupted_tells_the_agent_of_every_request_and_closes_in_time(
    program: str,
    runner: str,
    number: signal.Signals,
    code: int,
    answers_close: bool,
    figure: Callable[[str], None],
) -> None:
    agent = BusyAgent(answers_close=answers_close)
    with playing(agent.play) as server, started(program, runner, server.url) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "all have begun\n", process.communicate(timeout=DEADLINE)[1]
        signalled = time.monotonic()
        process.send_signal(number)
        assert agent.gone.wait(DEADLINE)
        took = time.monotonic() - signalled
        assert process.communicate(timeout=DEADLINE) == ("", "")
        assert process.returncode == code
    assert len(agent.cancelled) == IN_FLIGHT
    assert sorted(agent.cancelled) == sorted(agent.asked)
    assert agent.close == (1000).to_bytes(2)
    bound = CLOSING.close + (0 if answers_close else 0.5)
    assert took <= bound
    figure(f"{IN_FLIGHT} cancels, gone after {took:.2f} s, bound {bound} s, exit code {code}")


def silent(peer: Peer) -> None:
    peer.open()
    peer.wait_gone()


@pytest.mark.parametrize("program", ["rest_after_cancels", "close_after_a_cancel"])
def test_after_a_cancel_a_process_hardly_uses_the_processor(
    program: str, figure: Callable[[str], None]
) -> None:
    with playing(silent) as server, contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(program, backend, server.url)) for backend in BACKENDS]
        outcomes = list(map(measured, processes))
    for backend, outcome in zip(BACKENDS, outcomes, strict=True):
        share = outcome["used"] / outcome["took"]
        assert outcome["cancelled"] >= IN_FLIGHT
        assert outcome["took"] > 0.9 * IDLE
        assert share <= 0.05
        figure(f"{backend} {share:.1%} of one core over {IDLE:g} s, bound 5 %")
