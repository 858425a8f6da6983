"""Does an acknowledged checkpoint survive kills, full disks and bit flips, or is the damage reported?"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jax_client.checkpoint.disk import files
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError, UnsupportedError
from jax_client.values import AdapterState, CheckpointKey, LoraSpec
from support.checkpoints import RUN, assert_same, files_of, key, make_state, save
from support.children import STRICT


@pytest.fixture(scope="module")
def saved_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with "good", then "bad", to be copied and damaged."""
    path = tmp_path_factory.mktemp("saved")
    store = CheckpointStore(path)
    save(store, "good", 1)
    save(store, "bad", 2)
    return path


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it reaches the disk."""


class FaultyDisk:
    """The disk operations of `files`, recorded; from operation `at` on, each raises `fault()`."""

    OPERATIONS = ("mkdir", "open", "fsync", "rename", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None, fault: object = Killed) -> None:
        self.at, self.fault = at, fault
        self.events: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        wrapped = {name: self._wrap(name) for name in self.OPERATIONS}
        others = {name: getattr(os, name) for name in dir(os) if name not in wrapped}
        monkeypatch.setattr(files, "os", SimpleNamespace(**others, **wrapped))
        monkeypatch.setattr(files, "shutil", SimpleNamespace(rmtree=self._rmtree, disk_usage=shutil.disk_usage))

    @property
    def failing(self) -> bool:
        return self.at is not None and len(self.events) > self.at

    def _wrap(self, name: str) -> object:
        def operation(target: object, *args: object) -> object:
            path = self._paths.get(target, "?") if isinstance(target, int) else str(target)
            self.events.append((name, path if name != "rename" else f"{path} -> {args[0]}"))
            if self.failing:
                raise self.fault()  # type: ignore[operator]
            result = getattr(os, name)(target, *args)
            if name == "open":
                self._paths[result] = path
            return result

        return operation

    def _rmtree(self, path: Path, ignore_errors: bool = False) -> None:
        if not (self.failing and self.fault is Killed):
            shutil.rmtree(path, ignore_errors=ignore_errors)


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "not" / "there" / "yet")
    assert store.list() == [] and store.runs() == []
    record = save(store, "step-1", 5, metadata={"text": "é", "nested": {"list": [1, None, 2.5]}})
    sampler = save(store, "step-1", 6, kind="sampler_weights", state=make_state(6, optimizer=False))
    state, again = store.load(key("step-1"))
    assert_same(state, make_state(5))
    assert again == record == store.record(key("step-1")) == store.verify(key("step-1"))
    assert record.metadata == {"text": "é", "nested": {"list": [1, None, 2.5]}}
    assert_same(store.load(key("step-1", "sampler_weights"))[0], make_state(6, optimizer=False))
    # Another process sees the same.
    assert CheckpointStore(tmp_path / "not" / "there" / "yet").list(RUN) == [record, sampler]
    assert store.list("other:train:0") == []


def test_name_is_taken_until_overwritten_or_deleted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, "a", 1)
    with pytest.raises(RequestFailedError, match=r"from step 4, saved \d{4}-.*pass overwrite=True") as caught:
        save(store, "a", 2)
    assert caught.value.category == "user"
    assert_same(store.load(key("a"))[0], make_state(1))
    save(store, "a", 2, overwrite=True)
    assert_same(store.load(key("a"))[0], make_state(2))
    assert [record.metadata for record in store.list()] == [{"seed": 2}]
    assert len(list(tmp_path.glob("runs/*/weights/a/*"))) == 1
    store.delete(key("a"))
    assert not store.exists(key("a")) and store.list() == []
    with pytest.raises(NotFoundError):
        store.delete(key("a"))
    save(store, "a", 3)
    assert_same(store.load(key("a"))[0], make_state(3))


def test_missing_checkpoint_names_those_that_exist(tmp_path: Path, plain_arrays: None) -> None:
    store = CheckpointStore(tmp_path)
    save(store, "here")
    for call in (store.load, store.record, store.verify, store.delete):
        with pytest.raises(NotFoundError, match=r"no checkpoint weights/gone .* it has here"):
            call(key("gone"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", ".."),
        ("name", "a/b"),
        ("name", "/etc/passwd"),
        ("name", "a\x00b"),
        ("name", "a\n"),
        ("name", "x" * 129),
        ("name", ".tmp-1"),
        ("run_id", ".."),
        ("run_id", "a/../b"),
        ("run_id", ""),
        ("run_id", "%2e%2e"),
        ("kind", "other_weights"),
        ("kind", "../weights"),
    ],
)
def test_names_stay_inside_the_directory(tmp_path: Path, field: str, value: str) -> None:
    store = CheckpointStore(tmp_path / "state")
    where: dict[str, Any] = {"run_id": RUN, "kind": "weights", "name": "a", field: value}
    for call in (store.load, store.record, store.delete, store.exists):
        with pytest.raises(BadRequestError, match=field):
            call(CheckpointKey(**where))
    with pytest.raises(BadRequestError, match=field):
        store.save(key=CheckpointKey(**where), state=make_state(), metadata={})
    if field == "run_id":
        for call in (store.list, store.run, store.lock_run, lambda run_id: store.put_run(run_id, {})):
            with pytest.raises(BadRequestError, match=field):
                call(value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metadata": {"x": float("nan")}}, "metadata"),
        ({"metadata": {"x": object()}}, "metadata"),
        ({"state": AdapterState(spec=LoraSpec(rank=1, seed=0), step=0, weights={})}, "weights is empty"),
        (
            {"state": AdapterState(spec=LoraSpec(rank=1, seed=0), step=0, weights={"q.A": np.ones(2)})},
            r"weights\['q.A'\] is ndarray float64",
        ),
    ],
)
def test_unsavable_values_change_nothing(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(BadRequestError, match=match):
        save(CheckpointStore(tmp_path / "state"), "a", **changes)
    assert list(tmp_path.iterdir()) == []


def test_every_damaged_file_is_detected(saved_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved_dir, copy)
    store = CheckpointStore(copy)
    rng = np.random.default_rng(0)
    paths = files_of(copy, "bad")
    assert len(paths) > 5
    for path in paths:
        original = path.read_bytes()
        damages = [original[:-1], b"", original + b"\0"]
        for _ in range(8):
            flipped = bytearray(original)
            flipped[rng.integers(len(original))] ^= 1 << int(rng.integers(8))
            damages.append(bytes(flipped))
        for damage in damages:
            path.write_bytes(damage)
            with pytest.raises(
                RequestFailedError, match="newest good checkpoint of this run is weights/good"
            ) as caught:
                store.load(key("bad"))
            assert path.name in str(caught.value) and caught.value.category == "server"
        path.unlink()
        with pytest.raises(RequestFailedError, match=path.name):
            store.verify(key("bad"))
        path.write_bytes(original)
    assert_same(store.load(key("bad"))[0], make_state(2))


def test_swapped_files_and_directories_are_detected(saved_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved_dir, copy)
    good, bad = (next(copy.glob(f"runs/*/weights/{name}")) for name in ("good", "bad"))
    shutil.rmtree(bad)
    shutil.copytree(good, bad)
    with pytest.raises(RequestFailedError, match="is that of weights/good"):
        CheckpointStore(copy).load(key("bad"))


def test_damaged_manifest_is_logged_and_not_listed(
    saved_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved_dir, copy)
    store = CheckpointStore(copy)
    for path in files_of(copy, "bad"):
        if path.name == "manifest.json":
            path.write_bytes(path.read_bytes().replace(b'"seed": 2', b'"seed": 3'))
    assert [record.name for record in store.list()] == ["good"]
    assert "manifest.json is damaged" in caplog.text
    with pytest.raises(RequestFailedError, match=r"exists already \(but cannot be read"):
        save(store, "bad")
    save(store, "bad", 4, overwrite=True)
    assert_same(store.load(key("bad"))[0], make_state(4))


def test_newer_format_is_refused_by_version(
    tmp_path: Path, plain_arrays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as newer:
        newer.setattr("jax_client.checkpoint.manifest.FORMAT_VERSION", 7)
        save(store, "a")
    with pytest.raises(UnsupportedError, match=r"format 7, this version reads up to 1\. Upgrade"):
        store.load(key("a"))


def test_runs_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(NotFoundError, match="no run"):
        store.run(RUN)
    store.put_run(RUN, {"base_model": "tiny"})
    store.put_run(RUN, {"base_model": "tiny", "created": 1.5})
    store.put_run("plain", {})
    assert store.run(RUN) == {"base_model": "tiny", "created": 1.5}
    assert store.runs() == [(RUN, {"base_model": "tiny", "created": 1.5}), ("plain", {})]
    path = next(tmp_path.glob("runs/*train*/run.json"))
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tinz"))
    assert store.runs() == [("plain", {})] and "run.json is damaged" in caplog.text
    with pytest.raises(RequestFailedError, match=r"run\.json is damaged"):
        store.run(RUN)


def operations_of_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, overwrite: bool) -> list[tuple[str, str]]:
    store = CheckpointStore(tmp_path / "count")
    save(store, "kept", 1)
    if overwrite:
        save(store, "name", 2)
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch)
        save(store, "name", 3, overwrite=overwrite)
    return disk.events


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_reaches_the_disk_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_arrays: None, overwrite: bool
) -> None:
    events = operations_of_save(tmp_path, monkeypatch, overwrite=overwrite)
    (version,) = (tmp_path / "count").glob("runs/*/weights/name/0*")
    commit = next(i for i, (name, path) in enumerate(events) if name == "rename" and path.endswith(str(version)))
    temporary = events[commit][1].split(" -> ")[0]
    synced = [path for name, path in events[:commit] if name == "fsync"]
    assert {temporary + str(path)[len(str(version)) :] for path in [version, *version.rglob("*")]} <= set(synced)
    assert synced[-1] == temporary, "the top directory is last"
    assert events[commit + 2] == ("fsync", str(version.parent)), "the rename is made durable"
    manifest = next(i for i, event in enumerate(events) if event == ("open", f"{temporary}/manifest.json"))
    assert manifest < commit
    removed = [i for i, (name, path) in enumerate(events) if name == "rename" and "/000001 -> " in path]
    assert all(i > commit + 2 for i in removed) and bool(removed) == overwrite


@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_kill_at_any_point_keeps_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_arrays: None, overwrite: bool
) -> None:
    points = len(operations_of_save(tmp_path, monkeypatch, overwrite=overwrite))
    assert points > 20
    outcomes = set()
    for point in range(points):
        place = tmp_path / str(point)
        store = CheckpointStore(place)
        save(store, "kept", 1)
        if overwrite:
            save(store, "name", 2)
        with monkeypatch.context() as patch:
            FaultyDisk(patch, at=point)
            with pytest.raises(Killed):
                save(store, "name", 3, overwrite=overwrite)
        after = CheckpointStore(place)
        assert_same(after.load(key("kept"))[0], make_state(1))
        if overwrite or after.exists(key("name")):
            state = after.load(key("name"))[0]
            outcomes.add(state.step)
            assert_same(state, make_state(state.step - 3))
        listed = [record.name for record in after.list()]
        assert listed == (["kept", "name"] if after.exists(key("name")) else ["kept"])
        save(after, "name", 4, overwrite=True)
        assert_same(after.load(key("name"))[0], make_state(4))
        assert list(place.rglob(".tmp-*")) == [], f"leftovers of point {point} are swept"
        assert len(list(place.glob("runs/*/weights/name/*"))) == 1
    assert outcomes == ({5, 6} if overwrite else {6})


def test_a_full_disk_at_any_point_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_arrays: None
) -> None:
    store = CheckpointStore(tmp_path / "state")
    save(store, "name", 2)
    points = len(operations_of_save(tmp_path, monkeypatch, overwrite=True))

    def full() -> OSError:
        return OSError(errno.ENOSPC, "No space left on device")

    for point in range(points):
        with monkeypatch.context() as patch:
            FaultyDisk(patch, at=point, fault=full)
            try:
                save(store, "name", 3, overwrite=True)
            except RequestFailedError as error:
                assert "No space left on device" in str(error) and "bytes" in str(error)
                assert error.category == "server"
        state = store.load(key("name"))[0]
        assert_same(state, make_state(state.step - 3))
        save(store, "name", 2, overwrite=True)


def test_a_save_that_cannot_fit_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RequestFailedError, match="bytes are needed, 1000 are free"):
        save(store, "a")
    assert store.list() == []


CHILD = """
import sys, signal, os
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.checkpoints import save
from jax_client.checkpoint.disk import files
from jax_client.checkpoint.store import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]))
save(store, "kept", 1)
save(store, "name", 2)
print("acknowledged", flush=True)
when = sys.argv[2]
if when == "orbax":
    signal.setitimer(signal.ITIMER_REAL, 0.01)  # SIGALRM ends a process that does not handle it, at once
