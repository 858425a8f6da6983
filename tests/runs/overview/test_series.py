"""Do charts show every spike of a run, and only what is new since the last look?"""

from __future__ import annotations

import math
from array import array
from pathlib import Path

import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.metrics.store import FILE_NAME, MAX_POINTS, Event, MetricsStore, Point
from jax_client.runs.overview import columns
from jax_client.runs.overview.columns import Columns, thinned
from jax_client.runs.overview.rows import Overview

RUN = "r:train:0"


def recorded(home: Path, steps: range, kind: str = "step", **metrics: float) -> None:
    points = [
        Point(run=RUN, kind=kind, step=step, time=100.0 + step, metrics=metrics or {"grad_norm:mean": float(step % 7)})
        for step in steps
    ]
    MetricsStore(home / FILE_NAME).add(points)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    CheckpointStore(tmp_path).put_run(RUN, {"created": 1.0})
    return tmp_path


@pytest.mark.parametrize("count", [5, 99, 100, 101, 1_000, 99_991])
@pytest.mark.parametrize("points", [4, 10, 60, 1_000])
def test_a_thinned_series_keeps_its_ends_and_each_extreme(count: int, points: int) -> None:
    values = array("d", (math.sin(i) for i in range(count)))
    spike, dip = count // 3, count // 2
    values[spike], values[dip] = 50.0, -50.0
    chosen = thinned(values, 0, points)
    assert chosen == sorted(set(chosen)) and {0, count - 1, spike, dip} <= set(chosen)
    assert len(chosen) <= max(points, 4) + 4 or len(chosen) == count <= points


def test_a_look_after_a_cursor_has_what_is_new(home: Path) -> None:
    recorded(home, range(1, 11))
    MetricsStore(home / FILE_NAME).add(
        events=[Event(run=RUN, kind="compile", step=1, time=1.0, details={"seconds": 2})]
    )
    overview = Overview(home)
    first = overview.series(RUN, ["grad_norm:mean"], points=100)
    assert first.series["grad_norm:mean"]["step"] == list(range(1, 11)) and len(first.events) == 1
    assert overview.series(RUN, None, points=100, since=first.next).series == {}
    recorded(home, range(11, 14))
    new = overview.series(RUN, ["grad_norm:mean"], points=100, since=first.next)
    assert new.series["grad_norm:mean"]["step"] == [11, 12, 13] and new.events == []
    # A reader that begins later sees the same.
    again = Overview(home).series(RUN, ["grad_norm:mean"], points=100, since=first.next)
    assert again == new
    for odd in ("", "x", "1", "-", "9" * 50 + "-0", "1e3-0", "²-0"):
        assert overview.series(RUN, ["grad_norm:mean"], points=100, since=odd).series["grad_norm:mean"]["step"][0] == 1


def test_the_mean_loss_and_the_tokens_are_derived(home: Path) -> None:
    for step in (1, 2, 3):
        recorded(home, range(step, step + 1), **{"loss:sum": 6.0 * step, "tokens:sum": 3.0})
    recorded(home, range(3, 4), "forward", **{"loss:sum": 8.0, "tokens:sum": 2.0})
    recorded(home, range(3, 4), "user", **{"reward/mean": 0.5, "loss:sum": 1.0})
    series = Overview(home).series(RUN, None).series
    assert series["loss:mean"]["value"] == [2.0, 4.0, 6.0] and series["loss:mean"]["tokens"] == [3, 6, 9]
    assert series["forward/loss:mean"]["value"] == [4.0] and series["forward/loss:mean"]["kind"] == "forward"
    assert series["reward/mean"]["value"] == [0.5] and series["user/loss:sum"]["value"] == [1.0]


def test_a_metrics_file_that_was_deleted_begins_anew(home: Path) -> None:
    recorded(home, range(1, 50))
    overview = Overview(home)
    cursor = overview.series(RUN, None).next
    for path in home.glob(f"{FILE_NAME}*"):
        path.unlink()
    recorded(home, range(1, 4))
    assert overview.series(RUN, None, since=cursor).series["grad_norm:mean"]["step"] == [1, 2, 3]


def test_memory_is_bounded_and_the_newest_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_VALUES", 1_000)
    many = Columns()
    for row in range(1, 10_001):
        many.add(row, "user", row, math.nan, {"a": float(row), **({"b": 1.0} if row % 3 == 0 else {})})
    assert many.values <= 1_000
    series = many.series(None, points=10**6)
    assert series["a"]["step"][-1] == 10_000 and series["a"]["value"] == [float(step) for step in series["a"]["step"]]
    assert series["a"]["time"][0] is None and all(step % 3 == 0 for step in series["b"]["step"])
    for number in range(600):
        many.add(20_000, "user", 20_000, 1.0, {f"name {number}": 1.0})
    assert len(many.names()) <= columns.MAX_NAMES


def test_a_run_that_records_for_ever_is_read_again_where_its_file_was_thinned(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_client.runs.overview import run_points

    monkeypatch.setattr(run_points, "MAX_POINTS", 50)
    overview = Overview(home)
    for start in range(1, 300, 20):
        recorded(home, range(start, start + 20))
        found = overview.series(RUN, None, points=10**6).series["grad_norm:mean"]["step"]
        assert found == list(range(1, start + 20))
    assert MAX_POINTS > 300
