"""The benchmark suite: its figures, its replay server, and that it runs; never how fast anything is."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks import clients, floors, report, results, runner, scenarios, wire
from benchmarks.__main__ import main
from benchmarks.server import ReplayServer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
DEADLINE = 60.0
BURST = ("burst", "streamed")


def row(client: str, *values: float, scenario: str = "burst", variant: str = "streamed") -> results.Row:
    return results.Row(scenario, variant, client, "µs", list(values))


def run_of(*rows: results.Row, **changes: Any) -> results.Results:
    made = results.Results(
        format=results.FORMAT,
        date="2026-01-02T03:04:05+00:00",
        machine={"cpu": "A CPU", "cores": "2", "system": "Linux", "python": "CPython 3.11"},
        versions={"anyagent": "1.0"},
        options={"quick": "no", "repetitions": "3"},
        labels={"anyagent-asyncio": "anyagent (asyncio)"},
        rows=list(rows),
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


# figures


def test_a_row_has_the_median_of_its_values_and_their_spread() -> None:
    measured = row("aiohttp", 4.0, 1.0, 2.0)
    assert (measured.median, measured.spread) == (2.0, 3.0)


def test_a_row_collects_the_repetitions_with_their_extra_figures() -> None:
    measured = row("aiohttp")
    measured.add(results.Measurement(1.0, 0.25, {"p99": 5.0}))
    measured.add(results.Measurement(2.0, None, {"p99": 6.0}))
    assert (measured.values, measured.server_share, measured.extra) == (
        [1.0, 2.0],
        [0.25],
        {"p99": [5.0, 6.0]},
    )


def test_a_row_without_values_is_not_found() -> None:
    run = run_of(row("aiohttp"), row("picows", 1.0))
    assert run.row(*BURST, "aiohttp") is None
    assert run.row(*BURST, "picows") is not None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0123, "0.012"),
        (0.99, "0.990"),
        (0.9996, "1.00"),
        (1.5, "1.50"),
        (9.996, "10.0"),
        (99.96, "100"),
        (12345.6, "12,346"),
    ],
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert report.figure(value) == shown


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = run_of(
        row("aiohttp", 1.0, 2.0), results.Row("paced", "1000", "replaced", "µs", not_applicable="one")
    )
    results.write(run, tmp_path / "run.json")
    assert results.read(tmp_path / "run.json") == run


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not JSON", "holds no results"),
        (b"\xff", "holds no results"),
        (b"[]", "holds no results"),
        (b'{"rows": []}', "holds no results"),
        (b'{"format": 0, "rows": []}', "is of format 0"),
        (b'{"format": 1, "rows": 3}', "is damaged"),
    ],
)
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(results.ResultsError, match=problem):
        results.read(tmp_path / "run.json")


# report


def test_a_table_has_medians_spreads_ratios_and_the_servers_share() -> None:
    run = run_of(row("anyagent-asyncio", 1.0, 2.0, 3.0), row("aiohttp", 8.0), row("floor", 0.5))
    run.rows[0].server_share = [0.1, 0.2, 0.3]
    heading, columns, *lines = report.tables(run).splitlines()
    assert heading.startswith("burst/streamed: 32 requests")
    assert columns.split() == ["µs", "spread", "/", "aiohttp", "/", "floor", "server"]
    assert lines[0].split() == ["anyagent", "(asyncio)", "2.00", "±50%", "0.250", "4.00", "20%"]
    assert lines[1].split() == ["aiohttp", "8.00", "-", "1.00", "16.0", "-"]


def test_a_table_shows_the_further_figures_of_a_scenario() -> None:
    latency = row("aiohttp", 1.0, scenario="latency", variant="idle")
    latency.extra = {"p99": [1.0, 5.0, 9.0], "wall": [1.0]}
    _, columns, line = report.tables(run_of(latency)).splitlines()
    assert columns.split()[:3] == ["µs", "spread", "p99"]
    assert line.split()[:4] == ["aiohttp", "1.00", "-", "5.00"]


def test_a_table_says_what_failed_and_what_is_not_applicable() -> None:
    failed, inapplicable, different = row("picows"), row("replaced"), row("aiohttp", 1.0)
    different.remark = "one after the other"
    failed.errors = ["ValueError: no"]
    inapplicable.not_applicable = "one request at a time"
    assert report.tables(run_of(failed, inapplicable, different)).splitlines()[-3:] == [
        "picows: FAILED, ValueError: no",
        "replaced: not applicable, one request at a time",
        "aiohttp: one after the other",
    ]


def test_a_scenario_of_another_version_is_shown_by_its_name() -> None:
    assert report.tables(run_of(row("aiohttp", 1.0, scenario="older"))).startswith("older/streamed: older\n")


def test_the_heading_says_where_and_with_what_a_run_was_made() -> None:
    heading = report.heading(run_of())
    for part in ("2026-01-02", "A CPU", "2 cores", "Linux", "CPython 3.11", "anyagent 1.0", "repetitions 3"):
        assert part in heading


def test_the_markdown_table_has_a_row_for_each_client_and_a_column_for_what_was_measured() -> None:
    run = run_of(
        row("anyagent-asyncio", 1.0),
        row("aiohttp", 2.0),
        row("anyagent-asyncio", 2048.0, scenario="memory", variant="handles"),
        row("picows", 3.0, scenario="size", variant="16"),
        row("libraries-trio", 3.0, scenario="import", variant="cpu"),
        row("aiohttp", 150.0, scenario="import", variant="cpu"),
    )
    assert report.markdown(run) == (
        "| | burst, µs | memory, KiB | import, ms |\n"
        "|---|---:|---:|---:|\n"
        "| anyagent (asyncio) | 1.00 | 2.00 | - |\n"
        "| aiohttp | 2.00 | - | 150 |\n"
    )


# floors


def judged(run: results.Results) -> dict[str, bool | None]:
    return {judgement.floor.name: judgement.passed for judgement in floors.judge(run)}


@pytest.mark.parametrize(("value", "passed"), [(6.5, True), (6.51, False)])
def test_a_floor_is_a_ratio_of_medians(value: float, passed: bool) -> None:
    run = run_of(row("anyagent-asyncio", 0.0, value, 99.0), row("aiohttp", 9.0, 10.0, 11.0))
    assert judged(run)["burst/streamed anyagent-asyncio / aiohttp"] is passed


@pytest.mark.parametrize(("value", "passed"), [(4096.0, True), (4097.0, False)])
def test_a_floor_may_be_a_limit_of_one_row(value: float, passed: bool) -> None:
    run = run_of(row("anyagent-trio", value, scenario="memory", variant="handles"))
    assert judged(run)["memory/handles anyagent-trio"] is passed


def test_growth_is_held_against_the_same_client_with_fewer_requests() -> None:
    few, many = (
        row("anyagent-trio", value, scenario="interleaved", variant=variant)
        for value, variant in ((1.0, "collected-32"), (2.5, "collected-10000"))
    )
    assert judged(run_of(few, many))["interleaved/collected-10000 / collected-32 anyagent-trio"] is False


def test_what_was_not_measured_neither_passes_nor_fails() -> None:
    for run in (run_of(), run_of(row("anyagent-asyncio", 1.0)), run_of(row("aiohttp", 1.0))):
        assert set(judged(run).values()) == {None}
    text = report.floors(run_of())
    assert text.count("not measured") == len(floors.FLOORS)


def test_the_report_says_pass_or_fail_of_each_floor_and_the_figure_of_each_aim() -> None:
    run = run_of(row("anyagent-asyncio", 1.0), row("aiohttp", 2.0), row("replaced", 2.0), row("picows", 4.0))
    lines = [" ".join(line.split()) for line in report.floors(run).splitlines()]
    assert "burst/streamed anyagent-asyncio / aiohttp 0.500 0.650 pass" in lines
    assert "burst/streamed anyagent-asyncio / replaced 0.500 0.350 FAIL" in lines
    assert "burst/streamed anyagent-asyncio / picows 0.250" in lines


def test_a_quick_run_judges_nothing() -> None:
    assert "full runs only" in report.floors(run_of(options={"quick": "yes"}))


def test_the_floors_and_aims_name_rows_that_are_measured() -> None:
    measured = {
        (entry.scenario.name, entry.variant.name, entry.client) for entry in runner.select([], quick=False)
    }
    for floor in (*floors.FLOORS, *floors.AIMS):
        assert {floor.row, floor.baseline or floor.row} <= measured


# comparison


def test_a_change_is_what_is_larger_than_both_spreads() -> None:
    old = row("aiohttp", 10.0, 11.0, 12.0)
    assert report.changed(old, row("aiohttp", 12.5, 13.0, 14.0)) is False
    assert report.changed(old, row("aiohttp", 13.0, 13.5, 14.0)) is True
    assert report.changed(old, row("aiohttp", 6.0, 8.5, 9.0)) is False
    assert report.changed(old, row("aiohttp", 13.5)) is None


def test_a_comparison_shows_old_new_and_ratio_of_the_rows_of_both_runs() -> None:
    old = run_of(row("aiohttp", 1.0, 1.0), row("picows", 1.0, 2.0), row("websockets", 1.0))
    new = run_of(row("aiohttp", 2.0, 2.0), row("picows", 2.0, 1.0), row("httpx-ws", 1.0))
    head, _, *lines = report.comparison(old, new).splitlines()
    assert old.date in head
    assert [line.split() for line in lines] == [
        ["burst/streamed", "aiohttp", "µs", "1.00", "2.00", "2.00", "changed"],
        ["burst/streamed", "picows", "µs", "1.50", "1.50", "1.00"],
    ]


def test_a_comparison_warns_of_another_machine() -> None:
    old = run_of(row("aiohttp", 1.0), machine={"cpu": "Another", "cores": "2", "python": "CPython 3.11"})
    assert "different cpu: Another then, A CPU now" in report.comparison(old, run_of(row("aiohttp", 1.0)))


def test_a_comparison_of_different_rows_says_so() -> None:
    assert report.comparison(run_of(), run_of(row("aiohttp", 1.0))).startswith("Nothing to compare")


# selection and options


def test_the_selection_is_narrowed_by_scenarios_and_by_clients() -> None:
    selected = runner.select(["collected", "latency/idle", "picows"], quick=False)
    assert {entry.client for entry in selected} == {"picows", "picows-uvloop"}
    assert {entry.name for entry in selected} == {
        "latency/idle",
        *(f"interleaved/collected-{number}" for number in (1, 32, 1000, 10000)),
    }


def test_a_quick_selection_has_every_scenario_with_every_client() -> None:
    selected = runner.select([], quick=True)
    assert {(entry.scenario.name, entry.client) for entry in selected} >= {
        (scenario.name, client) for scenario in scenarios.ALL for client in clients.NAMES
    }
    assert len(selected) < len(runner.select([], quick=False))


def test_what_is_listed_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "burst"]) == 0
    printed = capsys.readouterr().out
    assert "burst/streamed: anyagent-asyncio, " in printed
    assert "minutes" in printed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--only", "nothing-of-this-name"], "no scenario and no client"),
        (["--only", ""], "selects nothing"),
        (["--only", "memory", "--only", "floor"], "together select nothing"),
        (["--repetitions", "0"], "at least 1"),
        (["--repetitions", "many"], "invalid int"),
        (["--compare", "missing.json"], "missing.json"),
        (["--json", "missing/run.json"], "missing is not a directory"),
        (["--table", "."], "is a directory"),
        (["--plots", "taken"], "not a directory"),
        (["--quik"], "unrecognized arguments"),
    ],
)
def test_wrong_options_end_with_a_message_and_code_2(
    options: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_comparison_with_a_file_of_something_else_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--compare", str(tmp_path / "old.json")])
    assert "holds no results" in capsys.readouterr().err


# the wire


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65535, b"\x81\x7e\xff\xff"),
        (65536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
    ],
)
def test_a_frame_has_one_of_three_forms(size: int, header: bytes) -> None:
    assert wire.frame(b"x" * size) == header + b"x" * size


def masked(payload: bytes, opcode: int = wire.TEXT) -> bytes:
    frame = wire.frame(payload, opcode)
    header, mask = frame[: len(frame) - len(payload)], b"\x01\x80\xff\x00"
    return (
        bytes((header[0], header[1] | 0x80))
        + header[2:]
        + mask
        + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    )


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_the_frames_of_a_client_are_read_however_they_are_split(step: int) -> None:
    payloads = [b"", b"a", b"b" * 126, b"c" * 70000]
    data = b"".join(map(masked, payloads)) + masked(b"p", wire.PING)
    reader, frames = wire.FrameReader(), []
    for start in range(0, len(data), step):
        frames += list(reader.feed(data[start : start + step]))
    assert frames == [*((wire.TEXT, payload) for payload in payloads), (wire.PING, b"p")]


@pytest.mark.parametrize("data", [b"\x81\x01abcdef", b"\x01\x81abcdef", b"\x80\x81abcdef"])
def test_a_frame_that_is_a_fragment_or_not_masked_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="fragment or not masked"):
        list(wire.FrameReader().feed(data))


def test_the_frames_of_a_round_are_its_messages() -> None:
    for order in ("burst", "interleaved"):
        messages = wire.round_messages(("1", "2"), 3, 26, order)
        assert wire.round_frames(("1", "2"), 3, 26, order) == b"".join(map(wire.frame, messages))


# the server


class WebSocket:
    """A client over a plain socket; every wait has a deadline."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._stream = self.socket.makefile("rb")
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        self.head = b"".join(iter(self._stream.readline, b"\r\n"))

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    def send(self, **message: object) -> None:
        self.socket.sendall(masked(json.dumps(message).encode()))

    def prompt(self, text: str, **fields: object) -> None:
        self.send(type="USER_MESSAGE", text=text, **fields)

    def frame(self) -> tuple[int, bytes]:
        first, size = self._stream.read(2)
        if size > 125:
            size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
        return first & 0x0F, self._stream.read(size)

    def message(self) -> dict[str, Any]:
        opcode, payload = self.frame()
        assert opcode == wire.TEXT
        message: dict[str, Any] = json.loads(payload)
        return message

    def at_end(self) -> bool:
        return self._stream.read(1) == b""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ReplayServer()
    yield server.port
    server.close()


