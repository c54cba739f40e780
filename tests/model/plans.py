"""Plans: what an application and an agent do to one connection, as data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from hypothesis import strategies as st

from anyagent import OM

from ..three_lanes import ThreeLanes

if TYPE_CHECKING:
    from anyagent.dialects import Dialect

__all__ = [
    "STRAY",
    "WIRES",
    "Advance",
    "Arrive",
    "Block",
    "Cancel",
    "Close",
    "Disconnect",
    "Drop",
    "Message",
    "Plan",
    "Read",
    "Say",
    "Send",
    "Step",
    "Unblock",
    "Wire",
    "plans",
]


@dataclasses.dataclass(frozen=True)
class Wire:
    """A kind of connection.

    * `features`: what the agent's first status lists.
    * `lane_field`: the field in which a message names its lane, ``None`` if it does not.
    * `names`: of its lanes, ``None`` if every request gets a new one.
    * `dialect`: what the client is told to speak, ``None`` if the status settles it.
    """

    features: tuple[str, ...]
    lane_field: str | None
    names: tuple[str, ...] | None
    dialect: Dialect | None = None

    @property
    def status(self) -> OM.Status:
        return OM.Status("ready", self.features)

    @property
    def cancel(self) -> bool:
        """Whether the agent can be told to stop."""
        return "cancel" in self.features


WIRES: Final = {
    "native": Wire(("ids", "cancel"), "id", None),
    "ids only": Wire(("ids",), "id", None),
    "single": Wire((), None, ("",)),
    "three lanes": Wire((), "lane", ThreeLanes.lanes, ThreeLanes()),
}

FAREWELL: Final = 500
"""Seconds that an agent still takes after its farewell."""

STRAY: Final = "nobody"
"""A lane that no request ever has."""


@dataclasses.dataclass(frozen=True)
class Say:
    """The agent says something about a request.

    It is the one that is `back` from the newest of those in flight (modulo their number), or of all if
    `late` or if there are none. ``None``: it names no request, and ``-1``: it names one that never was.
    """

    kind: str
    back: int | None
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of the agent: a `Say` whose request has been made a lane, with a `payload` of its own."""

    kind: str
    lane: str | None
    payload: str

    def encode(self, lane_field: str | None) -> bytes:
        if self.kind == "not JSON":
            return b'{"type":'
        if self.kind == "not UTF-8":
            return b'{"type":"STATUS","state":"\xff"}'
        fields = self._fields()
        if self.lane is not None and lane_field is not None:
            fields[lane_field] = self.lane
        return msgspec.json.encode(fields)

    def _fields(self) -> dict[str, object]:
        match self.kind:
            case "text":
                return {"type": "AGENT_EVENT_TEXT_CHUNK", "text": self.payload}
            case "reasoning":
                return {"type": "AGENT_EVENT_REASONING_CHUNK", "text": self.payload}
            case "tool":
                return {
                    "type": "AGENT_EVENT_TOOL_CALL",
                    "call_id": self.payload,
                    "name": "tool",
                    "arguments": "{}",
                }
            case "end":
                return {"type": "AGENT_EVENT_END", "tokens_used": len(self.payload)}
            case "error":
                return {"type": "ERROR", "code": self.payload, "details": "it failed"}
            case "unknown":
                return {"type": self.payload}
            case "status":
                return {"type": "STATUS", "state": self.payload}
            case "resize":
                return {"type": "STATUS", "state": self.payload, "max_in_flight": 2}
            case "graceful":
                return {"type": "GRACEFUL_DISCONNECT", "reason": self.payload}
            case "graceful with deadline":
                return {"type": "GRACEFUL_DISCONNECT", "deadline": FAREWELL}
            case _:
                assert self.kind == "wrong field"
                return {"type": "AGENT_EVENT_TEXT_CHUNK", "text": 5}


@dataclasses.dataclass(frozen=True)
class Send:
    """One more consumer sends a message, and then reads when it is told to."""


@dataclasses.dataclass(frozen=True)
class Arrive:
    """Messages arrive from the agent, all in one batch."""

    says: tuple[Say, ...]


