"""The handlers of `anyagent.testing.faults`: each misbehaves as it says, and in no other way."""

from __future__ import annotations

import contextlib
import inspect
import ssl
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trustme
from websockets.exceptions import ConnectionClosed

from anyagent import im, om
from anyagent.testing import AgentReply, embedded_agent, faults

from .raw_client import DEADLINE, connect, connect_raw, end, text_chunk

if TYPE_CHECKING:
    from .raw_client import RawClient

PROMPT = b'{"type":"USER_MESSAGE","id":"a","text":"?"}'
PARTIAL = b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":"partial","id":"a"}'
TEXT_FRAME = 0x81
PING_FRAME = 0x89
CLOSE_FRAME = 0x88


def closure_of(client: RawClient) -> ConnectionClosed:
    with pytest.raises(ConnectionClosed) as caught:
        client.receive()
    return caught.value


def test_every_fault_is_a_documented_handler() -> None:
    for name in faults.__all__:
        handler = getattr(faults, name)
        assert inspect.iscoroutinefunction(handler)
        assert list(inspect.signature(handler).parameters) == ["message", "reply"]
        assert inspect.getdoc(handler)


def test_close_mid_answer_sends_a_close_frame_and_no_terminal() -> None:
    with embedded_agent(faults.close_mid_answer) as agent:
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive() == text_chunk("partial", id="a")
            closure = closure_of(client)
            assert closure.rcvd is not None
            assert (closure.rcvd.code, closure.rcvd.reason) == (1011, "fault")
        agent.wait_for_connections(0)


def test_reset_mid_answer_resets_the_connection() -> None:
    with embedded_agent(faults.reset_mid_answer) as agent:
        with connect_raw(agent.url) as client:
            client.send_frame(TEXT_FRAME, PROMPT)
            with pytest.raises(ConnectionResetError):
                client.receive_to_eof()
        agent.wait_for_connections(0)


def test_drop_mid_answer_ends_the_stream_after_the_chunk_without_a_close_frame() -> None:
    with embedded_agent(faults.drop_mid_answer) as agent:
        with connect_raw(agent.url) as client:
            client.send_frame(TEXT_FRAME, PROMPT)
            assert client.receive_to_eof() == bytes([TEXT_FRAME, len(PARTIAL)]) + PARTIAL
        agent.wait_for_connections(0)


def test_drop_mid_answer_is_seen_by_a_client_as_an_abnormal_closure() -> None:
    with embedded_agent(faults.drop_mid_answer) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("partial", id="a")
        closure = closure_of(client)
        assert closure.rcvd is None
        assert not isinstance(closure.__cause__, OSError)


def test_drop_mid_answer_works_over_tls() -> None:
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    with embedded_agent(faults.drop_mid_answer, ssl_context=server_context) as agent:
        with connect_raw(agent.url, client_context) as client:
            client.send_frame(TEXT_FRAME, PROMPT)
            assert client.receive_to_eof() == bytes([TEXT_FRAME, len(PARTIAL)]) + PARTIAL
        agent.wait_for_connections(0)


@pytest.mark.parametrize("action", ["return", "text", "close"])
def test_a_dropped_connection_stays_half_open_until_the_client_closes_it(action: str) -> None:
    cancelled: list[str] = []

    async def handler(message: im.UserMessage, reply: AgentReply) -> None:
        reply.drop()
        reply.write(b"unheard")
        try:
            if action == "text":
                await reply.text("unheard")
            elif action == "close":
                await reply.close()
        except anyio.get_cancelled_exc_class():
            cancelled.append(action)
            raise

    with embedded_agent(handler) as agent:
        with connect_raw(agent.url) as client, connect(agent.url) as other:
            client.send_frame(TEXT_FRAME, PROMPT)
            assert client.receive_to_eof() == b""
            for _ in range(3):  # a closed one would answer the first with RST
                client.send_frame(PING_FRAME, b"ping")
                agent.broadcast(om.Status("busy"))
                assert other.receive() == {"type": "STATUS", "state": "busy"}
            assert agent.connections == 2
            assert cancelled == []
        agent.wait_for_connections(0)
    assert cancelled == ([] if action == "return" else [action])


def test_an_agent_whose_dropped_connection_is_never_closed_stops_nevertheless() -> None:
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(embedded_agent(faults.drop_mid_answer))
        with connect_raw(agent.url) as client:
            client.send_frame(TEXT_FRAME, PROMPT)
            client.receive_to_eof()
            stack.close()
    assert agent.connections == 0


def test_no_terminal_leaves_the_request_without_an_end_and_the_connection_usable() -> None:
    with embedded_agent(faults.no_terminal, max_in_flight=1) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("partial", id="a")
        client.send(type="CANCEL", id="a")
        client.prompt("?", id="b")
        assert client.receive() == text_chunk("partial", id="b")