@contextlib.contextmanager
def connected(port: int, path: str) -> Iterator[WebSocket]:
    """A client that has had its status."""
    with contextlib.closing(WebSocket(port, path)) as client:
        status = client.message()
        assert status["type"] == "STATUS"
        assert status.get("features", []) == (["ids", "cancel"] if path.startswith("/ids/") else [])
        yield client


def chunks_of(*messages: dict[str, Any]) -> list[tuple[str | None, str | None]]:
    return [(message.get("id"), message.get("text")) for message in messages]


def test_the_server_accepts_the_handshake(port: int) -> None:
    with contextlib.closing(WebSocket(port, "/ids/hold")) as client:
        assert client.head.startswith(b"HTTP/1.1 101 ")
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in client.head  # RFC 6455, 1.3


def test_the_server_refuses_a_path_that_says_nothing(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(WebSocket(port, "/ids/nothing")) as client:
        assert client.head.startswith(b"HTTP/1.1 404 ")
        assert client.at_end()
    assert "no such plan: /ids/nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("order", "ids"),
    [("burst", ["a", "a", "a", "b", "b", "b"]), ("interleaved", ["a", "b", "a", "b", "a", "b"])],
)
def test_a_round_is_answered_once_all_its_prompts_are_there(port: int, order: str, ids: list[str]) -> None:
    with connected(port, f"/ids/round?requests=2&chunks=2&size=3&order={order}") as client:
        for _ in range(2):
            client.prompt(wire.PROMPT, id="a")
            client.prompt(wire.PROMPT, id="b")
            messages = [client.message() for _ in range(6)]
            assert [message["id"] for message in messages] == ids
            for request_id in "ab":
                own = [message for message in messages if message["id"] == request_id]
                assert [message["type"] for message in own] == [
                    "AGENT_EVENT_TEXT_CHUNK",
                    "AGENT_EVENT_TEXT_CHUNK",
                    "AGENT_EVENT_END",
                ]
                assert [len(message["text"]) for message in own[:2]] == [3, 3]


