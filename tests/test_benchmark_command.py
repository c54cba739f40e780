"""The command ``python -m benchmarks``: what it selects, runs and reports; never how fast anything is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import clients, results, runner, scenarios
from benchmarks.__main__ import main

ROOT = Path(__file__).parent.parent
DEADLINE = 60.0

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
