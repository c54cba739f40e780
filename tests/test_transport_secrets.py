"""No exception and no log record shows a token or what is said."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

import pytest

from anyagent import ConnectError, Timeouts, open_agent

from .misbehaviour import echo, fin_in_the_answer, garbage, no_status, rejection, silence, wrong_accept_key
from .wire_server import PING, PONG, Frame, Peer, chunk, end, frame, serve, text

if TYPE_CHECKING:
    from .wire_server import Script

pytestmark = [pytest.mark.anyio, pytest.mark.sockets]

SHORT = Timeouts(connect=0.3)
SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "script",
    [
        fin_in_the_answer,
        echo,
        garbage,
        wrong_accept_key,
        no_status,
        silence,
        rejection("302 Found"),
        Peer.upgrade,
        Peer.reset,
    ],
)
async def test_no_exception_and_no_log_record_shows_a_secret(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(script) as server:
        url = f"ws://{SECRET}:{SECRET}@{server.authority}/{SECRET}?{SECRET}={SECRET}"
        with pytest.raises(ConnectError) as caught:
            async with open_agent(url, headers={"X-Token": SECRET}, timeouts=SHORT):
                pass
    shown = [caplog.text, *traceback.format_exception(caught.value)]
    chain: list[BaseException] = [caught.value]
    for each in chain:
        chain += [other for other in (each.__cause__, each.__context__) if other is not None]
        chain += each.exceptions if isinstance(each, BaseExceptionGroup) else []
        shown.append(f"{each!r} {vars(each)}")
    basic = "czNjcjN0OnMzY3IzdA=="
    # The test's own source line of `open_agent(url, ...)` names the variable, not its value.
    assert [line for line in shown if SECRET in line or basic in line] == []


async def test_no_log_record_shows_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def script(peer: Peer) -> None:
        peer.open()
        request_id = peer.receive_prompt()
        peer.send(frame(PING, b"p") + text(chunk(request_id, SECRET)) + text(end(request_id)))
        assert peer.receive() == Frame(PONG, b"p")
        peer.finish()

    caplog.set_level(logging.DEBUG)
    async with serve(script) as server, open_agent(server.url) as agent:
        assert (await agent.ask(SECRET)).text == SECRET
    assert SECRET not in caplog.text