def test_a_round_to_warm_up_has_as_many_chunks_as_the_url_says(port: int) -> None:
    with connected(port, "/ids/round?requests=1&chunks=3&size=3&warm=1") as client:
        client.prompt(wire.WARM_UP, id="1")
        client.prompt(wire.PROMPT, id="2")
        ids = [client.message()["id"] for _ in range(6)]
        assert ids == ["1"] * 2 + ["2"] * 4


def test_without_ids_the_answers_have_none(port: int) -> None:
    with connected(port, "/single/round?requests=1&chunks=1&size=3") as client:
        client.prompt(wire.PROMPT)
        assert chunks_of(client.message(), client.message()) == [(None, "The"), (None, None)]


def test_the_server_answers_a_cancel_with_an_end(port: int) -> None:
    with connected(port, "/ids/round?requests=1&chunks=1&size=3&end=0") as client:
        client.prompt(wire.PROMPT, id="1")
        assert client.message()["text"] == "The"
        client.send(type="CANCEL", id="1")
        end = client.message()
        assert (end["type"], end["id"], end["status"]) == ("AGENT_EVENT_END", "1", "cancelled")


def test_a_held_request_is_not_answered_but_a_sync_is(port: int) -> None:
    with connected(port, "/ids/hold") as client:
        client.prompt(wire.PROMPT, id="1")
        client.prompt(wire.SYNC, id="2")
        end = client.message()
        assert (end["type"], end["id"]) == ("AGENT_EVENT_END", "2")


