"""The settings: their defaults, and that a wrong value is refused when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import Backoff, Heartbeat, Limits, Timeouts

from .properties import REPEATABLE

DEFAULTS: dict[type[Any], dict[str, Any]] = {
    Limits: {
        "in_flight": 1_000,
        "message_size": 2**24,
        "response_events": 65_536,
        "response_bytes": 2**24,
        "overflow": "fail",
    },
    Timeouts: {"connect": 10, "close": 5, "drain": 30},
    Heartbeat: {"interval": 20, "timeout": 20},
    Backoff: {"initial": 0.5, "maximum": 30, "attempts": None, "healthy": 30},
}
NOT_NUMBERS = ((Limits, "overflow"), (Backoff, "attempts"))  # "attempts" is one only if it is given
FIELDS = [(kind, name) for kind, defaults in DEFAULTS.items() for name in defaults]
NUMBERS = [field for field in FIELDS if field not in NOT_NUMBERS]
INTEGERS = [*((kind, name) for kind, name in NUMBERS if kind is Limits), (Backoff, "attempts")]
SECONDS = [(kind, name) for kind, name in NUMBERS if kind is not Limits]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_defaults(kind: type[Any]) -> None:
    assert dataclasses.asdict(kind()) == DEFAULTS[kind]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
@pytest.mark.parametrize("value", [0, -1, True, False, None, "1", "", math.nan, math.inf, -math.inf, [1], 1j])
def test_a_wrong_value_is_refused_and_named(kind: type[Any], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}\\.{name} must be a positive") as caught:
        kind(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1"])
def test_a_number_of_attempts_is_a_positive_integer_if_there_is_one(value: object) -> None:
    with pytest.raises(ValueError, match=r"^Backoff\.attempts must be a positive integer"):
        Backoff(attempts=value)  # type: ignore[arg-type]  # which is the point


@pytest.mark.parametrize("value", ["", "Fail", "drop", None, 1, True])
def test_an_overflow_is_one_of_two_words(value: object) -> None:
    with pytest.raises(ValueError, match=r"^Limits\.overflow must be 'fail' or 'block', not ") as caught:
        Limits(overflow=value)  # type: ignore[arg-type]  # which is the point
    assert repr(value) in str(caught.value)
    assert Limits(overflow="block").overflow == "block"


@settings(REPEATABLE)
@given(initial=st.floats(1e-3, 1e3), maximum=st.floats(1e-3, 1e3), number=st.integers(1, 10_000))
def test_the_bound_of_a_wait_doubles_up_to_the_maximum(initial: float, maximum: float, number: int) -> None:
    backoff = Backoff(initial=initial, maximum=maximum)
    assert backoff.bound(1) == min(initial, maximum)
    assert backoff.bound(number) <= backoff.bound(number + 1) <= maximum
    assert backoff.bound(number + 1) in (maximum, 2 * backoff.bound(number))


@pytest.mark.parametrize(("kind", "name"), INTEGERS)
@pytest.mark.parametrize("value", [0.5, 1.0, 1e6])
def test_a_limit_is_an_integer(kind: type[Any], name: str, value: float) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), INTEGERS)
@settings(REPEATABLE, max_examples=20)
@given(value=st.integers(min_value=1))
def test_any_positive_integer_is_a_limit(kind: type[Any], name: str, value: int) -> None:
    assert dataclasses.asdict(kind(**{name: value})) == {**DEFAULTS[kind], name: value}


@pytest.mark.parametrize(("kind", "name"), SECONDS)
@settings(REPEATABLE, max_examples=20)
@given(value=st.integers(1, 10**9) | st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_positive_number_is_a_time(kind: type[Any], name: str, value: float) -> None:
    assert dataclasses.asdict(kind(**{name: value})) == {**DEFAULTS[kind], name: value}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_settings_are_immutable_values_that_are_given_by_name(kind: type[Any]) -> None:
    value = kind()
    for name, default in DEFAULTS[kind].items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, default)
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(value, **{name: 0})
    with pytest.raises(TypeError):
        kind(1)
    with pytest.raises(TypeError):
        kind(unknown=1)
    assert not hasattr(value, "__dict__")
    assert value == kind()
    assert hash(value) == hash(kind())
