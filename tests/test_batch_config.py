"""The settings of a batch: a wrong one is refused when they are made, and none shows a secret."""

from __future__ import annotations

import dataclasses
import math
import pickle
import ssl
from typing import Any

import pytest

from anyagent import Backoff, Heartbeat, Limits, Timeouts
from anyagent.batch import Adaptive, AttemptTimeouts, BatchConfig, Rates, Retry
from anyagent.batch._config import label_of
from anyagent.dialects import SINGLE

URL = "ws://agent/"
SECURE = "wss://agent/"
NOT_POSITIVE = [0, -1, True, False, "1", "", math.nan, math.inf, -math.inf, [1], 1j]
NOT_COUNTS = [*NOT_POSITIVE, None, 1.0, 0.5]
SECRET = "s3cr3t"


async def renew(cause: Exception | None) -> None: ...


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize("name", ["initial", "minimum", "maximum"])
def test_an_adaptive_limit_is_a_positive_integer(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^Adaptive\.{name} must be a positive integer"):
        Adaptive(**{name: value})  # type: ignore[arg-type]  # which is the point, here and below


@pytest.mark.parametrize(
    "values", [{"initial": 1_001}, {"minimum": 17}, {"maximum": 15}, {"minimum": 3, "initial": 2}]
)
def test_adaptive_limits_are_in_order(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="minimum <= initial <= maximum"):
        Adaptive(**values)
    Adaptive(minimum=5, initial=5, maximum=5)


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
def test_a_rate_is_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Rates\.{name} must be a positive, finite number, not "):
        Rates(**{name: value})
    assert getattr(Rates(**{name: 0.5}), name) == 0.5


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize("name", ["total", "first_event", "idle"])
def test_a_timeout_is_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^AttemptTimeouts\.{name} must be a positive, finite number"):
        AttemptTimeouts(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[({"safety": value}, "safe") for value in ("", "Safe", None, True, 1)],
        *[({"codes": value}, "collection") for value in ("busy", b"busy", 429, None, iter(["busy"]))],
        *[({"attempts": value}, "attempts must be a positive integer") for value in NOT_COUNTS],
        *[({"initial": value}, "initial must be a positive") for value in [*NOT_POSITIVE, None]],
        *[({"maximum": value}, "maximum must be a positive") for value in [*NOT_POSITIVE, None]],
    ],
)
def test_how_to_try_again_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retry(**values)


def test_the_wait_before_a_try_again_doubles_up_to_the_maximum() -> None:
    retry = Retry(initial=1, maximum=10)
    assert [retry.bound(number) for number in (1, 2, 3, 4, 5, 10_000)] == [1, 2, 4, 8, 10, 10]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("connections", NOT_COUNTS),
        ("window", NOT_COUNTS),
        ("in_flight", NOT_COUNTS),
        ("max_errors", [-1, True, False, 0.0, 1.5, "1", math.nan, math.inf, [1]]),
        ("max_error_rate", [-0.1, 1, 1.5, True, False, "0.1", math.nan, math.inf, [0.1], 1j]),
        ("retry", ["", "Safe", None, 5, True]),
        ("rates", [None, 60, "60"]),
        ("timeouts", [None, 60, Timeouts()]),
        ("limits", [None, 60]),
        ("connection_timeouts", [None, 60, AttemptTimeouts()]),
        ("reconnect", [None, True, 10, Retry()]),
        ("heartbeat", [0, 20, True, Backoff()]),
        ("ordered", [None, 1, "yes"]),
        ("dialect", ["", "other", 5]),
        ("agent", [5, b"agent"]),
        ("on_reconnect", [5, "renew"]),
        ("headers", [{"a b": "c"}, {"a": "b\r\nc"}, {"a": 1}, {"Host": "b"}]),
    ],
)
def test_a_wrong_value_is_refused_at_once(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"(?i){name.removesuffix('s')}"):
            BatchConfig(URL, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "",
        [],
        (),
        "http://agent/",
        "ws://",
        "ws://agent:0/",
        "ws://a b/",
        ["ws://a/", "b"],
        [URL, "ws://b/", URL],
        iter([]),
    ],
)
def test_the_addresses_are_checked(url: Any) -> None:
    with pytest.raises(ValueError, match=r"URL"):
        BatchConfig(url)


@pytest.mark.parametrize("url", [None, 5, b"ws://agent/", [5], [None], ["ws://a/", b"ws://b/"]])
def test_an_address_of_the_wrong_type_is_a_type_error_as_elsewhere(url: Any) -> None:
    with pytest.raises(TypeError):
        BatchConfig(url)


def test_addresses_may_come_from_an_iterator_and_are_kept() -> None:
    urls = ["ws://a/", "ws://b/"]
    from_list, from_iterator = BatchConfig(urls), BatchConfig(iter(urls))
    urls.append("ws://c/")
    assert from_list.urls == from_iterator.urls == ("ws://a/", "ws://b/")
    assert from_list == from_iterator
    assert BatchConfig(URL).urls == (URL,)


