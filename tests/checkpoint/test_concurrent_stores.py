"""Do processes that save, load, copy and delete at the same time see whole checkpoints only?

The processes are those of test_faults.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint import manifest, reading, tags
from jax_client.checkpoint import store as store_module
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError, RequestFailedError
from support.checkpoints import assert_same, key, make_state, save
from support.faults.fault_children import Children, job
from support.faults.fault_disk import read_log
from support.faults.fault_history import COPIES, assert_swept


def test_two_processes_save_at_the_same_time(
    children: Children, tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    number = 150 if whole else 8
    store = CheckpointStore(tmp_path / "state")
    save(store, "shared", 1)
    seeds = [list(range(1000 * i, 1000 * i + number)) for i in (1, 2)]
    done = [str(tmp_path / f"done-{i}") for i in (1, 2)]
    jobs = [
        job("writer", tmp_path / "state", seeds=seeds[i], done=done[i], own_run=f"own-{i}")
        | {"log": str(tmp_path / f"writer-{i}.log")}
        for i in range(2)
    ]
    jobs.append(job("reader", tmp_path / "state", done=done, goes=False) | {"log": str(tmp_path / "reader.log")})
    assert children.run(*jobs) == [0, 0, 0], [read_log(Path(job["log"]))[-1].said for job in jobs]
    writes = [event.said for i in range(2) for event in read_log(tmp_path / f"writer-{i}.log")]
    reads = [event.said for event in read_log(tmp_path / "reader.log")]
    writes.append({"seed": 1, "began": 0, "ended": 0})
    written = {write["seed"]: write for write in writes}
    reads.append({"seed": found_in_shared(store), "began": 2**63, "ended": 2**63})
    for read in reads:
        mine = written[read["seed"]]
        assert mine["began"] <= read["ended"]
        newer = [w for w in writes if mine["ended"] < w["began"] and w["ended"] < read["began"]]
        assert newer == [], "a version that was acknowledged before is not forgotten"
    for i in range(2):
        for seed in seeds[i]:
            assert_same(store.load(key(f"own-{seed}", run_id=f"own-{i}"))[0], make_state(seed))
        assert len(store.list(f"own-{i}")) == number
    assert_swept(tmp_path / "state")
    tally["saves by two processes at the same time"] += 4 * number
    tally["loads by a third one meanwhile"] += len(reads)


def test_a_reader_of_what_comes_and_goes_sees_it_whole(
    children: Children, tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    store = CheckpointStore(tmp_path / "state")
    save(store, "kept", 1)
    done = str(tmp_path / "done")
    jobs = [job("coming_and_going", tmp_path / "state", seeds=list(range(200 if whole else 10)), done=done)]
    jobs.append(job("reader", tmp_path / "state", done=[done], goes=True) | {"log": str(tmp_path / "reader.log")})
    assert children.run(*jobs) == [0, 0], [read_log(Path(job["log"]))[-1].said for job in jobs]
    tally["loads of a checkpoint that another process deletes and saves again"] += len(
        read_log(tmp_path / "reader.log")
    )


@pytest.fixture
def replaced(tmp_path: Path) -> Callable[[], None]:
    """A store with a checkpoint "a" of seed 1; the call deletes it, and saves another one of that name."""
    store = CheckpointStore(tmp_path / "state")
    save(store, "a", 1)

    def replace() -> None:
        store.delete(key("a"))
        save(store, "a", 2)

    return replace


def test_a_load_meets_a_deletion_and_a_save(
    replaced: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = manifest.verify

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(manifest, "verify", verify)
        replaced()
        verify(*arguments)

    monkeypatch.setattr(manifest, "verify", late)
    assert_same(CheckpointStore(tmp_path / "state").load(key("a"))[0], make_state(2))


@pytest.mark.parametrize("at", ["its manifest", "its hashes", "its arrays", "its tags"])
def test_a_load_meets_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """At each file that it reads: what is loaded is whole, or not found."""
    module, name = {
        "its manifest": (reading, "read_manifest"),
        "its hashes": (manifest, "verify"),
        "its arrays": (array_files, "read"),
        "its tags": (tags, "read_or_none_set"),
    }[at]
    original, deleted = getattr(module, name), []
    other, store = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    save(other, "a", 1)

    def late(*arguments: Any) -> Any:
        if not deleted:
            deleted.append(arguments)
            other.delete(key("a"))
        return original(*arguments)

    for place in (module, store_module):
        if getattr(place, name, None) is original:
            monkeypatch.setattr(place, name, late)
    try:
        state, record = store.load(key("a"))
    except NotFoundError as error:
        assert "has no checkpoint weights/a" in str(error)
    else:
        assert_same(state, make_state(1))
        assert record.key == key("a")
    assert deleted and not store.exists(key("a"))
    save(store, "a", 2)
    assert_same(store.load(key("a"))[0], make_state(2))


def test_a_copy_meets_a_deletion_and_a_save(
    replaced: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, links = os.link, []

    def late(*arguments: Any) -> None:
        links.append(arguments)
        if len(links) == 5:
            replaced()
        link(*arguments)

    monkeypatch.setattr(os, "link", late)
    store = CheckpointStore(tmp_path / "state")
    # An error is as good as a whole copy.
    with contextlib.suppress(RequestFailedError):
        store.copy(key("a"), to_run=COPIES)
    assert len(links) >= 5
    if store.exists(key("a", run_id=COPIES)):
        state = store.load(key("a", run_id=COPIES))[0]
        assert_same(state, make_state(state.step - 3))


def found_in_shared(store: CheckpointStore) -> int:
    state, record = store.load(key("shared"))
    assert_same(state, make_state(state.step - 3))
    assert record.metadata == {"seed": state.step - 3}
    return state.step - 3