@dataclasses.dataclass(frozen=True)
class Read:
    """The consumer `back` from the newest that is not done iterates `count` times."""

    back: int
    count: int


@dataclasses.dataclass(frozen=True)
class Cancel:
    """The cancel scope around the consumer `back` from the newest that is not done is cancelled."""

    back: int


@dataclasses.dataclass(frozen=True)
class Close:
    """The response of the consumer `back` is closed, whether its consumer is waiting for it or not."""

    back: int


@dataclasses.dataclass(frozen=True)
class Drop:
    """The consumer `back` from the newest that is not done lets go of the response without closing it."""

    back: int


@dataclasses.dataclass(frozen=True)
class Disconnect:
    """The agent's end of the connection ends."""

    code: int
    violation: bool = False


@dataclasses.dataclass(frozen=True)
class Advance:
    """Time passes, more than all timeouts."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The connection takes no more bytes; a message that is sent meanwhile is stuck in the middle."""


@dataclasses.dataclass(frozen=True)
class Unblock:
    """The connection takes bytes again."""


Step: TypeAlias = Send | Arrive | Read | Cancel | Close | Drop | Disconnect | Advance | Block | Unblock
Plan: TypeAlias = list[Step]

_back = st.integers(0, 4)
_events = st.sampled_from(["text"] * 4 + ["reasoning", "tool", "end", "error", "unknown"])
_harmless = st.sampled_from(
    [
        *(Say("status", None), Say("resize", None), Say("error", None), Say("unknown", None)),
        *(Say(kind, -1) for kind in ("text", "end", "error", "unknown")),
    ]
)
_fatal = st.sampled_from(
    [
        *(Say(kind, None) for kind in ("text", "tool", "end", "wrong field", "not JSON", "not UTF-8")),
        *(Say("wrong field", -1), Say("wrong field", 1, late=True)),
    ]
)
_farewells = st.sampled_from([Say("graceful", None), Say("graceful with deadline", None)])
_disconnects = st.sampled_from(
    [Disconnect(1000), Disconnect(1011), Disconnect(1006), Disconnect(1002, violation=True)]
)


def _weighted(*choices: tuple[int, st.SearchStrategy[Step]]) -> st.SearchStrategy[Step]:
    drawn = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(drawn) - 1).flatmap(lambda index: drawn[index])


@st.composite
def _say(draw: st.DrawFn) -> Say:
    match draw(st.integers(0, 14)):
        case 0:
            return draw(_harmless)
        case 1:
            return Say(draw(_events), draw(_back), late=True)
        case 2:
            return Say(draw(st.sampled_from(["status", "status", "wrong field"])), draw(_back))
        case _:
            return Say(draw(_events), draw(_back))


_says = st.lists(_say(), min_size=1, max_size=4).map(tuple)
_step = _weighted(
    (4, st.just(Send())),
    (6, st.builds(Arrive, _says)),
    (4, st.builds(Read, _back, st.integers(1, 4))),
    (1, st.builds(Cancel, _back)),
    (1, st.builds(Close, _back)),
    (1, st.builds(Drop, _back)),
    (1, st.sampled_from([Advance(), Block(), Unblock()])),
)


def _steps(longest: int) -> st.SearchStrategy[Plan]:
    return st.integers(0, longest).flatmap(lambda size: st.lists(_step, min_size=size, max_size=longest))


_around = st.lists(_say(), max_size=2)


def _among_others(say: st.SearchStrategy[Say]) -> st.SearchStrategy[Arrive]:
    return st.builds(lambda before, fatal, after: Arrive((*before, fatal, *after)), _around, say, _around)


_ends_of_connection: Final[list[st.SearchStrategy[Step]]] = [
    _among_others(_farewells),
    _disconnects,
    _among_others(_fatal),
]


@st.composite
def _plan(draw: st.DrawFn) -> Plan:
    """Much happens; then, perhaps, the connection ends, for one reason or two, and more happens."""
    plan = draw(_steps(25))
    for _ in range(draw(st.integers(0, 2))):
        plan.append(draw(draw(st.sampled_from(_ends_of_connection))))
        plan += draw(_steps(5))
    return plan


plans: Final = _plan()
