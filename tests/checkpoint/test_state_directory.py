"""Is what a state directory says of its checkpoints true, fast to list, and safe from clocks and neighbours?"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.checkpoint import arrays as array_files
from jax_client.checkpoint import manifest, store, tags
from jax_client.checkpoint.disk import clock, files, sealed
from jax_client.checkpoint.disk.clock import GRACE_SECONDS, Deadline, Moment
from jax_client.checkpoint.store import CheckpointStore
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError, UnsupportedError
from jax_client.host import disk
from support.checkpoints import RUN, assert_same, key, make_state, save

DAY = 24 * 3600.0


@pytest.fixture
def filled(tmp_path: Path, plain_arrays: None) -> CheckpointStore:
    made = CheckpointStore(tmp_path)
    for i in range(5):
        save(made, f"step-{i}", i)
    made.put_run(RUN, {"base_model": "tiny", "created": 1.0})
    made.list(), made.runs()
    return made


@pytest.fixture
def manifests_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The manifests that were read from the disk, in order."""
    read: list[Path] = []
    original = manifest.read
    monkeypatch.setattr(manifest, "read", lambda directory: (read.append(directory), original(directory))[1])
    return read


def test_a_second_listing_reads_no_manifest(
    filled: CheckpointStore, tmp_path: Path, manifests_read: list[Path]
) -> None:
    fresh = CheckpointStore(tmp_path)
    assert [record.name for record in fresh.list()] == [f"step-{i}" for i in range(5)]
    assert fresh.list(RUN) == filled.list() and fresh.runs() == filled.runs()
    assert manifests_read == []


def test_the_listing_follows_every_change(filled: CheckpointStore, tmp_path: Path, manifests_read: list[Path]) -> None:
    other = CheckpointStore(tmp_path)
    save(other, "step-1", 7, overwrite=True)
    other.delete(key("step-2"))
    other.set_ttl(key("step-3"), 3600)
    other.set_public(key("step-4"), True)
    save(other, "new", 9)
    manifests_read.clear()
    by_name = {record.name: record for record in filled.list()}
    assert sorted(by_name) == ["new", "step-0", "step-1", "step-3", "step-4"]
    assert by_name["step-1"].step == 10 and by_name["step-4"].public
    assert abs((by_name["step-3"].expires_at or 0) - clock.now().wall - 3600) < 60
    assert len(manifests_read) == 4, "only what changed"
    for name, record in by_name.items():
        assert filled.record(key(name)) == record
    other.put_run(RUN, {"base_model": "other", "created": 1.0})
    assert filled.runs() == [(RUN, {"base_model": "other", "created": 1.0})]


def damage_entries(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE checkpoints SET entry = replace(entry, 'step-3', 'step-9')")
        database.execute("UPDATE runs SET entry = 'text'")
    database.close()


def of_a_later_version(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b"no database" * 1000),
        lambda path: (path.unlink(), path.mkdir()),
        damage_entries,
        of_a_later_version,
    ],
    ids=["deleted", "empty", "short", "garbage", "directory", "entries", "later version"],
)
def test_the_catalogue_is_never_the_truth(filled: CheckpointStore, tmp_path: Path, harm: Any) -> None:
    records, runs = filled.list(), filled.runs()
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"catalogue.sqlite{suffix}").unlink(missing_ok=True)
    harm(tmp_path / "catalogue.sqlite")
    for again in (CheckpointStore(tmp_path), filled):
        assert again.list() == records and again.runs() == runs
        save(again, "more", 8, overwrite=True)
        again.delete(key("more"))
    assert filled.repair() == 5 and filled.list() == records


def test_a_locked_catalogue_holds_nobody_up(filled: CheckpointStore, tmp_path: Path) -> None:
    held = sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    save(filled, "new", 9)
    assert [record.name for record in filled.list()][-1] == "new"
    held.close()
    assert [record.name for record in filled.list()][-1] == "new"


