"""Is a flipped bit, a file cut short, or a lost catalogue ever taken for the truth?

The default form damages each file in a few places, `--faults` in fifty.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.checkpoint.record import Record
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import RequestFailedError
from support.checkpoints import RUN, assert_same, files_of, key, make_state, save
from support.faults.fault_history import spread


def damages(data: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    """Flip one bit at positions spread over the bytes, and cut them off there."""
    rng = np.random.default_rng(len(data))
    for at in spread(len(data), number):
        flipped = bytearray(data)
        flipped[at - 1] ^= 1 << int(rng.integers(8))
        yield f"bit flipped in byte {at - 1}", bytes(flipped)
        yield f"cut off at {at - 1}", data[: at - 1]


@pytest.fixture
def labelled(tmp_path: Path) -> CheckpointStore:
    """A store with "good", then "bad", which has a label."""
    store = CheckpointStore(tmp_path / "state")
    store.put_run(RUN, {"seed": 1})
    save(store, "good", 1)
    save(store, "bad", 2, ttl_seconds=3600.0)
    return store


def test_damage_anywhere_is_detected(
    labelled: CheckpointStore, tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    store = labelled
    paths = [path for path in files_of(tmp_path / "state", "bad") if path.name != "label.json"]
    assert len(paths) > 5
    for path in paths:
        original = path.read_bytes()
        for what, data in damages(original, 50 if whole else 3):
            path.write_bytes(data)
            for call in (store.load, store.verify):
                with pytest.raises(RequestFailedError) as caught:
                    call(key("bad"))
                assert str(path) in str(caught.value), what
                assert "newest good checkpoint of this run is weights/good" in str(caught.value), what
                assert caught.value.category == "server"
            tally["damaged files, all detected by load and by verify"] += 1
        path.write_bytes(original)
    assert_same(store.load(key("bad"))[0], make_state(2))
    tally["files of a checkpoint that were damaged"] += len(paths)


@pytest.mark.parametrize("public", [False, True])
def test_a_damaged_label_neither_deletes_nor_publishes(
    labelled: CheckpointStore, tmp_path: Path, tally: Counter[str], whole: bool, public: bool
) -> None:
    store = labelled
    record = store.set_public(key("bad"), public)
    (path,) = (path for path in files_of(tmp_path / "state", "bad") if path.name == "label.json")
    original = path.read_bytes()
    for what, data in damages(original, 50 if whole else 6):
        path.write_bytes(data)
        with pytest.raises(RequestFailedError, match=r"label\.json"):
            store.verify(key("bad"))
        store.sweep_expired()
        private = dataclasses.replace(record, public=False, expires_at=None)
        (listed,) = (other for other in CheckpointStore(tmp_path / "state").list() if other.name == "bad")
        assert listed == private == store.load(key("bad"))[1], what
        tally["damaged labels, all detected by verify"] += 1
    path.write_bytes(original)
    assert store.record(key("bad")) == record


def test_a_damaged_entry_of_a_run_is_detected(
    labelled: CheckpointStore, tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    store = labelled
    records = store.list()
    (path,) = (tmp_path / "state").glob("runs/*/run.json")
    original = path.read_bytes()
    for what, data in damages(original, 50 if whole else 4):
        path.write_bytes(data)
        with pytest.raises(RequestFailedError, match=r"run\.json is damaged"):
            store.run(RUN)
        assert store.runs() == [] and store.list() == records, what
        tally["damaged entries of a run, all detected"] += 1
    path.write_bytes(original)
    assert store.runs() == [(RUN, {"seed": 1})]


def answers(store: CheckpointStore) -> tuple[list[Record], list[Any]]:
    return store.list(), store.runs()


def catalogue_files(state_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in state_dir.glob("catalogue.sqlite*") if path.is_file()}


def forget_catalogue(state_dir: Path) -> None:
    for path in state_dir.glob("catalogue.sqlite*"):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


@pytest.fixture
def listed(tmp_path: Path) -> tuple[Path, tuple[list[Record], list[Any]]]:
    """A state directory that was listed, and what was said."""
    state_dir = tmp_path / "state"
    store = CheckpointStore(state_dir)
    for number in range(3):
        run_id = f"{RUN}{number}"
        store.put_run(run_id, {"number": number})
        save(store, "a", number, run_id=run_id)
        save(store, "b", number, run_id=run_id, ttl_seconds=3600.0)
    before = answers(store)
    forget_catalogue(state_dir)
    assert answers(store) == before == answers(CheckpointStore(state_dir))
    assert len(before[0]) == 6 and len(before[1]) == 3
    return state_dir, before


def assert_unmoved(state_dir: Path, before: tuple[list[Record], list[Any]], live: CheckpointStore) -> None:
    """Whatever the catalogue is, the answers are those of the files, and saving works."""
    for store in (live, CheckpointStore(state_dir), live):
        assert answers(store) == before
    save(live, "more", 7)
    assert_same(CheckpointStore(state_dir).load(key("more"))[0], make_state(7))
    assert [record.name for record in live.list(RUN)] == ["more"]
    live.delete(key("more"))
    assert answers(live) == before


@pytest.mark.parametrize("damage", ["deleted", "emptied", "halved", "cut", "garbage", "a directory", "a newer version"])
def test_the_catalogue_can_be_lost(listed: tuple[Path, tuple[list[Record], list[Any]]], damage: str) -> None:
    state_dir, before = listed
    live = CheckpointStore(state_dir)
    assert answers(live) == before
    path = state_dir / "catalogue.sqlite"
    data = path.read_bytes() if path.exists() else b""
    if damage == "a newer version":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 1000")
        database.close()
    else:
        forget_catalogue(state_dir)
        match damage:
            case "emptied":
                path.write_bytes(b"")
            case "halved":
                path.write_bytes(data[: len(data) // 2])
            case "cut":
                path.write_bytes(data[:-1])
            case "garbage":
                path.write_bytes(np.random.default_rng(0).bytes(20_000))
            case "a directory":
                path.mkdir()
    assert_unmoved(state_dir, before, live)


def test_flipped_bits_in_the_catalogue_change_no_answer(
    listed: tuple[Path, tuple[list[Record], list[Any]]], tally: Counter[str]
) -> None:
    state_dir, before = listed
    path = state_dir / "catalogue.sqlite"
    # An open connection keeps the write-ahead log from being folded in: its bits are flipped too.
    holder = sqlite3.connect(path)
    holder.execute("SELECT count(*) FROM sqlite_master").fetchone()
    live = CheckpointStore(state_dir)
    live.set_ttl(key("a", run_id=f"{RUN}0"), 7200.0)
    before = answers(live)
    originals = catalogue_files(state_dir)
    holder.close()
    rng = np.random.default_rng(0)
    victims = [victim for victim, data in originals.items() if data and not victim.name.endswith("-shm")]
    for trial in range(100):
        forget_catalogue(state_dir)
        for victim, data in originals.items():
            victim.write_bytes(data)
        victim = victims[trial % len(victims)]
        damaged = bytearray(originals[victim])
        for _ in range(1 if trial < 80 else 100):
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        victim.write_bytes(damaged)
        for store in (live, CheckpointStore(state_dir)):
            assert answers(store) == before, (trial, victim.name)
        tally["catalogues with flipped bits, no answer changed"] += 1
    assert_unmoved(state_dir, before, live)


def test_a_locked_catalogue_stops_nobody(listed: tuple[Path, tuple[list[Record], list[Any]]]) -> None:
    state_dir, before = listed
    code = """
    import sqlite3, sys
    database = sqlite3.connect(sys.argv[1], isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    print("locked", flush=True)
    sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines()), str(state_dir / "catalogue.sqlite")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "locked\n"
        assert_unmoved(state_dir, before, CheckpointStore(state_dir))
        holder.communicate()
    assert_unmoved(state_dir, before, CheckpointStore(state_dir))
