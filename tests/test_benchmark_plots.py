"""The figures of the benchmark."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from benchmarks import plots
from benchmarks.clients import NAMES
from benchmarks.results import FORMAT, Results, Row

if TYPE_CHECKING:
    from pathlib import Path

VARIANTS = {
    "cost": ("burst", "streamed"),
    "in_flight": ("interleaved", "streamed-32"),
    "size": ("size", "256"),
    "latency": ("latency", "idle"),
    "batch": ("batch", "long"),
}


def results(*figures: str) -> Results:
    rows = [
        Row(*VARIANTS[figure], name, "µs", [position + 1.0, position + 1.5])
        for figure in figures
        for position, name in enumerate(NAMES)
    ]
    return Results(FORMAT, "2026-01-01", {}, {}, {}, {}, rows)


def drawn(measured: Results, directory: Path) -> dict[str, bytes]:
    directory.mkdir()
    return {path.name: path.read_bytes() for path in plots.draw(measured, directory)}


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (drawn(results(*VARIANTS), tmp_path / name) for name in "ab")
    assert set(first) == {figure + suffix for figure in VARIANTS for suffix in (".png", ".svg")}
    assert first == second


@pytest.mark.parametrize("figure", VARIANTS)
def test_a_figure_without_results_is_not_drawn(tmp_path: Path, figure: str) -> None:
    assert set(drawn(results(figure), tmp_path / "a")) == {f"{figure}.png", f"{figure}.svg"}


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert drawn(results(), tmp_path / "a") == {}


@pytest.mark.parametrize("wanted", [[0.5] * 12, [0.1, 0.11, 0.5, 0.51, 0.9], [0.0, 0.5, 1.0]])
def test_labels_keep_their_order_and_distance(wanted: list[float]) -> None:
    places = plots._apart(wanted, 0.05)
    assert all(after - before >= 0.05 - 1e-9 for before, after in itertools.pairwise(places))
    assert sum(places) == pytest.approx(sum(wanted))