else:
    real = getattr(files, when)
    def killed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(files, when, killed)
save(store, "name", 3, overwrite=True)
while True:
    save(store, "name", 3, overwrite=True)
"""


def test_real_kills_keep_acknowledged_checkpoints(tmp_path: Path) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent.parent))
    points = ("orbax", "fsync_tree", "move", "remove")
    children = {
        point: subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / point), point], stdout=subprocess.PIPE, text=True
        )
        for point in points
    }
    for point, child in children.items():
        output, _ = child.communicate(timeout=120)
        assert output == "acknowledged\n", point
        assert child.returncode in (-signal.SIGKILL, -signal.SIGALRM), point
        store = CheckpointStore(tmp_path / point)
        assert_same(store.load(key("kept"))[0], make_state(1))
        state = store.load(key("name"))[0]
        assert_same(state, make_state(state.step - 3))
        if point != "orbax":
            assert state.step == (6 if point == "remove" else 5), point
        assert [record.name for record in store.list()] == ["kept", "name"]
        save(store, "name", 4, overwrite=True)
        assert_same(store.load(key("name"))[0], make_state(4))
        assert list((tmp_path / point).rglob(".tmp-*")) == []


def test_leftovers_are_neither_listed_nor_in_the_way(tmp_path: Path, plain_arrays: None) -> None:
    run = tmp_path / "runs" / RUN.replace(":", "%3A")
    leftovers = [
        run / ".tmp-1",
        run / "weights" / ".tmp-2" / "000001",
        run / "weights" / "a" / ".tmp-3" / "arrays",
        tmp_path / "runs" / "old-run" / "weights" / "b" / ".tmp-4",
    ]
    for path in leftovers:
        path.mkdir(parents=True)
    (tmp_path / "runs" / "a stranger's").mkdir()
    store = CheckpointStore(tmp_path)
    assert store.list() == [] and store.runs() == [] and not store.exists(key("a"))
    with files.locked(tmp_path / "runs" / "old-run"):
        save(store, "a")
    assert [path.name for path in tmp_path.rglob(".tmp-*")] == [".tmp-4"], "a run that is being written is left alone"
    assert [record.name for record in store.list()] == ["a"]


def test_listing_needs_no_jax(saved_dir: Path) -> None:
    code = f"""
    import sys
    from pathlib import Path
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.values import CheckpointKey
    store = CheckpointStore(Path({str(saved_dir)!r}))
    assert [record.name for record in store.list()] == ["good", "bad"]
    store.verify(CheckpointKey({RUN!r}, "weights", "good"))
    assert not {{"jax", "orbax", "orbax.checkpoint", "tinker", "torch"}} & set(sys.modules)
    """
    subprocess.run([*STRICT, "-c", textwrap.dedent(code)], check=True, timeout=120)