def test_paced_requests_get_their_chunks_in_turn(port: int) -> None:
    with connected(port, "/ids/paced?requests=3&chunks=2&size=3&rate=500") as client:  # a period of two ticks
        for request_id in "abc":
            client.prompt(wire.PROMPT, id=request_id)
        messages = [client.message() for _ in range(9)]
        text = [message["id"] for message in messages if "text" in message]
        assert text == ["a", "c", "b", "a", "c", "b"]
        assert [message["id"] for message in messages if "text" not in message] == ["a", "c", "b"]


def test_a_probe_carries_the_time_of_its_writing_among_the_chunks_of_others(port: int) -> None:
    with connected(port, "/ids/probe?load=2&chunks=3&size=26&rate=500") as client:
        client.prompt(wire.PROMPT, id="a")
        client.prompt(wire.PROBE, id="p")
        client.prompt(wire.PROMPT, id="b")
        messages = [client.message() for _ in range(3 + 2 * 3 + 3)]
        times = [
            int(message["text"][:20]) for message in messages if message["id"] == "p" and "text" in message
        ]
        assert len(times) == 3
        assert times == sorted(times)
        assert times[0] > 0
        assert [message["id"] for message in messages[:-3]] == ["a", "b", "p"] * 3
        assert [message["id"] for message in messages[-3:]] == ["a", "b", "p"]


