"""Does the metrics file keep what it is given, within its bounds, and does its trouble stay its own?"""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.metrics import store
from jax_client.metrics.store import FILE_NAME, Event, MetricsStore, Point


def point(run: str = "r", step: int = 1, kind: str = "step", **metrics: float) -> Point:
    return Point(run=run, kind=kind, step=step, time=float(step), metrics=metrics)


def event(run: str = "r", kind: str = "save", **details: Any) -> Event:
    return Event(run=run, kind=kind, step=1, time=1.0, details=details)


def test_what_is_added_is_read_from_a_cursor_on(tmp_path: Path) -> None:
    kept = MetricsStore(tmp_path / FILE_NAME)
    assert kept.read("r").points == ()
    assert kept.add([point(step=i, loss=i / 2) for i in range(5)], [event(path="p", seconds=0.5)])
    kept.add([point("other", loss=9.0)])
    first = kept.read("r", limit=3)
    assert [p.step for p in first.points] == [0, 1, 2] and first.more
    assert first.points[1].metrics == {"loss": 0.5} and first.events[0].details == {"path": "p", "seconds": 0.5}
    second = kept.read("r", first.cursor)
    assert [p.step for p in second.points] == [3, 4] and not second.events and not second.more
    assert kept.read("r", second.cursor).points == []
    kept.add([point(step=5)])
    assert [p.step for p in kept.read("r", second.cursor).points] == [5]
    assert [(run["run"], run["points"], run["step"]) for run in kept.runs()] == [("r", 6, 5), ("other", 1, 1)]


def test_only_finite_numbers_and_plain_details_are_kept(tmp_path: Path) -> None:
    kept = MetricsStore(tmp_path / FILE_NAME)
    wild: dict[str, Any] = {"a": math.nan, "b": math.inf, "c": 10**400, "d": object(), "e": np.float32(0.5), "f": 1}
    wild |= {f"m{i}": 0.0 for i in range(2 * store.MAX_KEYS)}
    details: dict[str, Any] = {"a": object(), "b": math.nan, "c": "x" * 10_000, "d": True}
    assert kept.add([Point(run="r", kind="step", step=1, time=0.0, metrics=wild)], [event(**details)])
    found = kept.read("r")
    assert {name for name in found.points[0].metrics if not name.startswith("m")} == {"e", "f"}
    assert len(found.points[0].metrics) == store.MAX_KEYS
    assert found.events[0].details == {"c": "x" * store.MAX_TEXT, "d": True}


def test_a_long_run_is_thinned_to_one_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_POINTS", 200)
    monkeypatch.setattr(store, "NEWEST", 20)
    monkeypatch.setattr(store, "MAX_EVENTS", 10)
    kept, count = MetricsStore(tmp_path / FILE_NAME), 5_000
    for start in range(0, count, 50):
        kept.add([point(step=i, kind=kind) for i in range(start, start + 50) for kind in ("step", "device")], [event()])
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
            (rows,) = database.execute("SELECT MAX(rows) FROM series").fetchone()
        assert rows <= 200
    steps = [p.step for p in kept.read("r").points if p.kind == "step"]
    assert steps[0] == 0 and steps[-20:] == list(range(count - 20, count)) and len(steps) > 50
    old = np.diff([step for step in steps if step < count - 200])
    assert len(set(old.tolist())) == 1, "the same density from the beginning on"
    assert kept.runs()[0]["points"] == 2 * len(steps), "the rows are counted right"
    assert len(kept.read("r").events) == 10


def test_an_overview_has_the_ends_and_is_evenly_spread(tmp_path: Path) -> None:
    kept = MetricsStore(tmp_path / FILE_NAME)
    kept.add([point(step=i, loss=float(i)) for i in range(1_001)], [event()])
    kept.add([point(step=i, kind="device") for i in range(3)])
    found = kept.overview("r", most=11)
    steps = [p.step for p in found.points if p.kind == "step"]
    assert steps == list(range(0, 1_001, 100)) and len(found.points) == 11 + 3 and len(found.events) == 1
    assert found.cursor == kept.read("r", limit=10_000).cursor, "and goes on after all there is"
    assert kept.overview("r", found.cursor, most=11).points == []


@pytest.mark.parametrize("damage", ["text", "page"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE_NAME
    kept = MetricsStore(path)
    kept.add([point(step=i, loss=1.0) for i in range(500)])
    data = b"no database at all" * 100 if damage == "text" else path.read_bytes()[:4096] + b"\xaa" * 12_288
    path.write_bytes(data)
    assert kept.add([point(step=500)])
    assert [p.step for p in kept.read("r").points] == [500]
    assert path.with_name(FILE_NAME + ".damaged").read_bytes() == data
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "damaged" in caplog.text
    path.write_bytes(data)
    assert not kept.read("r").points, "a reader sets it aside, too"


def test_a_file_that_cannot_be_written_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = MetricsStore(tmp_path / "file" / FILE_NAME)
    assert not kept.add([point()]) and not kept.add([point()]) and kept.read("r").points == ()
    assert len(caplog.records) == 1 and "metrics are not recorded" in caplog.text


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    assert not MetricsStore(tmp_path / FILE_NAME).add([point()])
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom jax_client.metrics.store import MetricsStore, Point\n"
        "kept = MetricsStore(Path(sys.argv[1]))\n"
        "for i in range(100):\n"
        "    for run in ('shared', sys.argv[2]):\n"
        "        done = kept.add([Point(run=run, kind='step', step=i, time=0.0, metrics={'loss': 1.0})])\n"
        "        done or sys.exit(1)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / FILE_NAME)]
    writers = [subprocess.Popen([*arguments, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    kept = MetricsStore(tmp_path / FILE_NAME)
    assert len(kept.read("shared").points) == 200
    for name in "ab":
        assert [p.step for p in kept.read(name).points] == list(range(100))


def test_all_runs_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BYTES", 200_000)
    monkeypatch.setattr(store, "_LOOK_EVERY", 100)
    kept = MetricsStore(tmp_path / FILE_NAME)
    for run in range(12):
        for start in range(0, 500, 50):
            kept.add(
                [point(f"run{run}", step=i, loss=0.123456789) for i in range(start, start + 50)], [event(f"run{run}")]
            )
    found = {run["run"] for run in kept.runs()}
    assert found == {f"run{i}" for i in range(12 - len(found), 12)}, "the newest runs, whole"
    assert 2 <= len(found) < 12 and all(run["points"] == 500 for run in kept.runs())
    assert not kept.read("run0").points and not kept.read("run0").events
    assert (tmp_path / FILE_NAME).stat().st_size < 300_000, "the space is given back"
    for start in range(0, 20_000, 500):
        kept.add([point("long", step=i, loss=0.123456789) for i in range(start, start + 500)])
    assert {run["run"]: run["step"] for run in kept.runs()}["long"] == 19_999
    assert kept.read("long", limit=10_000).points[-1].step == 19_999
    assert (tmp_path / FILE_NAME).stat().st_size < 300_000, "also where one run is all there is"
