"""The figures of a benchmark run: statistics, tables, floors, the comparison with an older run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import floors, report, results, runner

if TYPE_CHECKING:
    from pathlib import Path

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
