"""A run in words: plain text tables, the Markdown table, the floors, the comparison with an older run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final

from . import scenarios
from .floors import AIMS, judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .results import Results, Row

__all__ = ["changed", "comparison", "figure", "floors", "heading", "markdown", "tables"]

_BASELINES: Final = ("aiohttp", "replaced", "trio-websocket", "floor", "libraries-asyncio", "libraries-trio")
_NOTHING: Final = "-"
_NOTE: Final = (
    "Medians; spread is half the range by the median; server is its share of one CPU. "
    "Sending the prompts and starting a task for each is measured, too, but for interleaved."
)
_COLUMNS: Final = (  # of the Markdown table: scenario, variant, heading, divisor
    ("burst", "streamed", "burst, µs", 1),
    ("interleaved", "streamed-1000", "1,000 streamed, µs", 1),
    ("interleaved", "collected-1000", "1,000 collected, µs", 1),
    ("paced", "1000", "paced, µs", 1),
    ("latency", "idle", "latency, µs", 1),
    ("latency", "load", "under load, µs", 1),
    ("cancel", "storm", "cancel, µs", 1),
    ("memory", "handles", "memory, KiB", 1024),
    ("batch", "long", "batch, µs", 1),
    ("connect", "cycle", "connect, ms", 1000),
    ("import", "cpu", "import, ms", 1),
)


def figure(value: float) -> str:
    """A number with three significant digits, and whole from 100 on."""
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{digits}f}"


def _aligned(lines: Iterable[Sequence[str]]) -> list[str]:
    """Columns of equal width, two spaces apart: the first to the left, the others to the right."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def heading(results: Results) -> str:
    """Where, when and with what a run was made."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    options = ", ".join(f"{name} {value}" for name, value in results.options.items())
    return "\n".join(
        (
            f"anyagent benchmarks, {results.date} ({options})",
            f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('system')}, "
            f"{machine.get('python')}",
            versions,
            _NOTE,
        )
    )


def _groups(results: Results) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.scenario, row.variant), []).append(row)
    return groups


def _described(scenario: str) -> tuple[str, Mapping[str, str]]:
    """A scenario's title, and the headings of its further figures."""
    try:
        found = scenarios.find(scenario)
    except KeyError:  # of another version
        return scenario, {}
    return found.title, found.shown


def tables(results: Results) -> str:
    """A table for each variant of each scenario: the median of all repetitions, half their spread, ratios."""
    return "\n\n".join(_table(results, rows) for rows in _groups(results).values())


def _table(results: Results, rows: list[Row]) -> str:
    first = rows[0]
    title, shown = _described(first.scenario)
    baselines = {
        row.client: row.median for row in rows if row.client in _BASELINES and row.values and row.median
    }
    lines = [["", first.unit, "spread", *shown.values(), *(f"/ {name}" for name in baselines), "server"]]
    remarks = []
    for row in rows:
        label = results.label(row.client)
        if row.not_applicable is not None:
            remarks.append(f"{label}: not applicable, {row.not_applicable}")
        if row.remark is not None:
            remarks.append(f"{label}: {row.remark}")
        remarks += [f"{label}: FAILED, {error}" for error in row.errors]
        if not row.values:
            continue
        lines.append(
            [
                label,
                figure(row.median),
                f"±{row.spread / 2 / row.median:.0%}" if len(row.values) > 1 and row.median else _NOTHING,
                *(figure(median(row.extra[name])) if name in row.extra else _NOTHING for name in shown),
                *(figure(row.median / baseline) for baseline in baselines.values()),
                f"{median(row.server_share):.0%}" if row.server_share else _NOTHING,
            ]
        )
    return "\n".join([f"{first.scenario}/{first.variant}: {title}", *_aligned(lines), *remarks])


def floors(results: Results) -> str:
    """Each floor with what was measured and ``pass`` or ``FAIL``, then the aims, which have no limit."""
    if results.options.get("quick") == "yes":
        return "Floors are judged in full runs only."
    lines = [["floor", "measured", "limit", ""]]
    for judgement in judge(results):
        measured = _NOTHING if judgement.value is None else figure(judgement.value)
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[judgement.passed]
        limit = "" if judgement.floor.limit is None else figure(judgement.floor.limit)
        lines.append([judgement.floor.name, measured, limit, verdict])
    for judgement in judge(results, AIMS):
        if judgement.value is not None:
            lines.append([judgement.floor.name, figure(judgement.value), "", ""])
    return "\n".join(_aligned(lines))


def changed(old: Row, new: Row) -> bool | None:
    """Whether the medians differ by more than the larger spread; `None` if one has no spread."""
    if len(old.values) < 2 or len(new.values) < 2:
        return None
    return abs(new.median - old.median) > max(old.spread, new.spread)


def comparison(old: Results, new: Results) -> str:
    """Old and new medians of the rows that both runs have; marks what changed by more than the spread."""
    notes = [
        f"different {what}: {then} then, {now} now"
        for what, then, now in (
            *((name, old.machine.get(name), new.machine.get(name)) for name in ("cpu", "cores", "python")),
            ("quick", old.options.get("quick"), new.options.get("quick")),
        )
        if then != now
    ]
    lines = [["", "unit", "old", "new", "new / old", ""]]
    for row in new.rows:
        before = old.row(*row.key)
        if before is None or not row.values:
            continue
        mark = {True: "changed", False: "", None: "no spread"}[changed(before, row)]
        ratio = figure(row.median / before.median) if before.median else _NOTHING
        name = f"{row.scenario}/{row.variant} {row.client}"
        lines.append([name, row.unit, figure(before.median), figure(row.median), ratio, mark])
    if len(lines) == 1:
        return "\n".join([f"Nothing to compare with the run of {old.date}.", *notes])
    return "\n".join([f"Compared with the run of {old.date}:", *notes, *_aligned(lines)])


def markdown(results: Results) -> str:
    """The table of the README: a row for each client, the medians of the most telling variants."""
    columns = [
        column
        for column in _COLUMNS
        if any((row.scenario, row.variant) == column[:2] and row.values for row in results.rows)
    ]
    libraries = scenarios.find("import").pseudo_clients
    clients = dict.fromkeys(row.client for row in results.rows if row.client not in libraries)
    lines = [
        "| | " + " | ".join(heading for _, _, heading, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for client in clients:
        cells = []
        for scenario, variant, _, divisor in columns:
            row = results.row(scenario, variant, client)
            cells.append(_NOTHING if row is None else figure(row.median / divisor))
        if any(cell != _NOTHING for cell in cells):
            lines.append(f"| {results.label(client)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
