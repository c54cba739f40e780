"""Carrying a plan out with steps that race, and what has to hold all the same."""

from __future__ import annotations

import contextlib
import dataclasses
from itertools import chain, repeat
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from anyagent.testing import MemoryPeer, memory_agent

from ..properties import settle
from . import plans
from .consumer import Consumer
from .ears import Ears
from .exact import LIMITS, LONGER_THAN_ALL_TIMEOUTS, TIMEOUTS
from .reference import LEFT, Event, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anyio.abc import TaskGroup

    from anyagent import Agent

    from .plans import Plan, Step, Wire

__all__ = ["race"]

_EVENTS: Final = ("text", "reasoning", "tool", "end", "error")


@dataclasses.dataclass
class _Answer:
    """What the agent has said about one request, up to the message that ended it.

    On a wire without cancel it goes on after an invalid message, to its terminal (`over`).
    """

    lane: str
    over: bool = False
    events: list[Event] = dataclasses.field(default_factory=list)
    end: Outcome | None = None


class _Racer:
    """Carries out steps without waiting for what follows from them. The agent answers only what it heard."""

    def __init__(self, agent: Agent, peer: MemoryPeer, wire: Wire, tasks: TaskGroup) -> None:
        self.consumers: list[Consumer] = []
        self.ears = Ears(peer, wire)
        self.dropped_out: set[int] = set()
        """Consumers that were told to leave."""
        self.may_fail = False
        """Whether something happened that may end the connection."""
        self.lasted = False
        """Whether the connection was there to the end of the plan, so that nothing was left unwritten."""
        self._agent = agent
        self._peer = peer
        self._wire = wire
        self._tasks = tasks
        self._payloads = 0
        self._answers: dict[int, _Answer] = {}

    @property
    def answers(self) -> dict[int, _Answer]:
        """What was said about each request that was heard, by its number."""
        for number, lane in self.ears.lanes.items():
            self._answers.setdefault(number, _Answer(lane))
        return self._answers

    async def do(self, step: Step) -> None:
        match step:
            case plans.Send():
                consumer = Consumer(self._agent, len(self.consumers))
                self.consumers.append(consumer)
                self._tasks.start_soon(consumer.run)
            case plans.Block():
                if self._peer.writable.is_set():
                    self._peer.writable = anyio.Event()
            case plans.Unblock():
                self._peer.writable.set()
            case plans.Advance():
                self.may_fail = self.may_fail or self._wire.names is not None
                await anyio.sleep(LONGER_THAN_ALL_TIMEOUTS)
            case plans.Arrive(says=says):
                messages = [message for say in says for message in self._messages(say)]
                with contextlib.suppress(anyio.BrokenResourceError):  # the client has closed
                    self._peer.send(*messages)
            case plans.Disconnect(code=code, violation=violation):
                self.may_fail = True
                with contextlib.suppress(anyio.BrokenResourceError):
                    self._peer.close(code, violation=violation)
            case _ if self.consumers:
                await self._consume(step)

    async def serve_all(self) -> None:
        """End every request, read every response to its end, and have one more request served."""
        self._peer.writable.set()
        await settle()
        while any(not answer.over for answer in self.answers.values()) and self._agent.in_flight:
            await self.do(plans.Arrive((plans.Say("end", 0),)))
            await settle()
        assert self._agent.in_flight == 0
        await self.read_all()
        await self.do(plans.Send())
        await settle()
        await self.do(plans.Arrive((plans.Say("text", 0), plans.Say("end", 0))))
        await self.read_all()
        last = self.answers.get(len(self.consumers) - 1)
        self.lasted = last is not None and self.consumers[-1].outcome == last.end
        assert self.lasted or self.may_fail

    async def read_all(self) -> None:
        for consumer in self.consumers:
            consumer.read(10 * LIMITS.response_events)
        await settle()

    def check(self, *, left_at_once: bool) -> None:
        """See whether each consumer has got what it was sent, and the agent what it has to be told."""
        for number, consumer in enumerate(self.consumers):
            answer = self.answers.get(number)
            if answer is None:
                assert consumer.events == []
                assert consumer.outcome == LEFT or self._ended_before_it_was_sent(consumer, left_at_once)
            else:
                events, sent = _flat(consumer.events), _flat(answer.events)
                assert events == sent[: len(events)]
                self._check(number, consumer, answer, left_at_once)
        stats = self._agent.stats
        assert stats.requests == stats.completed + stats.failed + stats.cancelled
        assert self._agent.in_flight == 0

    def _check(self, number: int, consumer: Consumer, answer: _Answer, left_at_once: bool) -> None:
        cancels = self.ears.heard.count(("CANCEL", number))
        assert cancels <= self._wire.cancel
        match consumer.outcome:
            case ("completed", _) | ("AgentError", _):
                assert consumer.outcome == answer.end
                assert _flat(consumer.events) == _flat(answer.events)
                assert cancels == 0
            case ("ProtocolError", str(), _):
                assert consumer.outcome == answer.end
                assert cancels == self._wire.cancel or not self.lasted
            case ("SlowConsumerError", "response_events", LIMITS.response_events):
                assert cancels == self._wire.cancel or not self.lasted
            case ("Disconnected", code, _, "sent" | "started"):
                assert self.may_fail or (left_at_once and code == 1000)
                assert cancels <= left_at_once
            case ("ProtocolError", None, _):
                assert self.may_fail
                assert cancels == 0
            case _:
                assert consumer.outcome == LEFT
                assert number in self.dropped_out
                assert cancels == self._wire.cancel or answer.end is not None or not self.lasted

    def _ended_before_it_was_sent(self, consumer: Consumer, left_at_once: bool) -> bool:
        """Whether the outcome is right for a request whose message the agent never received."""
        match consumer.outcome:
            case ("Disconnected", code, _, "not_sent" | "sent"):
                return self.may_fail or (left_at_once and code == 1000)
            case ("ProtocolError", None, _):
                return self.may_fail
            case _:
                return False

    async def _consume(self, step: Step) -> None:
        assert isinstance(step, plans.Read | plans.Cancel | plans.Close | plans.Drop)
        busy = [number for number, consumer in enumerate(self.consumers) if consumer.outcome is None]
        number = busy[-1 - step.back % len(busy)] if busy else 0
        consumer = self.consumers[number]
        match step:
            case plans.Read(count=count):
                consumer.read(count)
            case plans.Cancel():
                self.dropped_out.add(number)
                consumer.scope.cancel()
            case plans.Close() if consumer.response is not None:
                self.dropped_out.add(number)
                await consumer.response.aclose()
            case plans.Drop() if consumer.response is not None and consumer.orders == 0:
                self.dropped_out.add(number)
                consumer.drop()

    def _messages(self, say: plans.Say) -> Iterable[bytes]:
        """What the agent writes for `say`: nothing if it is about a request that the agent does not know."""
        self._payloads += 1
        payload = f"<{self._payloads}>"
        lane = None
        if say.back is None or say.back < 0:
            if self._wire.lane_field is None and say.kind in _EVENTS:
                return []  # it would be about whatever request is in flight
            self.may_fail = self.may_fail or say.kind not in ("status", "resize", "error", "unknown")
            lane = None if say.back is None else plans.STRAY
        else:
            known = [answer for answer in self.answers.values() if say.late or not answer.over]
            if not known or (say.late and self._wire.names is not None):
                return []  # the lane may be another's by now
            answer = known[-1 - say.back % len(known)]
            lane = answer.lane
            self.may_fail = self.may_fail or say.kind == "wrong field"  # it may be over by now
            self._record(answer, say.kind, payload)
        return [plans.Message(say.kind, lane, payload).encode(self._wire.lane_field)]

    def _record(self, answer: _Answer, kind: str, payload: str) -> None:
        if answer.end is None:
            match kind:
                case "end":
                    answer.end = ("completed", len(payload))
                case "error":
                    answer.end = ("AgentError", payload)
                case "wrong field":
                    answer.end = ("ProtocolError", answer.lane, 1002)
                case "text" | "reasoning" | "tool":
                    answer.events.append((kind, payload))
                case "unknown" if self._wire.lane_field is not None:
                    answer.events.append((kind, payload))
        answer.over = answer.over or kind in ("end", "error")


async def race(plan: Plan, pauses: list[int], wire: Wire, *, leave_at_once: bool) -> None:
    """Carry out `plan`, with `pauses` checkpoints after its steps, then none, and check what came of it."""
    async with anyio.create_task_group() as tasks:
        async with memory_agent(
            status=wire.status, dialect=wire.dialect, limits=LIMITS, timeouts=TIMEOUTS
        ) as (agent, peer):
            racer = _Racer(agent, peer, wire, tasks)
            tasks.start_soon(racer.ears.listen)
            for step, pause in zip(plan, chain(pauses, repeat(0)), strict=False):
                await racer.do(step)
                for _ in range(pause):
                    await anyio.lowlevel.checkpoint()
            if not leave_at_once:
                await racer.serve_all()
        await racer.read_all()
    racer.check(left_at_once=leave_at_once)


def _flat(events: list[Event]) -> list[Event]:
    """Chunks letter by letter, so that it makes no difference whether they have been merged."""
    return [
        (kind, part) for kind, text in events for part in (text if kind in ("text", "reasoning") else [text])
    ]