def test_the_server_answers_pings_and_ignores_pongs(port: int) -> None:
    with connected(port, "/ids/hold") as client:
        client.socket.sendall(masked(b"quiet", wire.PONG) + masked(b"ping", wire.PING))
        assert client.frame() == (wire.PONG, b"ping")


def test_the_server_answers_a_close_and_ends_the_stream(port: int) -> None:
    with connected(port, "/ids/hold") as client:
        client.socket.sendall(masked(b"\x03\xe8bye", wire.CLOSE))
        assert client.frame() == (wire.CLOSE, b"\x03\xe8")
        assert client.at_end()


def test_the_server_reads_on_while_nobody_reads_what_it_sends(port: int) -> None:
    size = 32 << 20  # more than sockets buffer
    with connected(port, f"/ids/round?requests=1&chunks=1&size={size}") as client:
        client.prompt(wire.PROMPT, id="1")
        for _ in range(64):
            client.send(type="CANCEL", id="x" * 65536)
        assert len(client.message()["text"]) == size


def test_the_server_gets_over_a_client_that_breaks_the_protocol(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with connected(port, "/ids/hold") as client:
        client.socket.sendall(b"\x81\x01abcdef")
        assert client.at_end()
    with connected(port, "/ids/hold") as client:
        client.prompt(wire.SYNC, id="1")
        assert client.message()["id"] == "1"


# a run


def quick(name: str, client: str) -> runner.Entry:
    scenario = scenarios.find(name)
    variant = next(variant for variant in scenario.variants if variant.quick is not None)
    return runner.Entry(scenario, variant, client)


def test_a_worker_that_fails_is_reported_and_the_others_run(capfd: pytest.CaptureFixture[str]) -> None:
    entries = [quick("burst", "nobody"), quick("burst", "anyagent-asyncio")]
    failed, well = runner.run(entries, 1, {}, quick=True).rows
    assert (failed.values, well.errors) == ([], [])
    assert failed.errors == ["KeyError: 'nobody'"]
    assert well.median > 0
    assert "Traceback" in capfd.readouterr().err


def test_a_client_whose_library_is_missing_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "picows.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["--quick", "--only", "burst", "--only", "picows-uvloop", "--repetitions", "2"]) == 1
    problem = "picows-uvloop cannot be loaded: not here (pip install -e '.[bench]')"
    output, errors = capfd.readouterr()
    assert output.count(f"FAILED, {problem}") == 2
    assert errors.splitlines().count(problem) == 1
    assert "2 of the workers failed." in errors
    assert "Traceback" not in errors


def test_a_run_is_compared_with_an_older_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--only", "burst", "--only", "floor"]
    old = str(tmp_path / "old.json")
    assert main([*options, "--json", old]) == 0
    assert "Compared with" not in capsys.readouterr().out
    assert main([*options, "--compare", old]) == 0
    assert "Compared with" in capsys.readouterr().out


def test_a_worker_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_WORKER_DEADLINE", 0.01)
    (hanging,) = runner.run([quick("import", "anyagent-trio")], 1, {}, quick=True).rows
    assert hanging.errors == ["no answer within 0.01 s"]
    assert psutil.Process().children(recursive=True) == []


def test_a_server_that_ends_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_the_server(job: scenarios.Job) -> results.WorkerAnswer:
        server = psutil.Process(job.server_pid)
        server.kill()
        server.wait(DEADLINE)
        return results.WorkerAnswer("label", measurement=results.Measurement(1.0))

    monkeypatch.setattr(runner, "_work", kill_the_server)
    assert main(["--quick", "--only", "burst", "--only", "anyagent-asyncio", "--repetitions", "2"]) == 1
    assert "the replay server ended" in capsys.readouterr().err


def test_repetitions_are_interleaved_and_their_order_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def record(job: scenarios.Job) -> results.WorkerAnswer:
        order.append((job.scenario, job.client))
        return results.WorkerAnswer(job.client, measurement=results.Measurement(1.0))

    monkeypatch.setattr(runner, "_work", record)
    entries = [quick("burst", "a"), quick("burst", "b"), quick("cancel", "a")]
    run = runner.run(entries, 2, {}, quick=True)
    assert order == [
        ("burst", "a"),
        ("burst", "b"),
        ("burst", "b"),
        ("burst", "a"),
        ("cancel", "a"),
        ("cancel", "a"),
    ]
    assert [measured.values for measured in run.rows] == [[1.0, 1.0]] * 3


def test_central_variants_get_all_repetitions_and_others_three_of_five() -> None:
    central, other = (scenarios.Variant("name", {}, central=central) for central in (True, False))
    assert [central.repetitions(wanted) for wanted in (1, 2, 5, 10)] == [1, 2, 5, 10]
    assert [other.repetitions(wanted) for wanted in (1, 2, 5, 10)] == [1, 2, 3, 6]


def test_what_is_not_applicable_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(job: scenarios.Job) -> results.WorkerAnswer:
        asked.append(job.client)
        return results.WorkerAnswer(job.client, not_applicable="no")

    monkeypatch.setattr(runner, "_work", refuse)
    (refused,) = runner.run([quick("cancel", "replaced")], 3, {}, quick=True).rows
    assert asked == ["replaced"]
    assert (refused.values, refused.not_applicable, refused.errors) == ([], "no", [])


def started(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_scenario_runs_and_leaves_its_files(tmp_path: Path) -> None:
    with started(
        *("--quick", "--only", "anyagent-asyncio", "--only", "floor"),
        *("--json", str(tmp_path / "run.json"), "--table", str(tmp_path / "table.md")),
    ) as process:
        output, errors = process.communicate(timeout=2 * DEADLINE)
    assert process.returncode == 0, errors
    run = results.read(tmp_path / "run.json")
    assert {measured.scenario for measured in run.rows} == {scenario.name for scenario in scenarios.ALL}
    for measured in run.rows:
        assert len(measured.values) == 1, measured
    assert run.versions["anyagent"]
    assert "burst/streamed: " in output
    assert "anyagent (asyncio)" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert errors.count("\n") == len(run.rows)  # of progress


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_at_once_and_leaves_no_process(number: signal.Signals, code: int) -> None:
    with started("--quick", "--only", "burst", "--only", "anyagent", "--repetitions", "1000") as process:
        assert process.stderr is not None
        assert "burst/streamed" in process.stderr.readline()
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert output == ""
    assert psutil.wait_procs(below, timeout=DEADLINE)[1] == []
