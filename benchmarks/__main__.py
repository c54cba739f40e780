"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from .results import Results
    from .runner import Entry

_REPETITIONS = 5
_INSTALL = "pip install -e '.[bench]'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure anyagent and its peers against a replay server on this machine.",
        epilog="A full run takes some 25 minutes on two cores, --quick about one; --list says more. "
        "Tables go to standard output, progress to standard error. The exit code is 1 if a worker failed.",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, 1 repetition")
    parser.add_argument(
        "--repetitions",
        type=int,
        metavar="N",
        help=f"of the central scenarios, others have three of five; default: {_REPETITIONS}",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SUBSTRING",
        help="only scenarios (scenario/variant) or clients whose name contains it; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured, and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="compare with the results of an older run"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a Markdown table")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write figures (needs matplotlib)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite as the command line says; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if find_spec("psutil") is None:
        parser.error(f"psutil is missing; {_INSTALL}")
    from . import report, results, runner

    repetitions: int = (
        (1 if options.quick else _REPETITIONS) if options.repetitions is None else options.repetitions
    )
    older: Results | None = None
    try:
        if repetitions < 1:
            raise ValueError("--repetitions must be at least 1")
        entries = runner.select(options.only, quick=options.quick)
        if options.compare is not None:
            older = results.read(options.compare)
        for name in ("json", "table", "plots"):
            _check_writable(f"--{name}", getattr(options, name))
        if options.plots is not None and find_spec("matplotlib") is None:
            raise ValueError(f"--plots needs matplotlib; {_INSTALL}")
    except (ValueError, OSError, results.ResultsError) as exc:
        parser.error(str(exc))
    if options.list:
        print(_listing(entries, repetitions, quick=options.quick))
        return 0

    said = {"quick": "yes" if options.quick else "no", "repetitions": str(repetitions)}
    if options.only:
        said["only"] = " ".join(options.only)
    try:
        measured = runner.run(entries, repetitions, said, quick=options.quick)
    except runner.RunnerError as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 1
    if options.json is not None:
        results.write(measured, options.json)
    if options.table is not None:
        options.table.write_text(report.markdown(measured), encoding="utf-8")
    print("\n\n".join((report.heading(measured), report.tables(measured), report.floors(measured))))
    if older is not None:
        print("\n" + report.comparison(older, measured))
    if options.plots is not None:
        from . import plots

        options.plots.mkdir(exist_ok=True)
        plots.draw(measured, options.plots)
    failures = sum(len(row.errors) for row in measured.rows)
    if failures:
        print(f"\n{failures} of the workers failed.", file=sys.stderr)
    return 1 if failures else 0


def _check_writable(option: str, path: Path | None) -> None:
    if path is None:
        return
    if option == "--plots":
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} {path}: not a directory")
    elif path.is_dir():
        raise ValueError(f"{option} {path}: is a directory")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: {path.parent} is not a directory that can be written to")


def _listing(entries: Sequence[Entry], repetitions: int, *, quick: bool) -> str:
    from . import runner, scenarios

    lines: list[str] = []
    clients: dict[str, list[str]] = {}
    for entry in entries:
        clients.setdefault(entry.name, []).append(entry.client)
    shown = ""
    for entry in entries:
        if entry.scenario.name != shown:
            shown = entry.scenario.name
            lines += [f"{shown}: {entry.scenario.title} ({entry.scenario.unit})"]
        if entry.name in clients:
            lines += [f"    {entry.name}: {', '.join(clients.pop(entry.name))}"]
    less = scenarios.Variant("", {}).repetitions(repetitions)
    minutes = runner.estimate(entries, repetitions, quick=quick) / 60
    times = "once" if repetitions == 1 else f"{repetitions} times, what is not central {less} times"
    lines.append(f"{times}; about {minutes:.0f} minutes")
    return "\n".join(lines)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