def test_a_run_is_open_in_one_process(tmp_path: Path) -> None:
    here = CheckpointStore(tmp_path)
    assert here.lock_holder(RUN) is None
    claim = here.lock_run(RUN)
    owner = here.lock_holder(RUN)
    assert owner is not None and owner.pid == os.getpid()
    code = f"""
    from pathlib import Path
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.errors import RequestFailedError
    store = CheckpointStore(Path({str(tmp_path)!r}))
    assert store.lock_holder({RUN!r}).pid == {os.getpid()}
    try:
        store.lock_run({RUN!r})
    except RequestFailedError as error:
        assert "is open in process {os.getpid()} on " in str(error) and error.category == "user", error
    else:
        raise SystemExit("was opened twice")
    store.lock_run("another-run")  # and dies with it
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
    assert here.lock_holder("another-run") is None, "the system gave the lock back"
    here.lock_run("another-run").release()
    claim.release()
    claim.release()
    assert here.lock_holder(RUN) is None
    here.lock_run(RUN).release()


def test_a_file_system_without_locks_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_arrays: None
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(files, "file_system", lambda path: "nfs4")
    refused = CheckpointStore(tmp_path)
    for call in (lambda: save(refused, "a"), lambda: refused.lock_run(RUN), lambda: refused.put_run(RUN, {})):
        with pytest.raises(UnsupportedError, match=r"type nfs4, which has no file locks.*EngineConfig\.mirror"):
            call()
    assert refused.list() == []


def test_file_systems_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "\n".join(
        [
            "21 1 8:1 / / rw - ext4 /dev/sda1 rw",
            "22 21 0:40 / /net\\040work rw shared:1 - nfs4 host:/x rw",
            "23 22 8:2 / /net\\040work/local rw - xfs /dev/sdb rw",
        ]
    )
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "mounts").write_text(table)
    assert disk.network_file_system(Path("/net work/runs")) == "nfs4"
    assert disk.network_file_system(Path("/net work/local/runs")) is None
    assert disk.file_system(Path("/net works")) == "ext4"


@pytest.mark.parametrize("place", ["gs://bucket/state", Path("s3://bucket/state")])
def test_an_object_store_is_no_state_dir(place: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"object store.*EngineConfig\.mirror"):
        EngineConfig(state_dir=place)


def moment(wall: float, since_boot: float, boot: str = "a") -> Moment:
    return Moment(wall=wall, boot_id=boot, since_boot=since_boot)


def test_a_lifetime_ignores_clock_jumps_while_the_machine_runs() -> None:
    deadline = Deadline.after(7 * DAY, moment(1000 * DAY, 50.0))
    for jump in (-3000 * DAY, -DAY, 0.0, DAY, 3000 * DAY):
        assert not deadline.passed(moment(1000 * DAY + jump, 50.0 + 7 * DAY - 1))
        assert deadline.passed(moment(1000 * DAY + jump, 50.0 + 7 * DAY))


def test_after_a_restart_the_wall_clock_must_insist() -> None:
    deadline = Deadline.after(7 * DAY, moment(1000 * DAY, 50.0))
    early, late = 1006 * DAY, 1008 * DAY
    assert not deadline.observed(moment(early, 10.0, "b")).passed(moment(early, 10.0, "b"))
    # Wrong for some minutes after the start, then set right.
    doubted = deadline.observed(moment(late, 10.0, "b"))
    assert doubted != deadline and not doubted.passed(moment(late, 10.0 + GRACE_SECONDS - 1, "b"))
    calmed = doubted.observed(moment(early, 500.0, "b"))
    assert calmed == deadline
    # Right, for an hour.
    doubted = calmed.observed(moment(late, 600.0, "b"))
    assert doubted.observed(moment(late, 700.0, "b")) == doubted
    assert doubted.passed(moment(late, 600.0 + GRACE_SECONDS, "b"))
    # An hour of another start does not count.
    assert not doubted.passed(moment(late, 9000.0, "c"))


class Clocks:
    """The machine's clocks, set by a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moment = moment(1000 * DAY, 50.0)
        monkeypatch.setattr(clock, "now", lambda: self.moment)

    def go_on(self, seconds: float) -> None:
        self.moment = replace(self.moment, wall=self.moment.wall + seconds, since_boot=self.moment.since_boot + seconds)


