"""Does a list of runs say what is known of each, and read little of what they recorded?"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import main
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError
from jax_client.metrics.store import FILE_NAME, Event, MetricsStore, Point
from jax_client.runs.overview import rows, small_file
from jax_client.runs.overview.notes import Note, Notes
from jax_client.runs.overview.rows import Overview
from jax_client.runs.overview.verified import Verified, verify
from jax_client.values import CheckpointKey, Owner
from support.command_line import GOOD, LATER, OTHER, RUN, SAMPLER, SPEC, damage, fill, state


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return fill(tmp_path / "state")


def record(home: Path, run: str, steps: range, **more: float) -> None:
    points = [
        Point(
            run=run,
            kind="step",
            step=step,
            time=1000.0 + step,
            metrics={"loss:sum": 2.0 * step, "tokens:sum": 4.0, "tokens_per_second:mean": 50.0, **more},
        )
        for step in steps
    ]
    MetricsStore(home / FILE_NAME).add(points)


def test_a_row_joins_records_metrics_checkpoints_and_notes(home: Path) -> None:
    record(home, RUN, range(1, 11))
    MetricsStore(home / FILE_NAME).add(
        [Point(run=RUN, kind="user", step=10, time=1010.0, metrics={"reward/mean": 0.25})],
        [Event(run=RUN, kind="save", step=3, time=1003.0, details={"path": GOOD, "loss": 1.5, "reward": 0.25})],
    )
    overview = Overview(home)
    overview.put_note(RUN, Note(note="the good one", tags=["a", "b"]))
    row = overview.run(RUN)
    assert (row.step, row.loss, row.reward, row.tokens, row.tokens_per_second) == (10, 5.0, 0.25, 40, 50.0)
    assert (row.checkpoints, row.last_checkpoint, row.model, row.rank) == (2, SAMPLER, "org/model", 4)
    assert (row.note, tuple(row.tags), row.archived) == ("the good one", ("a", "b"), False)
    assert row.spark_name == "reward" and row.user_metadata == {"note": "first\ttry"}
    assert json.loads(json.dumps(row.to_json(), allow_nan=False))["run"] == RUN
    good = next(each for each in overview.checkpoints(RUN) if each.path == GOOD)
    assert (good.kind, good.loss, good.reward, good.step) == ("training", 1.5, 0.25, 3)
    assert good.resume == f'service_client.create_training_client_from_state_with_optimizer("{GOOD}")'
    assert [each.path for each in overview.checkpoints()] == [LATER, SAMPLER, GOOD]
    assert overview.config(RUN)["spec"]["rank"] == 4
    for ask in (overview.run, overview.config, overview.checkpoints, lambda run: overview.series(run, None)):
        with pytest.raises(NotFoundError, match="nope"):
            ask("nope")


def test_the_step_is_that_of_the_run_and_not_of_what_it_saved(home: Path) -> None:
    assert Overview(home).run(RUN).step == 3, "nothing else tells"
    record(home, RUN, range(1, 4))
    # It goes back to the step before the one that it saved.
    MetricsStore(home / FILE_NAME).add([], [Event(run=RUN, kind="load", step=0, time=1004.0, details={})])
    record(home, RUN, range(1, 2))
    assert Overview(home).run(RUN).step == 1


def test_a_checkpoint_with_odd_times_is_listed(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    store, key = CheckpointStore(home), CheckpointKey(RUN, "weights", "odd")
    saved = {"base_model": "m", "base_fingerprint": "f", "spec": SPEC.to_json(), "optimizer": None}
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1e300)
        store.save(key=key, state=state(4, True), metadata=saved, ttl_seconds=60.0)
    for again in (CheckpointStore(home), CheckpointStore(home)):  # from its manifest, then from the catalogue
        found = next(record for record in again.list() if record.key == key)
        assert (found.created, found.expires_at) == (0.0, None)
    assert len(Overview(home).runs()) == 2
    assert main(["checkpoint", "list", "--state-dir", str(home)]) == 0 and "odd" in capsys.readouterr().out


def test_a_resumed_run_is_tied_to_its_first(home: Path) -> None:
    store = CheckpointStore(home)
    store.put_run("later:train:0", {"created": time.time() + 1, "base_model": "m", "resumed_from": GOOD, "script": "x"})
    store.put_run("odd:train:0", {"created": 1.0, "resumed_from": ["no", "path"], "user_metadata": {"name": "<b>bold"}})
    rows = {row.run: row for row in Overview(home).runs()}
    assert (rows["later:train:0"].parent, rows["later:train:0"].resumed_from) == (RUN, GOOD)
    assert rows[RUN].children == ["later:train:0"] and rows[OTHER].children == ()
    assert rows["odd:train:0"].parent is None and rows["odd:train:0"].name == "<b>bold"
    assert next(iter(rows)) == "later:train:0", "the newest sign of life is first"


def test_checks_of_checkpoints_are_kept_until_they_are_written_anew(home: Path) -> None:
    store, key = CheckpointStore(home), CheckpointKey.parse(GOOD)
    assert verify(store, home, key)["ok"] is True
    damage(home, f"runs/{RUN.replace(':', '%3A')}/sampler_weights/good/*/arrays/**/*")
    assert verify(store, home, CheckpointKey.parse(SAMPLER))["ok"] is False
    rows = {row.path: row for row in Overview(home).checkpoints()}
    assert rows[GOOD].verified is not None and rows[GOOD].verified["ok"] and rows[LATER].verified is None
    assert rows[SAMPLER].verified is not None and "damaged" in rows[SAMPLER].verified["error"]
    saved = {"base_model": "m", "base_fingerprint": "f", "spec": SPEC.to_json(), "optimizer": None}
    store.save(key=key, state=state(4, True), metadata=saved, overwrite=True)
    rows = {row.path: row for row in Overview(home).checkpoints()}
    assert rows[GOOD].verified is None and rows[GOOD].step == 4
    with pytest.raises(NotFoundError):
        verify(store, home, CheckpointKey(RUN, "weights", "nope"))
    assert Verified(home).of(GOOD.replace("good", "nope"), 0.0) is None


def test_the_oldest_checks_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_file, "MAX_BYTES", 20_000)
    checks = Verified(tmp_path)
    checks.record_all({f"old{number}": "\N{SNOWMAN}" * 500 for number in range(10)})
    checks.record("new", None)
    assert checks.of("new", 0.0) is not None and checks.of("old9", 0.0) is not None and checks.of("old0", 0.0) is None
    assert (tmp_path / "verified.json").stat().st_size <= 20_000


def test_another_owner_s_runs_are_not_there(tmp_path: Path) -> None:
    mine, other = Owner("ann"), Owner("bob")
    for owner in (mine, other):
        CheckpointStore(tmp_path, owner=owner).put_run(f"{owner.name}:train:0", {"created": 1.0})
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text('{"a": 1}\n')
    seen = Overview(tmp_path, owner=mine, logs=[tmp_path / "logs"])
    assert [(row.run, row.key) for row in seen.runs()] == [("ann:train:0", "ann")]
    with pytest.raises(NotFoundError):
        seen.series("bob:train:0", None)
    assert {row.run for row in Overview(tmp_path, logs=[tmp_path / "logs"]).runs()} == {
        "ann:train:0", "bob:train:0", "log:logs",
    }  # fmt: skip


def test_a_list_of_runs_reads_a_summary_of_each_and_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    runs = [f"{number}:train:0" for number in range(60)]
    for run in runs:
        store.put_run(run, {"created": 1.0})
        store.lock_run(run).release()
    metrics = {"loss:sum": 1.0, "tokens:sum": 4.0}
    points = [
        Point(run=run, kind="step", step=step, time=float(step), metrics=metrics) for run in runs for step in range(31)
    ]
    MetricsStore(tmp_path / FILE_NAME).add(points)
    counts: Counter[str] = Counter()
    begin = sqlite3.connect

    def counted(*arguments: Any, **more: Any) -> sqlite3.Connection:
        database = begin(*arguments, **more)
        database.set_trace_callback(lambda text: counts.update([text.split()[0] if "points" not in text else "points"]))
        return database

    Overview(tmp_path).runs()  # which remembers the runs' own files in the catalogue
    monkeypatch.setattr(sqlite3, "connect", counted)
    opened: Counter[str] = Counter()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.update([path.name]) or read(path))
    rows = Overview(tmp_path).runs()
    assert len(rows) == 60 and all(row.step == 30 and row.tokens == 124 for row in rows)
    assert counts["points"] == 0 and counts["SELECT"] <= 4, counts
    assert not opened, "run.json and manifests are in the catalogue"


def test_a_file_of_an_earlier_version_is_summarised_from_its_points(home: Path) -> None:
    record(home, RUN, range(1, 21))
    with closing(sqlite3.connect(home / FILE_NAME, isolation_level=None)) as database:
        database.execute("DROP TABLE summaries")
        database.execute("DROP INDEX events_of_kind")
        database.execute("PRAGMA user_version = 1")
    assert Overview(home).run(RUN).step == 20
    record(home, RUN, range(21, 23))
    row = Overview(home).run(RUN)
    assert (row.step, row.tokens) == (22, 88)


def test_the_token_changes_with_what_is_recorded(home: Path) -> None:
    record(home, RUN, range(1, 3))
    overview = Overview(home)
    overview.runs()
    known = {overview.changed()}
    record(home, RUN, range(3, 4))
    known.add(overview.changed())
    overview.put_note(RUN, Note(archived=True))
    known.add(overview.changed())
    CheckpointStore(home).delete(CheckpointKey.parse(GOOD))
    known.add(overview.changed())
    CheckpointStore(home).put_run("new:train:0", {"created": 1.0})
    known.add(overview.changed())
    assert len(known) == 5


def test_notes_are_bounded_and_survive_nonsense(home: Path) -> None:
    overview = Overview(home)
    for wrong in ({"note": "x" * 5_000}, {"tags": ["y" * 60]}, {"tags": "abc"}, {"tags": ["a"] * 21}, {"archived": 1}):
        with pytest.raises(BadRequestError):
            Note(**wrong)  # type: ignore[arg-type]
    overview.put_note(RUN, Note(note="a"))
    overview.put_note(OTHER, Note(archived=True))
    overview.put_note(RUN, Note())
    assert overview.note(RUN) == Note() and overview.note(OTHER).archived
    for text in ("[", '{"a": 1}', f'{{"{RUN}": {{"note": 3}}}}', f'{{"{RUN}": {{"other": ""}}}}', "[" * 100_000):
        (home / "notes.json").write_text(text)
        assert overview.note(RUN) == Note() and len(overview.runs()) == 2
    with pytest.raises(NotFoundError):
        overview.put_note("nope", Note(note="a"))


def test_no_note_hides_the_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_file, "MAX_BYTES", 20_000)
    notes = Notes(home)
    notes.put(OTHER, Note(archived=True, tags=["keep"]))
    long, taken = Note(note="\N{SNOWMAN}" * 1_000), 0
    with pytest.raises(BadRequestError, match=r"notes\.json would have \d+ bytes of 20000 that it may have; shorten"):
        for taken in range(10):
            notes.put(f"r{taken}", long)
    assert taken == 3 and notes.of(f"r{taken - 1}").note == long.note and notes.of(OTHER).archived
    # A file that an earlier version let grow is read, and can be made smaller.
    monkeypatch.setattr(small_file, "MAX_BYTES", 10_000)
    assert notes.of(OTHER).archived and Notes(home).of("r0").note == long.note
    for refused in (Note(note="more"), Note(tags=["more"])):
        with pytest.raises(BadRequestError, match="may have"):
            notes.put("new", refused)
    notes.put("r0", Note())
    notes.put("r1", Note())
    notes.put("new", Note(note="more"))
    assert notes.of("new").note == "more" and notes.of("r2").note == long.note
    monkeypatch.setattr(small_file, "MAX_READ_BYTES", 10)
    assert notes.of("new") == Note()
    with pytest.raises(RequestFailedError, match="of 10 that are read"):
        notes.put("new", Note())


@pytest.mark.parametrize("odd", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_lacks_keeps_no_note_from_being_written(home: Path, odd: str) -> None:
    (home / "notes.json").write_text(f'{{"{OTHER}": {{"note": "x", "tags": [], "archived": true}}, "z": {odd}}}')
    overview = Overview(home)
    overview.put_note(RUN, Note(note="y"))
    assert overview.note(RUN).note == "y" and overview.note(OTHER).archived


def test_notes_that_cannot_be_read_now_are_not_lost(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(home)
    notes.put(OTHER, Note(archived=True))
    with monkeypatch.context() as patch:

        def refused(path: Path) -> bytes:
            raise OSError(5, "Input/output error")

        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(RequestFailedError, match="Input/output error"):
            notes.put(RUN, Note(note="y"))
        assert Notes(home).of(OTHER) == Note()
    assert notes.of(OTHER).archived


def test_nothing_is_made_where_nothing_is(tmp_path: Path) -> None:
    assert Overview(tmp_path / "none").runs() == [] and Overview(tmp_path / "none").checkpoints() == []
    Overview(tmp_path / "none").changed()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_hides_no_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointStore(home).lock_run(RUN).release()

    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    assert {row.run: row.state for row in Overview(home).runs()} == {RUN: "unknown", OTHER: "unknown"}


def test_the_devices_of_open_runs_cost_no_history(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(home, RUN, range(1, 30))
    store = MetricsStore(home / FILE_NAME)
    for step in range(30):
        point = Point(run=RUN, kind="device", step=step, time=2000.0 + step, metrics={"memory_bytes/kv": float(step)})
        store.add([point], [Event(run=RUN, kind="compile", step=step, time=3000.0 + step, details={"program": "f"})])
    overview = Overview(home)
    monkeypatch.setattr(MetricsStore, "read", lambda *_, **__: pytest.fail("the history was read"))
    found = overview.device(RUN, most=2)
    assert found["point"] == {"time": 2029.0, "metrics": {"memory_bytes/kv": 29.0}}
    assert [(each["step"], each["details"]["program"]) for each in found["compiles"]] == [(28, "f"), (29, "f")]
    assert overview.device(OTHER, most=2) == {"point": None, "compiles": []}
    assert Overview(home / "none").device(RUN, most=2) == {"point": None, "compiles": []}


def test_the_points_of_watched_runs_are_read_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(home)
    runs = [f"0b1c2d3e-watched{number}:train:0" for number in range(20)]
    for run in runs:
        store.put_run(run, {"base_model": "m", "created": 1.0})
        record(home, run, range(1, 4))
    overview = Overview(home)
    first = [overview._run_points(run) for run in runs for _ in range(2) if overview.series(run, None)]
    assert [overview._run_points(run) for run in runs] == first[::2]
    monkeypatch.setattr(rows, "MOST_VALUES", 3 * first[0].values)
    overview._run_points(runs[-1])
    assert list(overview._points.values()) == first[-5::2], "what is in memory is bounded by its numbers"
