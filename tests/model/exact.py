"""Carrying a plan out on a real session, as its application and as its agent, with a `Model` beside it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import anyio

from anyagent import OM, Agent, Limits, Timeouts
from anyagent.testing import MemoryPeer, memory_agent

from ..properties import settle
from . import plans
from .consumer import Consumer
from .ears import Ears
from .reference import IN_FLIGHT, NO_LANE, RESPONSE_EVENTS, Model, ModelRequest

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from .plans import Plan, Step, Wire

__all__ = ["LIMITS", "LONGER_THAN_ALL_TIMEOUTS", "TIMEOUTS", "play"]

LIMITS: Final = Limits(in_flight=IN_FLIGHT, response_events=RESPONSE_EVENTS)
TIMEOUTS: Final = Timeouts(drain=1_000, close=1_000)
LONGER_THAN_ALL_TIMEOUTS: Final = 5_000


class Player:
    """Carries out steps on a real session and on a `Model`, and holds one against the other after each."""

    def __init__(
        self, agent: Agent, peer: MemoryPeer, wire: Wire, notices: list[OM.ServerMessage], tasks: TaskGroup
    ) -> None:
        self.model = Model(wire)
        self.ears = Ears(peer, wire)
        self._agent = agent
        self._peer = peer
        self._wire = wire
        self._notices = notices
        self._tasks = tasks
        self._consumers: list[Consumer] = []
        self._compared = 0
        self._payloads = 0

    async def do(self, step: Step) -> None:
        """Carry out `step`, let everything happen that follows, and compare."""
        match step:
            case plans.Send():
                self._send()
                self.model.send()
            case plans.Block():
                if self.model.can_block():
                    self._peer.writable = anyio.Event()
                    self._send()
                    self.model.block()
            case plans.Unblock():
                self._peer.writable.set()
                self.model.unblock()
            case plans.Advance():
                await anyio.sleep(LONGER_THAN_ALL_TIMEOUTS)
                self.model.advance()
            case plans.Arrive() | plans.Disconnect() if self.model.failure is not None:
                pass
            case plans.Arrive(says=says):
                messages = [self._message(say) for say in says]
                self._peer.send(*(message.encode(self._wire.lane_field) for message in messages))
                self.model.arrive(messages)
            case plans.Disconnect(code=code, violation=violation):
                self._peer.close(code, violation=violation)
                self.model.disconnect(code, violation)
            case _ if self._consumers:
                await self._consume(step)
        await settle()
        self.compare()

    async def serve_all(self) -> None:
        """End every request, read every response to its end, and have one more request served."""
        await self.do(plans.Unblock())
        while self.model.live:
            in_flight = range(len(self.model.live))
            await self.do(plans.Arrive(tuple(plans.Say("end", back) for back in in_flight)))
        await self.read_all()
        assert self._agent.in_flight == 0
        await self.do(plans.Send())
        await self.do(plans.Arrive((plans.Say("text", 0), plans.Say("end", 0))))
        await self.do(plans.Read(0, 2))
        assert self._consumers[-1].outcome is not None
        assert self.model.failure is not None or len(self._consumers[-1].events) == 1

    async def read_all(self) -> None:
        """Read every response to its end, of which there has to be one."""
        for _ in self._consumers:
            await self.do(plans.Read(0, 3 * RESPONSE_EVENTS))
        assert None not in [consumer.outcome for consumer in self._consumers]

    def compare(self) -> None:
        """Hold the session against the model."""
        model = self.model
        requests = model.requests
        assert [consumer.outcome for consumer in self._consumers] == [request.outcome for request in requests]
        assert [consumer.events for consumer in self._consumers] == [request.yielded for request in requests]
        assert self._agent.in_flight == len(model.live)
        stats = dataclasses.asdict(self._agent.stats)
        assert {name: stats[name] for name in model.stats} == model.stats
        assert [type(notice).__name__ for notice in self._notices] == model.notices
        assert self._peer.close_code == model.close_code
        # Tasks that were given a lane at the same time queue their messages in any order.
        assert sorted(self.ears.heard[self._compared :]) == sorted(model.written[self._compared :])
        assert all(lane == requests[number].lane for number, lane in self.ears.lanes.items())
        self._compared = len(model.written)

    def _send(self) -> None:
        consumer = Consumer(self._agent, len(self._consumers))
        self._consumers.append(consumer)
        self._tasks.start_soon(consumer.run)

    async def _consume(self, step: Step) -> None:
        assert isinstance(step, plans.Read | plans.Cancel | plans.Close | plans.Drop)
        busy = [request for request in self.model.requests if request.outcome is None]
        number = _pick(busy or self.model.requests, step.back).number
        consumer, request = self._consumers[number], self.model.requests[number]
        match step:
            case plans.Read(count=count):
                consumer.read(count)
                self.model.read(request, count)
            case plans.Cancel():
                consumer.scope.cancel()
                self.model.cancel(request)
            case plans.Close() if consumer.response is not None:
                await consumer.response.aclose()
                self.model.close(request)
            case plans.Drop() if (
                consumer.response is not None and request.outcome is None and not request.reads
            ):
                expected = [] if request.closed else ["ResourceWarning"]
                assert consumer.drop() == expected
                self.model.cancel(request)

    def _message(self, say: plans.Say) -> plans.Message:
        self._payloads += 1
        payload = f"<{self._payloads}>"
        if say.back is None:
            return plans.Message(say.kind, None, payload)
        if say.back < 0 or not self._consumers:
            return plans.Message(say.kind, plans.STRAY, payload)
        in_flight = [] if say.late else list(self.model.live.values())
        lane = _pick(in_flight or self.model.requests, say.back).lane
        return plans.Message(say.kind, plans.STRAY if lane == NO_LANE else lane, payload)


async def play(plan: Plan, wire: Wire, *, leave_at_once: bool) -> None:
    """Carry out `plan`; then see every request to its end, or leave the agent with them in flight."""
    notices: list[OM.ServerMessage] = []
    async with anyio.create_task_group() as tasks:
        async with memory_agent(
            status=wire.status,
            dialect=wire.dialect,
            limits=LIMITS,
            timeouts=TIMEOUTS,
            on_notice=notices.append,
        ) as (agent, peer):
            player = Player(agent, peer, wire, notices, tasks)
            tasks.start_soon(player.ears.listen)
            for step in plan:
                await player.do(step)
            if not leave_at_once:
                await player.serve_all()
        player.model.leave()
        await player.read_all()
        player.compare()


def _pick(requests: list[ModelRequest], back: int) -> ModelRequest:
    return requests[-1 - back % len(requests)]