def names(of: CheckpointStore) -> list[str]:
    return [record.name for record in of.list()]


def test_expired_checkpoints_go(tmp_path: Path, plain_arrays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    kept = CheckpointStore(tmp_path)
    save(kept, "for-ever")
    save(kept, "for-a-day", ttl_seconds=DAY)
    save(kept, "longer", ttl_seconds=DAY)
    assert kept.set_ttl(key("longer"), 3 * DAY).expires_at == 1003 * DAY
    clocks.moment = replace(clocks.moment, wall=5000 * DAY)  # a jump deletes nothing
    kept.sweep_expired()
    assert len(names(kept)) == 3
    clocks.go_on(DAY)
    kept.sweep_expired()
    assert names(kept) == ["for-ever", "longer"]
    assert kept.set_ttl(key("longer"), None).expires_at is None
    clocks.go_on(1000 * DAY)
    kept.sweep_expired()
    assert names(kept) == ["for-ever", "longer"]


def test_a_lifetime_over_restarts_with_wrong_clocks(
    tmp_path: Path, plain_arrays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(monkeypatch)
    save(CheckpointStore(tmp_path), "a", ttl_seconds=DAY)

    def restart(boot: str, wall: float) -> CheckpointStore:
        clocks.moment = moment(wall, 5.0, boot)
        store = CheckpointStore(tmp_path)
        store.sweep_expired()
        return store

    # Years ahead at the start, and set right within the hour; years behind; both once more.
    for boot in ("b", "c", "d", "e"):
        store = restart(boot, 1000 * DAY + (3000 if boot in "bd" else -3000) * DAY)
        clocks.go_on(GRACE_SECONDS - 60)
        store.sweep_expired()
        assert names(store) == ["a"], boot
        clocks.moment = replace(clocks.moment, wall=1000.5 * DAY)
        store.sweep_expired()
        assert names(store) == ["a"], boot
    store = restart("f", 1001.1 * DAY)
    assert names(store) == ["a"], "the day is over, but so a wrong clock would say"
    clocks.go_on(GRACE_SECONDS)
    store.sweep_expired()
    assert names(store) == []


def test_expiry_spares_readers(tmp_path: Path, plain_arrays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    kept = CheckpointStore(tmp_path)
    save(kept, "a", 3, ttl_seconds=DAY)
    clocks.go_on(2 * DAY)
    inside, go = threading.Event(), threading.Event()
    original = array_files.read

    def slow(directory: Path) -> dict[str, np.ndarray]:
        inside.set()
        assert go.wait(30)
        return original(directory)

    monkeypatch.setattr(array_files, "read", slow)
    answer: list[Any] = []
    reader = threading.Thread(target=lambda: answer.append(kept.load(key("a"))))
    reader.start()
    assert inside.wait(30)
    CheckpointStore(tmp_path).sweep_expired()
    assert names(kept) == ["a"]
    go.set()
    reader.join()
    assert_same(answer[0][0], make_state(3))
    CheckpointStore(tmp_path).sweep_expired()
    assert names(kept) == []
    with pytest.raises(NotFoundError):
        kept.load(key("a"))


def test_an_overwrite_keeps_who_may_see_it_and_has_a_lifetime_of_its_own(tmp_path: Path, plain_arrays: None) -> None:
    kept = CheckpointStore(tmp_path)
    save(kept, "a", 1, ttl_seconds=3600)
    kept.set_public(key("a"), True)
    record = save(kept, "a", 2, overwrite=True)
    assert record.public and record.expires_at is None
    assert kept.record(key("a")) == record == kept.list()[0]


def test_a_damaged_label_neither_deletes_nor_publishes(
    tmp_path: Path, plain_arrays: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(monkeypatch)
    kept = CheckpointStore(tmp_path)
    save(kept, "a", 1, ttl_seconds=3600)
    kept.set_public(key("a"), True)
    path = next(tmp_path.rglob(tags.FILE_NAME))
    path.write_bytes(path.read_bytes().replace(b'"wall": 8', b'"wall": 1'))
    clocks.go_on(100 * DAY)
    kept.sweep_expired()
    record = kept.list()[0]
    assert record.expires_at is None and not record.public and "label.json is damaged" in caplog.text
    assert_same(kept.load(key("a"))[0], make_state(1))
    with pytest.raises(RequestFailedError, match=r"label\.json is damaged"):
        kept.verify(key("a"))
    kept.set_public(key("a"), False)
    kept.verify(key("a"))


def test_a_copy_shares_files_and_outlives_its_source(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path)
    source = save(kept, "a", 4, ttl_seconds=3600)
    copied = kept.copy(key("a"), to_run="copy:train:0")
    assert copied == replace(source, key=key("a", run_id="copy:train:0"), expires_at=None)
    shared = [path for path in tmp_path.glob("runs/copy*/weights/a/*/arrays/**/*") if path.is_file()]
    assert shared and all(path.stat().st_nlink == 2 for path in shared)
    kept.delete(key("a"))
    assert_same(kept.load(copied.key)[0], make_state(4))
    with pytest.raises(NotFoundError):
        kept.copy(key("a"), to_run="copy:train:1")


def test_exports_are_checkpoints_of_files(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path)

    def write(directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{}")

    export = key("x", "external_weights")
    about: dict[str, Any] = {"key": export, "state": make_state(), "metadata": {}, "size_bytes": 2}
    record = kept.save_files(**about, write=write)
    assert kept.list() == [record] and record.kind == "external_weights"
    found = kept.exported_files(export)
    assert {name: path.read_text() for name, path in found.items()} == {"adapter_config.json": "{}"}
    with pytest.raises(BadRequestError, match="is an export"):
        kept.load(export)
    with pytest.raises(RequestFailedError, match="exists already"):
        kept.save_files(**about, write=write)
    found["adapter_config.json"].write_text("[]")
    with pytest.raises(RequestFailedError, match=r"adapter_config\.json is damaged"):
        kept.exported_files(export)

    def fail(directory: Path) -> None:
        raise UnsupportedError("no such form")

    with pytest.raises(UnsupportedError, match="no such form"):
        kept.save_files(**about | {"key": key("y", "external_weights")}, write=fail)
    assert not kept.exists(key("y", "external_weights")) and not list(tmp_path.rglob(".tmp-*"))


def test_sealed_text_is_whole_or_refused() -> None:
    data = sealed.seal({"a": [1, "é"]}, "it")
    assert sealed.unseal(data, "here") == {"a": [1, "é"]}
    for i in range(len(data)):
        harmed = bytearray(data)
        harmed[i] ^= 1
        for bad in (bytes(harmed), data[:i]):
            with pytest.raises(sealed.DamagedError, match="here"):
                sealed.unseal(bad, "here")


def test_the_state_dir_can_be_moved(filled: CheckpointStore, tmp_path: Path) -> None:
    moved = tmp_path.with_name("moved")
    shutil.move(tmp_path, moved)
    assert names(CheckpointStore(moved)) == [f"step-{i}" for i in range(5)]
    assert_same(CheckpointStore(moved).load(key("step-2"))[0], make_state(2))
    shutil.move(moved, tmp_path)


def test_every_failure_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = CheckpointStore(tmp_path / "file")
    with pytest.raises(RequestFailedError, match="could not be opened"):
        broken.lock_run(RUN)
    with pytest.raises(RequestFailedError, match="was not saved"):
        save(broken, "a")
    assert store.CheckpointStore(tmp_path / "file").list() == []
