"""Agents in virtual time, for tests of the adaptive limit: what throughput it gives, and where it settles.

Prompts are never short: as many requests are in flight as the limit allows. Each is served by one of the
agent's servers, for a time drawn at random; what finds none free waits in the agent, or is answered that the
agent is busy.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Agent", "Fixed", "Run", "drive"]


class Limit(Protocol):
    """What an `AdaptiveLimit` is to the one who sends."""

    @property
    def limit(self) -> int: ...

    def succeeded(self, now: float, *, in_flight: int, sent: float, first_event: float | None) -> None: ...

    def busy(self, now: float, *, sent: float) -> None: ...


@dataclasses.dataclass
class Fixed:
    """A limit that stays what it is."""

    limit: int

    def succeeded(self, now: float, *, in_flight: int, sent: float, first_event: float | None) -> None:
        pass

    def busy(self, now: float, *, sent: float) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agent:
    """How an agent behaves; times are in seconds.

    * `servers`: how many requests it works on at once, at a time since the start.
    * `queues`: whether further ones wait in it; else they are answered that it is busy, after `busy_after`.
    * `first`, `rest`: the medians of the time to the first event, and from there to the end, at a time since
      the start. `streams`: whether the first event is seen.
    * `sigma`: how much both vary (lognormal).
    """

    servers: Callable[[float], float] = lambda now: math.inf
    queues: bool = False
    first: Callable[[float], float] = lambda now: 0.2
    rest: Callable[[float], float] = lambda now: 0.8
    streams: bool = True
    sigma: float = 0.1
    busy_after: float = 0.02


@dataclasses.dataclass
class Run:
    """What happened: when answers ended, how many were busy, and the limit over time."""

    ended: list[float] = dataclasses.field(default_factory=list)
    busy: list[float] = dataclasses.field(default_factory=list)
    limits: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def throughput(self, start: float, end: float) -> float:
        """Answers per second in a part of the run."""
        return sum(start <= moment < end for moment in self.ended) / (end - start)

    def wasted(self, start: float, end: float) -> float:
        """The share of busy answers in all answers."""
        busy = sum(start <= moment < end for moment in self.busy)
        return busy / (busy + sum(start <= moment < end for moment in self.ended))

    def limits_in(self, start: float, end: float) -> list[int]:
        """The limit, at each answer of a part of the run."""
        return [limit for moment, limit in self.limits if start <= moment < end]

    def reaches(self, limit: int) -> float:
        """When the limit was that much for the first time."""
        return next((moment for moment, each in self.limits if each >= limit), math.inf)


def drive(limit: Limit, agent: Agent, seconds: float, seed: int) -> Run:
    """Send for a time what `limit` allows."""
    drawn = random.Random(seed)
    run = Run()
    now = 0.0
    in_flight = serving = sequence = 0
    waiting: deque[float] = deque()  # when they were sent
    ends: list[tuple[float, int, float, float | None]] = []  # end, order, sent, first event (-1: busy)

    def serve(sent: float) -> None:
        nonlocal serving, sequence
        serving += 1
        sequence += 1
        first = now + agent.first(now) * math.exp(agent.sigma * drawn.gauss(0, 1))
        end = first + agent.rest(now) * math.exp(agent.sigma * drawn.gauss(0, 1))
        heapq.heappush(ends, (end, sequence, sent, first if agent.streams else None))

    while now < seconds:
        while in_flight < limit.limit:
            in_flight += 1
            if serving < agent.servers(now):
                serve(now)
            elif agent.queues:
                waiting.append(now)
            else:
                sequence += 1
                heapq.heappush(ends, (now + agent.busy_after, sequence, now, -1))
        now, _, sent, first = heapq.heappop(ends)
        if first == -1:
            limit.busy(now, sent=sent)
            run.busy.append(now)
        else:
            serving -= 1
            limit.succeeded(now, in_flight=in_flight, sent=sent, first_event=first)
            run.ended.append(now)
        run.limits.append((now, limit.limit))
        in_flight -= 1
        while waiting and serving < agent.servers(now):
            serve(waiting.popleft())
    return run
