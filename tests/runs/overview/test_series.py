"""Do charts show every spike of a run, and only what is new since the last look?"""

from __future__ import annotations

import math
import sqlite3
import sys
from array import array
from pathlib import Path

import pytest

from jax_client import sqlite_file
from jax_client.checkpoint.store import CheckpointStore
from jax_client.metrics import store
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
    home.mkdir(exist_ok=True)
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
    assert not new.reset and "reset" not in new.to_json()
    # A reader that begins later sees the same.
    again = Overview(home).series(RUN, ["grad_norm:mean"], points=100, since=first.next)
    assert again == new
    for odd in ("", "x", "1", "-", "9" * 50 + "-0", "1e3-0", "²-0", "10-1", "0-10-1", f"0{first.next[1:-1]}2"):
        found = overview.series(RUN, ["grad_norm:mean"], points=100, since=odd)
        assert found.series["grad_norm:mean"]["step"][0] == 1 and found.reset and found.to_json()["reset"] is True


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
    found = overview.series(RUN, None, since=cursor)
    assert found.series["grad_norm:mean"]["step"] == [1, 2, 3] and found.reset


@pytest.mark.parametrize("keeps_inode", [True, False])
def test_a_metrics_file_that_was_replaced_by_a_longer_one_begins_anew(home: Path, keeps_inode: bool) -> None:
    recorded(home, range(1, 11), loss=1.0)
    overview = Overview(home)
    cursor = overview.series(RUN, None).next
    other = home / "other"
    recorded(other, range(1, 16), loss=2.0)
    if keeps_inode:
        (home / FILE_NAME).write_bytes((other / FILE_NAME).read_bytes())
    else:
        (other / FILE_NAME).replace(home / FILE_NAME)
    for reader in (overview, Overview(home)):
        found = reader.series(RUN, None, since=cursor)
        assert found.series["loss"]["value"] == [2.0] * 15 and found.reset
    # The next run's points, and those of a copy of the file, change nothing of this one's.
    MetricsStore(home / FILE_NAME).add([Point(run="s:train:0", kind="step", step=1, time=1.0, metrics={"loss": 3.0})])
    copy = home / "copy"
    copy.write_bytes((home / FILE_NAME).read_bytes())
    copy.replace(home / FILE_NAME)
    again = overview.series(RUN, None, since=found.next)
    assert again.series == {} and not again.reset and again.next == found.next


def test_a_file_that_cannot_be_read_is_not_a_new_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(home, range(1, 6))
    overview = Overview(home)
    first = overview.series(RUN, None)
    recorded(home, range(6, 7))

    def refuse(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    with monkeypatch.context() as patched:
        patched.setattr(sqlite_file.sqlite3, "connect", refuse)
        for reader in (overview, Overview(home)):
            for since in (first.next, "0123-4-5"):
                found = reader.series(RUN, None, since=since)
                assert (found.next, found.series, found.reset) == (since, {}, False)
        assert overview.series(RUN, None).series == first.series
    found = overview.series(RUN, None, since=first.next)
    assert found.series["grad_norm:mean"]["step"] == [6] and not found.reset


@pytest.mark.parametrize("count", [101, 1_000, 99_991])
def test_a_thinned_series_has_the_mean_of_what_each_point_stands_for(count: int) -> None:
    many = Columns()
    values = [float(i % 50 == 0) for i in range(count)]
    values[count // 2], values[count // 3] = 1e300, math.inf
    for i, value in enumerate(values):
        many.add(i + 1, "user", i, 1.0, {"reward": value})
    found = many.series(None, points=100)["reward"]
    assert sum(found["count"]) == count - 1, "every finite value is counted once"
    begin = 0
    for step, number, mean in zip(found["step"], found["count"], found["mean"], strict=True):
        stands_for = [value for value in values[begin : step + 1] if math.isfinite(value)]
        assert number == len(stands_for)
        assert mean == (pytest.approx(math.fsum(stands_for) / number, rel=1e-12) if number else None)
        begin = step + 1
    assert begin == count
    assert "mean" not in many.series(None, points=count)["reward"], "nothing was left out"
    whole = many.series(None, points=100, since=count - 50)["reward"]
    assert len(whole["value"]) == 50 and "count" not in whole


def test_the_mean_of_the_largest_numbers_is_a_number() -> None:
    many = Columns()
    for i in range(100):
        many.add(i + 1, "user", i, 1.0, {"a": sys.float_info.max, "b": math.nan})
    found = many.series(None, points=10)
    assert found["a"]["mean"] == pytest.approx([sys.float_info.max] * len(found["a"]["mean"]))
    assert set(found["b"]["mean"]) == {None} and set(found["b"]["count"]) == {0}


def test_tokens_grow_by_what_was_trained_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # To step 1001 and back: load_state between.
    for step in (1, 2, 3, 1_001, 1_002, 2, 3):
        recorded(home, range(step, step + 1), **{"tokens:sum": 10.0})
    tokens = Overview(home).series(RUN, None).series["tokens:sum"]["tokens"]
    assert tokens == [10, 20, 30, 40, 50, 60, 70]
    # What the file has left out since counts.
    monkeypatch.setattr(store, "MAX_POINTS", 100)
    monkeypatch.setattr(store, "NEWEST", 10)
    recorded(home, range(4, 500), **{"tokens:sum": 10.0})
    found = Overview(home).series(RUN, None).series["tokens:sum"]
    assert len(found["step"]) <= 100 and found["tokens"][-1] == 10 * (7 + 496)


def test_numbers_that_no_column_holds_are_bounded() -> None:
    many = Columns()
    for i, step in enumerate((1, 2**80, -(2**80), 4), 1):
        many.add(i, "step", step, math.inf, {"tokens:sum": 1e308, "a": float(i), "loss:mean": 1.0, "loss:sum": 3e308})
    series = many.series(None, points=10)
    assert series["a"]["step"] == [1, 2**53, -(2**53), 4] and series["a"]["value"] == [1.0, 2.0, 3.0, 4.0]
    assert series["a"]["tokens"] == [2**53] * 4 and series["loss:mean"]["value"] == [1.0] * 4


def test_a_table_has_every_point_of_every_kind_in_its_order(home: Path) -> None:
    for step in range(1, 4):
        recorded(home, range(step, step + 1), loss=step / 2)
        recorded(home, range(step, step + 1), "user", reward=1.0)
        recorded(home, range(step, step + 1), "device", memory=2.0)
    overview = Overview(home)
    table = overview.table(RUN, None, without=("device",))
    recorded(home, range(4, 3_000), loss=2.0)
    overview.series(RUN, None)
    rows = [(row.kind, row.step, row.time, row.values) for row in table.rows]
    assert table.names == ["loss", "reward"]
    assert rows == [
        each
        for step in range(1, 4)
        for each in (("step", step, 100.0 + step, [step / 2, ""]), ("user", step, 100.0 + step, ["", 1.0]))
    ], "as it was when the table was asked for"
    assert [row.step for row in overview.table(RUN, ["loss"]).rows] == list(range(1, 3_000))


def test_a_table_stays_whole_where_every_second_row_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_VALUES", 5_000)
    many = Columns()
    for row in range(1, 5_001):
        many.add(row, "user", row, math.nan, {"a": float(row)})
    table = many.table(None)
    many.add(5_001, "user", 5_001, math.nan, {"a": 5_001.0})
    assert many.values < 3_000 and many.mark(5_000) is None and many.mark(5_001) == 0
    assert [row.values[0] for row in table.rows] == [float(row) for row in range(1, 5_001)]


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
