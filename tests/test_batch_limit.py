"""The adaptive limit: where it settles, and what throughput it gives, with simulated agents; its bounds."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent.batch import Adaptive
from anyagent.batch._limit import AdaptiveLimit

from .agents_simulated import Agent, Fixed, drive
from .properties import REPEATABLE

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS: Final = range(5)
Call: TypeAlias = tuple[str, float, float, int]


def adaptive(initial: int = 16, minimum: int = 1, maximum: int = 1_000) -> AdaptiveLimit:
    return AdaptiveLimit(Adaptive(initial=initial, minimum=minimum, maximum=maximum), 0)


def constantly(value: float) -> Callable[[float], float]:
    return lambda now: value


def changing(at: float, before: float, after: float) -> Callable[[float], float]:
    return lambda now: before if now < at else after


def succeed(
    limit: AdaptiveLimit, now: float, *, took: float = 1.0, first: float | None = None, in_flight: int = 1_000
) -> None:
    """An answer ends, whose request took so long."""
    sent = now - took
    first_event = None if first is None else sent + first
    limit.succeeded(now, in_flight=in_flight, sent=sent, first_event=first_event)


@pytest.mark.parametrize("busy_after", [0.02, 1.0])
@pytest.mark.parametrize("sigma", [0.1, 1.0])
@pytest.mark.parametrize("servers", [1, 3, 10, 60, 200])
def test_it_settles_at_what_an_agent_takes_that_is_busy_beyond_it(
    servers: int, sigma: float, busy_after: float, figure: Callable[[str], None]
) -> None:
    agent = Agent(servers=constantly(servers), sigma=sigma, busy_after=busy_after)
    shares = []
    for seed in SEEDS:
        run, best = drive(adaptive(), agent, 60, seed), drive(Fixed(servers), agent, 60, seed)
        settled = run.limits_in(20, 60)
        assert 0.85 * servers <= statistics.median(settled) <= servers + 1
        assert max(settled) <= 2.2 * servers + 2
        assert run.wasted(20, 60) < 0.15 + 0.15 / servers
        assert run.throughput(0, 60) > 0.85 * best.throughput(0, 60)
        shares.append(run.throughput(20, 60) / best.throughput(20, 60))
        assert shares[-1] > 0.93
    figure(f"throughput {min(shares):.3f} of the best fixed limit's at least")


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("servers", [8, 20, 100, 300])
def test_it_settles_near_what_an_agent_works_on_that_queues_the_rest(
    servers: int, sigma: float, streams: bool, figure: Callable[[str], None]
) -> None:
    agent = Agent(servers=constantly(servers), queues=True, sigma=sigma, streams=streams)
    shares = []
    for seed in SEEDS:
        run, best = drive(adaptive(), agent, 120, seed), drive(Fixed(3 * servers), agent, 120, seed)
        most = max(3 * servers, 32)  # a few servers answer too seldom for more to be seen soon
        assert 0.7 * servers <= statistics.median(run.limits_in(40, 120)) <= most
        assert run.limits[-1][1] <= most
        shares.append(run.throughput(40, 120) / best.throughput(40, 120))
        assert shares[-1] > 0.9
    figure(f"throughput {min(shares):.3f} of the best at least")


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_an_agent_that_queues_far_less_than_the_initial_limit_is_not_run_to_the_maximum(servers: int) -> None:
    agent = Agent(servers=constantly(servers), queues=True)
    for seed in SEEDS:
        run, best = drive(adaptive(), agent, 600, seed), drive(Fixed(16), agent, 600, seed)
        assert max(run.limits_in(300, 600)) <= 24
        assert run.throughput(0, 600) > 0.95 * best.throughput(0, 600)


@pytest.mark.parametrize("first", [0.01, 0.2])
def test_how_long_the_rest_of_an_answer_takes_does_not_matter(first: float) -> None:
    agent = Agent(servers=constantly(40), queues=True, first=constantly(first), rest=constantly(2))
    for seed in SEEDS:
        run = drive(adaptive(), agent, 200, seed)
        assert 0.7 * 40 <= statistics.median(run.limits_in(80, 200)) <= 3 * 40


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0])
def test_without_any_bound_the_maximum_is_reached_within_ten_answers_time(
    sigma: float, streams: bool
) -> None:
    agent = Agent(sigma=sigma, streams=streams)
    for seed in SEEDS:
        assert drive(adaptive(), agent, 20, seed).reaches(900) < 10 * (1 + sigma)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("maximum", [8, 64, 400])
def test_noise_does_not_keep_it_down(maximum: int, sigma: float) -> None:
    agent = Agent(sigma=sigma, streams=False)
    for seed in SEEDS:
        limit = adaptive(initial=min(16, maximum), maximum=maximum)
        run, best = drive(limit, agent, 120, seed), drive(Fixed(maximum), agent, 120, seed)
        assert run.throughput(0, 120) > 0.85 * best.throughput(0, 120)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("servers", [20, 100])
def test_noise_and_a_queue_leave_four_fifths_of_the_throughput(servers: int, streams: bool) -> None:
    agent = Agent(servers=constantly(servers), queues=True, sigma=1, streams=streams)
    shares = []
    for seed in range(10):
        run, best = drive(adaptive(), agent, 200, seed), drive(Fixed(4 * servers), agent, 200, seed)
        shares.append(run.throughput(0, 200) / best.throughput(0, 200))
    assert statistics.mean(shares) > 0.85
    assert min(shares) > 0.8


@pytest.mark.parametrize("queues", [True, False])
def test_it_finds_out_that_an_agent_takes_more_and_that_it_takes_less(queues: bool) -> None:
    for seed in SEEDS:
        more = drive(adaptive(), Agent(servers=changing(60, 20, 100), queues=queues), 160, seed)
        assert statistics.median(more.limits_in(120, 160)) > 90
        less = drive(adaptive(), Agent(servers=changing(60, 100, 20), queues=queues), 160, seed)
        assert statistics.median(less.limits_in(120, 160)) < 60


def test_it_recovers_from_an_agent_that_was_busy_with_anything_for_a_while() -> None:
    agent = Agent(servers=lambda now: 0 if 30 <= now < 60 else 100)
    for seed in SEEDS:
        run = drive(adaptive(), agent, 130, seed)
        assert min(run.limits_in(30, 60)) == 1
        assert statistics.median(run.limits_in(100, 130)) > 85


@pytest.mark.parametrize("streams", [True, False])
def test_a_cut_for_an_agent_that_became_slower_by_itself_is_undone(streams: bool) -> None:
    agent = Agent(first=changing(30, 0.2, 1.6), sigma=0.3, streams=streams)
    for seed in SEEDS:
        run = drive(adaptive(maximum=200), agent, 90, seed)
        assert min(run.limits_in(30, 60)) < 200
        assert min(run.limits_in(60, 90)) == 200


def test_longer_answers_are_no_reason_to_cut() -> None:
    agent = Agent(rest=changing(30, 0.8, 8), sigma=0.3)
    for seed in SEEDS:
        assert min(drive(adaptive(maximum=200), agent, 90, seed).limits_in(20, 90)) == 200


def test_busy_answers_to_requests_sent_before_the_cut_count_once() -> None:
    limit = adaptive(initial=100)
    limit.busy(10, sent=9)
    assert limit.limit == 85
    for sent in (1, 9.5, 10):
        limit.busy(11, sent=sent)
    assert limit.limit == 85
    limit.busy(11, sent=10.5)
    assert limit.limit == 72


def test_answers_to_requests_sent_before_the_cut_are_no_reason_to_grow() -> None:
    limit = adaptive(initial=100)
    limit.busy(10, sent=9)
    for _ in range(1_000):
        succeed(limit, 10.5, took=1)
    assert limit.limit == 85
    for _ in range(100):
        succeed(limit, 11.5, took=1)
    assert limit.limit > 85


def test_it_does_not_grow_while_it_is_not_used() -> None:
    limit = adaptive(initial=100)
    for _ in range(1_000):
        succeed(limit, 10, in_flight=49)
    assert limit.limit == 100
    succeed(limit, 10, in_flight=50)
    assert limit.limit == 101


@pytest.mark.parametrize("took", [0.0, 1.0])
def test_answers_that_all_end_at_once_are_nothing_special(took: float) -> None:
    limit = adaptive(initial=1, maximum=50)
    for _ in range(1_000):
        succeed(limit, 10, took=took)
    assert limit.limit == 50


def test_one_answer_that_takes_very_long_is_not_taken_for_a_queue() -> None:
    limit = adaptive(initial=20, maximum=20)
    for number in range(1_000):
        succeed(limit, 1_000 + number / 20, took=600 if number % 100 == 99 else 1)
        assert limit.limit == 20


_calls: Final[st.SearchStrategy[Call]] = st.tuples(
    st.sampled_from(["succeeded", "succeeded", "succeeded at once", "busy"]),
    st.floats(0, 100),  # seconds since the call before it
    st.floats(0, 100),  # how long the request took
    st.integers(1, 60),  # how often in a row; in flight
)


@settings(REPEATABLE, max_examples=200)
@given(
    st.tuples(*[st.integers(1, 60)] * 3).map(sorted),
    st.lists(_calls, max_size=30),
)
def test_whatever_happens_it_stays_within_its_bounds_and_gets_away_from_the_minimum(
    bounds: list[int], calls: list[Call]
) -> None:
    minimum, initial, maximum = bounds
    limit = adaptive(initial, minimum, maximum)
    now = 0.0
    for name, passed, took, count in calls:
        for _ in range(count):
            before = limit.limit
            match name:
                case "succeeded":
                    now += passed
                    succeed(limit, now, took=took, first=took / 2, in_flight=count)
                case "succeeded at once":
                    succeed(limit, now, took=took, in_flight=count)
                case "busy":
                    limit.busy(now, sent=now - took)
                    assert limit.limit <= before
            assert minimum <= limit.limit <= maximum

    for _ in range(200):  # rounds in which the agent is well
        now += 1.001
        for _ in range(limit.limit):
            succeed(limit, now, took=1, first=0.1, in_flight=limit.limit)
    assert limit.limit == maximum
