"""The one place in a cluster that says how much all predictors together may ask.

It knows nothing of Ray: `anyagent.ray` makes an actor of it. All its methods may be called in any order and
at the same time; what is told to a member or by one is a sum since it joined, so that what comes late, or
twice, does no harm.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from ..batch._rates import RateGate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from ..batch import Rates

__all__ = ["UNLIMITED", "Governor", "Told", "shares"]

UNLIMITED: Final = 2**40  # permits: as many as anybody could want

_GRACE: Final = 1.0  # seconds from a member's death until the agent has surely seen its connections end
_LINGER: Final = 60.0  # seconds without a member
_GONE: Final = "this predictor was taken for dead: what it holds of the totals is in use elsewhere"
_GATHERING: Final = 0.02  # seconds in which attempts are gathered that may be sent


class Told(NamedTuple):
    """What a member is told: `granted` permits since it joined, and a `limit` to how many it may use of those
    that it has. The higher the `version`, the newer.
    """

    version: int
    granted: int
    limit: int


class Governor:
    """Shares `in_flight` permits and the attempts that `rates` allow among the members.

    Permits are granted as members want them; once they want more than there are, in equal shares, and whoever
    has more than its share is told to return what becomes free. Those that are out, with those of members
    that died less than `grace` seconds ago, are never more than `in_flight`. `on_end` is called, in a thread,
    once there was no member for `linger` seconds.
    """

    def __init__(
        self,
        in_flight: int | None,
        rates: Rates | None,
        on_end: Callable[[], object],
        *,
        grace: float = _GRACE,
        linger: float = _LINGER,
    ) -> None:
        self._totals = (in_flight, rates)
        self._permits = UNLIMITED if in_flight is None else in_flight
        self._gate = None if rates is None else RateGate(rates)
        self._on_end = on_end
        self._grace = grace
        self._linger = linger
        self._members: dict[str, _Member] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._stays: dict[str, asyncio.Event] = {}
        self._end: threading.Timer | None = None
        self._end_unless_joined()

    async def stay(self, member: str) -> None:
        """Return when `member` leaves. Its caller's death is what makes it known to the others."""
        try:
            await self._stays.setdefault(member, asyncio.Event()).wait()
        finally:
            del self._stays[member]

    async def join(
        self, member: str, in_flight: int | None, rates: Rates | None, presence: Sequence[Awaitable[object]]
    ) -> None:
        """Take in `member`, for as long as its one `presence` lasts; for the grace, too, if that fails.

        `ValueError`: the totals are not those of the governor.
        """
        if (in_flight, rates) != self._totals:
            raise ValueError("predictors that share a governor must have the same totals")
        if member not in self._members:
            self._members[member] = _Member()
            self._cancel_end()
            watch = asyncio.create_task(self._watch(member, presence[0]))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)

    async def leave(self, member: str) -> None:
        """`member`, which has nothing in flight any more, is gone."""
        self._stays.setdefault(member, asyncio.Event()).set()
        self._remove(member)

    async def tell(
        self, member: str, number: int, returned: int, wanted: int, ended: Sequence[int | None]
    ) -> None:
        """How things are with `member`, for the `number`-th time.

        It has `returned` permits since it joined and could use `wanted`; attempts have `ended` that had been
        let through, with so many tokens used. `LookupError`: it is no member.
        """
        state = self._member(member)
        if number <= state.number:
            return
        state.number, state.returned, state.wanted = number, returned, wanted
        self._ended(state, ended)
        self._share_out()

    async def listen(self, member: str, version: int) -> Told:
        """What `member` is to know, once that is newer than `version`. `LookupError`: it is no member."""
        state = self._member(member)
        while state.version <= version and not state.gone:
            await state.changed.wait()
        return Told(state.version, state.granted, state.limit)

    async def take(self, member: str, wanted: int) -> int:
        """Wait until `member` may send an attempt, by the rates; returns how many, at most `wanted`.

        `LookupError`: it is no member.
        """
        assert self._gate is not None
        state = self._member(member)
        await self._gate.enter()
        state.entered += 1
        count = 1
        with anyio.move_on_after(_GATHERING):
            while count < wanted and not state.gone:
                await self._gate.enter()
                state.entered += 1
                count += 1
        if not state.gone:
            return count
        self._ended(state, [None] * count)
        return 0

    def _member(self, member: str) -> _Member:
        try:
            return self._members[member]
        except KeyError:
            raise LookupError(_GONE) from None

    def _ended(self, state: _Member, ended: Sequence[int | None]) -> None:
        if self._gate is not None:
            state.entered -= len(ended)
            for tokens_used in ended:
                self._gate.leave(tokens_used)

    async def _watch(self, member: str, presence: Awaitable[object]) -> None:
        try:
            await presence
        except Exception:
            await asyncio.sleep(self._grace)
        self._remove(member)

    def _remove(self, member: str) -> None:
        state = self._members.pop(member, None)
        if state is not None:
            state.gone = True
            self._ended(state, [None] * state.entered)
            state.changed.set()
            self._share_out()
            if not self._members:
                self._end_unless_joined()

    def _share_out(self) -> None:
        targets = shares(self._permits, {name: state.wanted for name, state in self._members.items()})
        free = self._permits - sum(state.held for state in self._members.values())
        for name, state in self._members.items():
            target = targets[name]
            granted = min(target - state.held, free) if state.wanted > state.held else 0
            granted = max(granted, 0)
            free -= granted
            state.granted += granted
            limit = target if target < state.held else UNLIMITED
            if granted or limit != state.limit:
                state.limit = limit
                state.version += 1
                state.changed.set()
                state.changed = asyncio.Event()

    def _end_unless_joined(self) -> None:
        self._end = threading.Timer(self._linger, self._on_end)
        self._end.daemon = True
        self._end.start()

    def _cancel_end(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None


class _Member:
    """A member as the governor knows it; it has at most `held` permits."""

    def __init__(self) -> None:
        self.number = 0
        self.granted = 0
        self.returned = 0
        self.wanted = 0
        self.limit = UNLIMITED
        self.entered = 0  # attempts that were let through and have not ended
        self.version = 0
        self.gone = False
        self.changed = asyncio.Event()

    @property
    def held(self) -> int:
        return self.granted - self.returned


def shares(permits: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """How many permits each is to have: what it wants or an equal share, and a part of what is left."""
    left = permits
    result = {}
    for place, name in enumerate(sorted(wanted, key=wanted.__getitem__)):
        result[name] = min(wanted[name], left // (len(wanted) - place))
        left -= result[name]
    return {name: share + left // len(wanted) for name, share in result.items()}
