"""The figures of a run: as JSON, and in words."""

from __future__ import annotations

import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Final

import msgspec

from .histogram import Percentiles  # noqa: TC001 - as above
from .words import duration, percentage, printable, rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Summary", "as_text"]

_ERRORS_SHOWN: Final = 10
_COLUMNS: Final = ("p50", "p90", "p99", "mean", "max")


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a run, or of a part of it. The names in JSON say the units.

    * `version`: of this package. `started`, `ended`: by the clock on the wall; `elapsed`: seconds between.
    * `done`, `failed`: prompts that got an answer, and that got none. `skipped`: answered in an earlier run.
    * `attempts`: how often a prompt was given to an agent. `retried`: those after the first.
    * `reconnects`: connections opened in place of others.
    * `tokens`: of the answers, as far as the agents said. `lost_tokens`: of attempts that failed.
    * `requests_per_second`, `tokens_per_second`: `done` and `tokens` by `elapsed`.
    * `first_event`, `between_events`, `attempt`, `end_to_end`: see `Latencies`; ``None``: there were none.
    * `errors`: why prompts failed: how many for which reason. `attempt_errors`: the same for attempts.
    * `settings`: those worth showing.
    """

    version: str
    started: datetime.datetime
    ended: datetime.datetime
    elapsed: float = msgspec.field(name="elapsed_seconds")
    done: int
    failed: int
    skipped: int
    attempts: int
    retried: int
    reconnects: int
    tokens: int
    lost_tokens: int
    requests_per_second: float
    tokens_per_second: float
    first_event: Percentiles | None = msgspec.field(name="first_event_seconds")
    between_events: Percentiles | None = msgspec.field(name="between_events_seconds")
    attempt: Percentiles | None = msgspec.field(name="attempt_seconds")
    end_to_end: Percentiles | None = msgspec.field(name="end_to_end_seconds")
    errors: dict[str, int]
    attempt_errors: dict[str, int]
    settings: dict[str, str]

    @property
    def latencies(self) -> tuple[tuple[str, Percentiles | None], ...]:
        """The distributions, with what they are called."""
        return (
            ("to first event", self.first_event),
            ("between events", self.between_events),
            ("one attempt", self.attempt),
            ("end to end", self.end_to_end),
        )


def as_text(summary: Summary) -> str:
    """A few lines of at most 80 columns, for the end of a run in a terminal; ends with a line feed."""
    finished = summary.done + summary.failed
    prompts = "prompt" if finished == 1 else "prompts"
    blocks = [[f"{finished:,} {prompts} in {duration(summary.elapsed)}"]]
    if counted := list(_counts(summary, finished)):
        blocks.append(_aligned(counted, last_to_the_left=True))
    if measured := [
        (name, *(duration(getattr(figures, column)) for column in _COLUMNS))
        for name, figures in summary.latencies
        if figures
    ]:
        blocks.append(_aligned([("", *_COLUMNS), *measured]))
    if summary.errors:
        blocks.append(["failed with", *_aligned(_errors(summary.errors))])
    return "\n".join("".join(f"{line}\n" for line in block) for block in blocks)


def _counts(summary: Summary, finished: int) -> Iterator[tuple[str, str, str]]:
    def row(name: str, number: int, more: str = "") -> tuple[str, str, str]:
        return name, f"{number:,}", more

    if finished:
        yield row("answered", summary.done, f"{rate(summary.requests_per_second)} per second")
        more = f"{percentage(summary.failed, finished)} of all" if summary.failed else ""
        yield row("failed", summary.failed, more)
    if summary.skipped:
        yield row("skipped", summary.skipped, "answered before")
    if summary.tokens:
        yield row("tokens", summary.tokens, f"{rate(summary.tokens_per_second)} per second")
    if summary.lost_tokens:
        yield row("tokens lost", summary.lost_tokens, "by attempts that failed")
    if summary.retried:
        yield row("retried", summary.retried, f"{summary.attempts:,} attempts in all")
    if summary.reconnects:
        yield row("reconnects", summary.reconnects)


def _errors(errors: dict[str, int]) -> Iterator[tuple[str, str]]:
    kinds = sorted(errors, key=lambda kind: -errors[kind])
    for kind in kinds[:_ERRORS_SHOWN]:
        yield f"  {printable(kind)}", f"{errors[kind]:,}"
    if rest := kinds[_ERRORS_SHOWN:]:
        yield f"  {len(rest)} other errors", f"{sum(errors[kind] for kind in rest):,}"


def _aligned(rows: Iterable[Sequence[str]], *, last_to_the_left: bool = False) -> list[str]:
    """Columns of equal width, two spaces apart: the first to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, len(widths) - 1} if last_to_the_left else {0}
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