def test_late_events_come_after_the_cancel_with_the_id_of_the_cancelled_request() -> None:
    with embedded_agent(faults.late_events) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("partial", id="a")
        client.send(type="CANCEL", id="a")
        assert client.receive_answer() == [
            text_chunk("late", id="a"),
            text_chunk("later", id="a"),
            end(3, id="a", status="cancelled"),
        ]


def test_late_events_end_with_the_connection() -> None:
    with embedded_agent(faults.late_events) as agent:
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive() == text_chunk("partial", id="a")
        agent.wait_for_connections(0)


def test_bad_json_is_half_an_object_in_the_middle_of_an_answer() -> None:
    with embedded_agent(faults.bad_json) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive() == text_chunk("partial", id="a")
        assert client.websocket.recv(timeout=DEADLINE) == '{"type":"AGENT_EVENT_TEXT_CHUNK","text":'
        assert client.receive() == end(1, id="a")


@pytest.mark.parametrize("fields", [{}, {"id": "a"}])
def test_bad_field_is_a_chunk_of_the_request_whose_text_is_a_number(fields: dict[str, str]) -> None:
    wire: Any = "native" if fields else "single"
    with embedded_agent(faults.bad_field, wire=wire) as agent, connect(agent.url) as client:
        client.prompt("?", **fields)
        assert client.receive() == text_chunk("partial", **fields)
        assert client.receive() == {"type": "AGENT_EVENT_TEXT_CHUNK", "text": 5, **fields}
        assert client.receive() == end(1, **fields)


def test_bad_utf8_is_refused_by_a_client_as_such() -> None:
    with embedded_agent(faults.bad_utf8) as agent:
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive() == text_chunk("partial", id="a")
            closure = closure_of(client)
            assert closure.sent is not None
            assert closure.sent.code == 1007
        agent.wait_for_connections(0)


def test_bad_utf8_is_one_text_frame_and_the_answer_goes_on() -> None:
    with embedded_agent(faults.bad_utf8) as agent, connect_raw(agent.url) as client:
        client.send_frame(TEXT_FRAME, PROMPT)
        client.receive_until(PARTIAL)
        bad = client.receive_until(b"}")
        assert bad == bytes([TEXT_FRAME, len(bad) - 2]) + b'{"type":"AGENT_EVENT_TEXT_CHUNK","text":"\xff"}'
        assert client.receive_until(b"}")[2:] == b'{"type":"AGENT_EVENT_END","tokens_used":1,"id":"a"}'


def test_wrong_id_mixes_in_a_chunk_and_a_terminal_of_nobody() -> None:
    with embedded_agent(faults.wrong_id) as agent, connect(agent.url) as client:
        client.prompt("?", id="a")
        assert client.receive_answer() == [
            text_chunk("partial", id="a"),
            text_chunk("astray", id="nobody"),
            end(1, id="nobody"),
        ]
        assert client.receive_answer() == [text_chunk("whole", id="a"), end(2, id="a")]


def test_a_stalled_connection_is_not_read_while_others_are() -> None:
    with embedded_agent(faults.stall) as agent:
        with connect_raw(agent.url) as stalled, connect_raw(agent.url) as other:
            stalled.send_frame(TEXT_FRAME, PROMPT)
            stalled.receive_until(PARTIAL)
            stalled.send_frame(PING_FRAME, b"ping")
            stalled.send_frame(TEXT_FRAME, b'{"type":"CANCEL","id":"a"}')
            other.send_frame(TEXT_FRAME, b'{"type":"USER_MESSAGE","id":"b","text":"?"}')
            agent.wait_for(lambda message: message.id == "b")
            other.receive_until(b"partial")
            assert [message.id for message in agent.received] == ["a", "b"]
            agent.broadcast(om.Status("busy"))
            assert stalled.receive_until(b"}")[2:] == b'{"type":"STATUS","state":"busy"}'
        assert agent.connections == 2


def test_an_agent_reads_again_from_a_stalled_connection_in_order_to_close_it() -> None:
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(embedded_agent(faults.stall))
        with connect_raw(agent.url) as client:
            client.send_frame(TEXT_FRAME, PROMPT)
            client.receive_until(PARTIAL)
            client.send_frame(CLOSE_FRAME, b"\x03\xe8")
            stack.close()
            assert client.receive_to_eof()[:1] == bytes([CLOSE_FRAME])  # and no RST, for unread data
    assert agent.connections == 0


def test_graceful_disconnect_announces_itself_completes_the_answer_and_closes() -> None:
    with embedded_agent(faults.graceful_disconnect) as agent:
        with connect(agent.url) as client:
            client.prompt("?", id="a")
            assert client.receive() == text_chunk("partial", id="a")
            assert client.receive() == {
                "type": "GRACEFUL_DISCONNECT",
                "reason": "maintenance",
                "deadline": 5.0,
            }
            assert client.receive() == end(1, id="a")
            client.websocket.close()
            assert (client.websocket.close_code, client.websocket.close_reason) == (1001, "maintenance")
        agent.wait_for_connections(0)
