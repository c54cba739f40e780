"""The messages: what they look like on the wire, what is read from it, and what they show of themselves."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import rich.pretty
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent import IM, OM, ProtocolError
from anyagent.testing import memory_agent

from .properties import CLIENT_MESSAGES, REPEATABLE, SERVER_MESSAGES, TEXTS, chain

FROM_AGENT: list[tuple[OM.ServerMessage, str]] = [
    (OM.Status("ready"), '{"type":"STATUS","state":"ready"}'),
    (
        OM.Status("busy", ("ids", "cancel"), 8, "session 1", "7"),
        '{"type":"STATUS","state":"busy","features":["ids","cancel"],"max_in_flight":8,'
        '"session":"session 1","id":"7"}',
    ),
    (OM.EventTextChunk("Hi"), '{"type":"AGENT_EVENT_TEXT_CHUNK","text":"Hi"}'),
    (
        OM.EventTextChunk("é😀", id="7", seq=0),
        '{"type":"AGENT_EVENT_TEXT_CHUNK","text":"é😀","id":"7","seq":0}',
    ),
    (OM.EventReasoningChunk("Hm"), '{"type":"AGENT_EVENT_REASONING_CHUNK","text":"Hm"}'),
    (
        OM.EventReasoningChunk("Hm", id="7", seq=1),
        '{"type":"AGENT_EVENT_REASONING_CHUNK","text":"Hm","id":"7","seq":1}',
    ),
    (
        OM.EventToolCall("call 1", "search", '{"q":1}'),
        r'{"type":"AGENT_EVENT_TOOL_CALL","call_id":"call 1","name":"search","arguments":"{\"q\":1}"}',
    ),
    (
        OM.EventToolCall("call 1", "search", "{}", id="7", seq=2),
        '{"type":"AGENT_EVENT_TOOL_CALL","call_id":"call 1","name":"search","arguments":"{}",'
        '"id":"7","seq":2}',
    ),
    (OM.EventEnd(42), '{"type":"AGENT_EVENT_END","tokens_used":42}'),
    (
        OM.EventEnd(42, "incomplete", id="7", seq=3),
        '{"type":"AGENT_EVENT_END","tokens_used":42,"status":"incomplete","id":"7","seq":3}',
    ),
    (OM.Error("busy", "try later"), '{"type":"ERROR","code":"busy","details":"try later"}'),
    (
        OM.Error(503, "try later", 1.5, id="7", seq=4),
        '{"type":"ERROR","code":503,"details":"try later","retry_after":1.5,"id":"7","seq":4}',
    ),
    (OM.GracefulDisconnect(), '{"type":"GRACEFUL_DISCONNECT"}'),
    (
        OM.GracefulDisconnect("maintenance", 2.5),
        '{"type":"GRACEFUL_DISCONNECT","reason":"maintenance","deadline":2.5}',
    ),
]

FROM_CLIENT: list[tuple[IM.ClientMessage, str]] = [
    (IM.UserMessage(text="Hi"), '{"type":"USER_MESSAGE","text":"Hi"}'),
    (
        IM.UserMessage(text="é😀", id="7", conversation="c", metadata={"k": [1, None]}),
        '{"type":"USER_MESSAGE","id":"7","text":"é😀","conversation":"c","metadata":{"k":[1,null]}}',
    ),
    (IM.Cancel("7"), '{"type":"CANCEL","id":"7"}'),
    (
        IM.ToolResult(id="7", call_id="call 1", output="42"),
        '{"type":"TOOL_RESULT","id":"7","call_id":"call 1","output":"42"}',
    ),
]

SECRET = "s3cret"
SECRETIVE: list[IM.ClientMessage] = [
    IM.UserMessage(text=SECRET, id="7", conversation=SECRET, metadata={SECRET: [{SECRET: SECRET}]}),
    IM.ToolResult(id="7", call_id=SECRET, output=SECRET),
]


@pytest.mark.parametrize(("message", "text"), FROM_AGENT)
def test_the_spelling_of_messages_out_of_the_agent(message: OM.ServerMessage, text: str) -> None:
    assert OM.encode(message) == text.encode()
    assert OM.decode(text.encode()) == message
    assert OM.decode(memoryview(text.encode())) == message


@pytest.mark.parametrize(("message", "text"), FROM_CLIENT)
def test_the_spelling_of_messages_into_the_agent(message: IM.ClientMessage, text: str) -> None:
    assert IM.encode(message) == text.encode()
    assert IM.decode(text) == message
    assert IM.decode(text.encode()) == message


@settings(REPEATABLE)
@given(SERVER_MESSAGES)
def test_what_an_agent_encodes_is_what_a_client_decodes(message: OM.ServerMessage) -> None:
    assert OM.decode(OM.encode(message)) == message


@settings(REPEATABLE)
@given(CLIENT_MESSAGES)
def test_what_a_client_encodes_is_what_an_agent_decodes(message: IM.ClientMessage) -> None:
    assert IM.decode(IM.encode(message)) == message


@settings(REPEATABLE)
@given(SERVER_MESSAGES | CLIENT_MESSAGES)
def test_defaults_are_left_out_on_the_wire(message: OM.ServerMessage | IM.ClientMessage) -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(message)}
    written = json.loads(msgspec.json.encode(message))
    assert written.pop("type") == type(message).__struct_config__.tag
    assert set(written) == {name for name in defaults if getattr(message, name) != defaults[name]}


@pytest.mark.parametrize(
    "extra", ['"newer":null', '"newer":{"id":"x","type":"ERROR"}', '"":[1,[2]],"Text":1']
)
def test_unknown_fields_are_ignored(extra: str) -> None:
    for message, text in FROM_AGENT:
        assert OM.decode(f"{text[:-1]},{extra}}}".encode()) == message
    for request, text in FROM_CLIENT:
        assert IM.decode(f"{text[:-1]},{extra}}}") == request


def test_the_order_of_fields_does_not_matter() -> None:
    for message, text in FROM_AGENT:
        assert OM.decode(json.dumps(dict(reversed(json.loads(text).items()))).encode()) == message


@pytest.mark.parametrize(
    ("raw", "request_id"),
    [
        ('{"type":"NEWER"}', None),
        (' {"a": [1, {}],\n"type" :"NEWER","id":"7" } ', "7"),
        ('{"id":"7","type":"NEWER","seq":"not a number"}', "7"),
        ('{"type":"NEWER","id":7}', None),
        ('{"type":"NEWER","id":null}', None),
        (r'{"type":"N\u0045WER","id":"é"}', "é"),
    ],
)
def test_an_object_of_unknown_type_keeps_its_text_and_its_id(raw: str, request_id: str | None) -> None:
    message = OM.decode(raw.encode())
    assert message == OM.Unknown("NEWER", raw, id=request_id)
    assert OM.encode(message) == raw.encode()


@settings(REPEATABLE)
@given(st.dictionaries(TEXTS, TEXTS | st.integers()), TEXTS, st.booleans())
def test_any_object_of_unknown_type_is_no_error(fields: dict[str, Any], kind: str, ascii_only: bool) -> None:
    raw = json.dumps({**fields, "type": f"{kind}?"}, ensure_ascii=ascii_only)
    message = OM.decode(raw.encode())
    assert isinstance(message, OM.Unknown)
    assert (message.type, message.raw) == (f"{kind}?", raw)
    assert message.id == (fields.get("id") if isinstance(fields.get("id"), str) else None)


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"AGENT_EVENT_TEXT_CHUNK","id":"7"}',
        '{"type":"AGENT_EVENT_TEXT_CHUNK","text":5,"id":"7"}',
        '{"type":"AGENT_EVENT_REASONING_CHUNK","text":null,"id":"7"}',
        '{"type":"AGENT_EVENT_TOOL_CALL","call_id":"1","name":"n","arguments":{},"id":"7"}',
        '{"type":"AGENT_EVENT_END","tokens_used":"1","id":"7"}',
        '{"type":"AGENT_EVENT_END","tokens_used":1.5,"id":"7"}',
        '{"type":"ERROR","code":1.5,"details":"","id":"7"}',
        '{"type":"ERROR","code":true,"details":"","id":"7"}',
        '{"type":"STATUS","id":"7"}',
        '{"type":"STATUS","state":"ready","max_in_flight":0,"id":"7"}',
        '{"type":"STATUS","state":"ready","features":"ids","id":"7"}',
        '{"type":7,"id":"7"}',
        '{"type":null,"id":"7"}',
        '{"id":"7"}',
    ],
)
def test_a_message_with_a_wrong_field_is_an_error_that_tells_its_id(text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        OM.decode(text.encode())
    assert (caught.value.request_id, caught.value.close_code) == ("7", 1002)


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"USER_MESSAGE"}',
        '{"type":"USER_MESSAGE","text":1}',
        '{"type":"USER_MESSAGE","text":"","metadata":[]}',
        '{"type":"TOOL_RESULT","id":"7","call_id":"1"}',
        '{"type":"CANCEL","id":7}',
        '{"type":"STATUS","state":"ready"}',
        '{"text":"Hi"}',
        "[]",
        "",
    ],
)
def test_what_is_no_message_of_a_client_is_an_error(text: str) -> None:
    with pytest.raises(ProtocolError):
        IM.decode(text)


@pytest.mark.parametrize(
    "message",
    [*(message for message, _ in FROM_AGENT + FROM_CLIENT), OM.Unknown("NEWER", "{}")],
    ids=lambda message: type(message).__name__,
)
def test_messages_are_immutable(message: msgspec.Struct) -> None:
    for field in msgspec.structs.fields(message):
        with pytest.raises(AttributeError):
            setattr(message, field.name, getattr(message, field.name))
        with pytest.raises(AttributeError):
            delattr(message, field.name)


@pytest.mark.parametrize("message", SECRETIVE, ids=lambda message: type(message).__name__)
def test_messages_into_the_agent_show_their_id_and_nothing_of_their_content(
    message: IM.ClientMessage,
) -> None:
    for shown in (
        repr(message),
        str(message),
        f"{message}",
        repr([message]),
        rich.pretty.pretty_repr(message),
        rich.pretty.pretty_repr({"message": message}, max_width=20, expand_all=True),
    ):
        assert SECRET not in shown
        assert "7" in shown


LONE = f"{SECRET}\ud800"


@pytest.mark.parametrize(
    "message",
    [
        IM.UserMessage(text=LONE),
        IM.UserMessage(text="", id=LONE),
        IM.UserMessage(text="", conversation=LONE),
        IM.UserMessage(text="", metadata={LONE: 1}),
        IM.UserMessage(text="", metadata={"a": [LONE]}),
        IM.Cancel(LONE),
        IM.ToolResult(call_id=LONE, output=""),
        IM.ToolResult(call_id="", output=LONE),
    ],
)
def test_a_lone_surrogate_is_refused_without_showing_the_text_around_it(message: IM.ClientMessage) -> None:
    with pytest.raises(ValueError, match="lone surrogate") as caught:
        IM.encode(message)
    assert_nothing_is_shown(caught.value)


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}, print, {1: [SECRET, object]}])
def test_metadata_that_is_not_json_is_refused_without_showing_it(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        IM.encode(IM.UserMessage(text=SECRET, metadata={SECRET: value}))
    assert_nothing_is_shown(caught.value)


def test_metadata_that_contains_itself_is_refused_without_showing_it() -> None:
    endless: list[object] = [SECRET]
    endless.append(endless)
    with pytest.raises(ValueError, match="nested") as caught:
        IM.encode(IM.UserMessage(text=SECRET, metadata={SECRET: endless}))
    assert_nothing_is_shown(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"USER_MESSAGE","text":"s3cret \xff"}',
        b'{"type":"USER_MESSAGE","text":"s3cret","metadata":{"s3cret":"s3cret \xff"}}',
        b'{"type":"USER_MESSAGE","text":"s3cret',
        b'{"type":"USER_MESSAGE","text":"s3cret","id":1}',
        b'{"type":"USER_MESSAGE","text":["s3cret"]}',
        b'{"type":"TOOL_RESULT","call_id":"1","output":"s3cret\xff"}',
    ],
)
def test_a_message_of_a_client_that_cannot_be_decoded_shows_nothing_of_its_content(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        IM.decode(data)
    assert_nothing_is_shown(caught.value)


@pytest.mark.anyio
async def test_a_request_that_cannot_be_encoded_is_refused_and_holds_no_lane() -> None:
    async with memory_agent(wire="single") as (agent, peer):
        with pytest.raises(ValueError, match="lone surrogate") as caught:
            await agent.send_message(LONE)
        assert_nothing_is_shown(caught.value)
        with pytest.raises(TypeError) as not_json:
            await agent.ask(SECRET, metadata={SECRET: object()})
        assert_nothing_is_shown(not_json.value)
        assert agent.in_flight == 0
        async with await agent.send_message("fine") as response:
            with pytest.raises(ValueError, match="lone surrogate") as caught:
                await response.send_tool_result("call 1", LONE)
            assert_nothing_is_shown(caught.value)
            assert await peer.receive() == IM.UserMessage(text="fine")


def assert_nothing_is_shown(exc: BaseException) -> None:
    for each in chain(exc):
        assert SECRET not in f"{each!s} {each!r} {each.args!r} {getattr(each, '__notes__', [])!r}"
        assert not any(SECRET in repr(value) for value in vars(each).values())
