"""Whatever happens to a connection, every request comes to one documented end, with its own events in order.

Only a flipped bit may change the text of an answer, or whose it is; TCP's checksum is there to prevent that.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given, settings

from anyagent import IM
from anyagent.testing import embedded_agent

from ..properties import REPEATABLE
from .plans import Plan, Player, answer, plans
from .proxy import proxy_to
from .running import quick_garbage_collection, run

if TYPE_CHECKING:
    from collections.abc import Callable

_quick_garbage_collection = pytest.fixture(autouse=True, scope="module")(quick_garbage_collection)


@pytest.mark.parametrize("wire", ["native", "single"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_under_faults_every_request_has_one_documented_end_and_only_its_own_events(
    backend: str, wire: Literal["native", "single"], figure: Callable[[str], None]
) -> None:
    numbers = itertools.count()
    endings: collections.Counter[str] = collections.Counter()
    corrupted: set[str] = set()

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(embedded_agent(answer, wire=wire))
        proxy = stack.enter_context(proxy_to(server.port))

        @settings(REPEATABLE, max_examples=100)
        @given(plan=plans)
        def play(plan: Plan) -> None:
            proxy.faults.append(plan.faults)
            player = Player(plan, str(next(numbers)), proxy.url)
            if plan.corrupting:
                corrupted.update(player.prompts)
            run(backend, player.main, collect_garbage=True)
            proxy.wait_idle()  # or the client has left its socket open
            endings.update(player.endings)

        play()
    # The agent has stopped: it sees nothing more.
    seen = collections.Counter(each.text for each in server.received if isinstance(each, IM.UserMessage))
    assert {prompt for prompt, count in seen.items() if count > 1} <= corrupted
    assert {"completed", "left", "cancelled", "ConnectError", "Disconnected"} <= endings.keys()
    figure(", ".join(f"{count} {name}" for name, count in sorted(endings.items())))
