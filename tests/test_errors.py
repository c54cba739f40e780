"""The exceptions: one tree, their fields, and the messages that are made of the fields."""

from __future__ import annotations

import copy
import pickle

import pytest

import anyagent
from anyagent import (
    AgentError,
    AnyAgentError,
    ConnectError,
    Disconnected,
    ProtocolError,
    Reply,
    SlowConsumerError,
    errors,
)

EXAMPLES: list[tuple[AnyAgentError, dict[str, object], str]] = [
    (
        ConnectError("connection refused"),
        {"reason": "connection refused", "status_code": None},
        "connection refused",
    ),
    (
        ConnectError("the handshake was rejected", status_code=403),
        {"reason": "the handshake was rejected", "status_code": 403},
        "the handshake was rejected (HTTP 403)",
    ),
    (
        Disconnected(1006),
        {"code": 1006, "reason": "", "graceful": False, "phase": "not_sent"},
        "disconnected (code 1006, request not sent)",
    ),
    (
        Disconnected(1011, "it crashed", phase="sent"),
        {"code": 1011, "reason": "it crashed", "graceful": False, "phase": "sent"},
        "disconnected (code 1011, request sent): it crashed",
    ),
    (
        Disconnected(1001, "maintenance", graceful=True, phase="started"),
        {"code": 1001, "reason": "maintenance", "graceful": True, "phase": "started"},
        "disconnected gracefully (code 1001, request started): maintenance",
    ),
    (
        AgentError("overloaded", "too many requests"),
        {"code": "overloaded", "details": "too many requests", "retry_after": None},
        "overloaded: too many requests",
    ),
    (
        AgentError(503, "try later", retry_after=1.5),
        {"code": 503, "details": "try later", "retry_after": 1.5},
        "503: try later (retry after 1.5 s)",
    ),
    (
        ProtocolError("a message is not valid UTF-8", close_code=1007),
        {"reason": "a message is not valid UTF-8", "request_id": None, "close_code": 1007},
        "a message is not valid UTF-8",
    ),
    (
        ProtocolError("a message has a wrong field", request_id="7"),
        {"reason": "a message has a wrong field", "request_id": "7", "close_code": 1002},
        "a message has a wrong field",
    ),
    (
        SlowConsumerError("response_events", 4096),
        {"limit": "response_events", "value": 4096},
        "the response was not read and its buffer reached Limits.response_events = 4096",
    ),
]

each_example = pytest.mark.parametrize(
    ("error", "fields", "message"), EXAMPLES, ids=[type(error).__name__ for error, _, _ in EXAMPLES]
)


@each_example
def test_fields_are_stored_and_the_message_is_made_of_them(
    error: AnyAgentError, fields: dict[str, object], message: str
) -> None:
    assert {name: getattr(error, name) for name in fields} == fields
    assert str(error) == message
    assert error.args == tuple(fields.values())
    assert repr(error) == f"{type(error).__name__}({', '.join(map(repr, error.args))})"


@each_example
def test_an_error_survives_pickling_and_copying_with_its_fields(
    error: AnyAgentError, fields: dict[str, object], message: str
) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert {name: getattr(twin, name) for name in fields} == fields
        assert str(twin) == message


@each_example
def test_what_had_arrived_is_none_unless_it_was_collected(
    error: AnyAgentError, fields: dict[str, object], message: str
) -> None:
    assert error.partial is None
    twin = type(error).__new__(type(error))
    twin.partial = Reply("half an ans")
    assert twin.partial.text == "half an ans"
    assert error.partial is None


def test_every_error_has_the_one_base_and_is_public() -> None:
    tree: set[type[AnyAgentError]] = {AnyAgentError, *AnyAgentError.__subclasses__()}
    assert tree == {type(error) for error, _, _ in EXAMPLES} | {AnyAgentError}
    assert AnyAgentError.__bases__ == (Exception,)
    for kind in tree:
        assert kind.__subclasses__() == [] or kind is AnyAgentError
        assert getattr(anyagent, kind.__name__) is kind
        assert kind.__name__ in anyagent.__all__
        assert kind.__name__ in errors.__all__