def test_headers_may_come_from_an_iterator_and_are_kept() -> None:
    pairs = [("A", "b"), ("A", "c")]
    assert BatchConfig(URL, headers=iter(pairs)).headers == tuple(pairs)
    assert BatchConfig(URL, headers=dict(pairs)).headers == {"A": "c"}
    assert BatchConfig(URL, headers=[]).headers == ()


def test_an_ssl_context_is_for_the_addresses_that_ask_for_tls() -> None:
    context = ssl.create_default_context()
    config = BatchConfig([URL, SECURE, "WSS://other/"], ssl_context=context)
    assert [config.ssl_context_of(url) for url in config.urls] == [None, context, context]
    with pytest.raises(ValueError, match="ssl_context needs a wss:// URL"):
        BatchConfig(URL, ssl_context=context)
    for url in (URL, SECURE):
        with pytest.raises((TypeError, ValueError), match="ssl_context"):
            BatchConfig(url, ssl_context=True)  # type: ignore[arg-type]


def test_everything_right_is_taken() -> None:
    for dialect in (None, "native", "single", SINGLE):
        BatchConfig(URL, dialect=dialect, heartbeat=None, on_reconnect=renew)
    BatchConfig(URL, max_errors=0, max_error_rate=0.999, window=1, connections=1, in_flight=1)
    assert BatchConfig(URL, retry="idempotent").retries == Retry(safety="idempotent")
    assert BatchConfig(URL, retry=(retry := Retry(attempts=1))).retries is retry


def test_the_defaults_are_those_that_are_documented() -> None:
    config = BatchConfig(URL)
    assert (config.connections, config.window, config.ordered) == (1, 10_000, False)
    assert (config.in_flight, config.rates) == (Adaptive(initial=16, minimum=1, maximum=1_000), Rates())
    assert (config.max_errors, config.max_error_rate) == (None, None)
    assert config.timeouts == AttemptTimeouts(total=None, first_event=None, idle=600)
    assert config.retries == Retry(safety="safe", attempts=5, initial=0.5, maximum=30)
    assert config.reconnect == Backoff(attempts=10)


def test_agents_are_called_by_their_addresses_without_what_is_secret_in_any_order() -> None:
    a, b = f"ws://{SECRET}:{SECRET}@a/x?{SECRET}={SECRET}", "wss://[::1]:8000/y"
    assert label_of(a) == "a:80/x"
    assert label_of(b) == "[::1]:8000/y"
    assert BatchConfig([a, b]).agent_name == BatchConfig([b, a]).agent_name == "[::1]:8000/y a:80/x"
    assert BatchConfig(a, agent="mine").agent_name == "mine"


def test_the_settings_are_an_immutable_value() -> None:
    config = BatchConfig(URL, headers={"A": "b"})
    assert config == BatchConfig(URL, headers={"A": "b"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="window"):
        dataclasses.replace(config, window=0)


def test_the_settings_go_through_pickle() -> None:
    config = BatchConfig(
        [URL, SECURE],
        headers=iter([("A", "b")]),
        dialect="native",
        limits=Limits(message_size=5),
        connection_timeouts=Timeouts(close=1),
        heartbeat=Heartbeat(interval=1),
        on_reconnect=renew,
        in_flight=Adaptive(maximum=16),
        rates=Rates(tokens_per_minute=5),
        retry=Retry(codes={"busy", 5}),
        timeouts=AttemptTimeouts(total=5),
        max_errors=5,
        ordered=True,
    )
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_repr_and_a_refusal_show_no_secret() -> None:
    url = f"wss://{SECRET}:{SECRET}@agent/?{SECRET}={SECRET}"
    config = BatchConfig(
        [url, "ws://b/"],
        headers={"X-Token": SECRET},
        ssl_context=ssl.create_default_context(),
        retry="idempotent",
    )
    assert SECRET not in repr(config)
    assert SECRET not in config.agent_name
    wrong: list[dict[str, Any]] = [
        {"window": 0},
        {"headers": {"X-Token": f"{SECRET}\n"}},
        {"headers": {"Authorization": SECRET}},
        {"dialect": "other"},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=r"window|header|Authorization|dialect") as info:
            BatchConfig(url, **{"headers": {"X-Token": SECRET}, **options})
        assert SECRET not in f"{info.value!r} {info.value.__cause__!r} {info.value.__context__!r}"
    for urls in ([url, url], f"{url}#", f"{url} ", url.replace("wss", "http")):
        with pytest.raises(ValueError, match="URL") as info:
            BatchConfig(urls)
        assert SECRET not in f"{info.value!r} {info.value.__cause__!r} {info.value.__context__!r}"
