"""Is what was saved found again when its disk is gone, and does a failing object store harm nothing?"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from jax_client.checkpoint import mirror
from jax_client.checkpoint.store import CheckpointStore
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError
from support.checkpoints import RUN, assert_same, key, make_state, save


class FailingFileSystem(MemoryFileSystem):
    """A memory file system that fails while `failing` is set, after `uploads_left` more uploads."""

    protocol = "failing"
    failing = False
    uploads_left = 0

    def _count(self) -> None:
        if type(self).failing:
            if type(self).uploads_left == 0:
                raise OSError("the bucket does not answer")
            type(self).uploads_left -= 1

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().put_file(*args, **kwargs)

    def pipe_file(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().pipe_file(*args, **kwargs)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


class LoopedFileSystem(AsyncFileSystemWrapper):
    """The local files behind an event loop, whose default executor works as that of a bucket looks up names."""

    protocol = "looped"
    threads: ClassVar[set[str]] = set()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(LocalFileSystem(), asynchronous=False, **kwargs)
        self._pipe_file = self._noting

    async def _noting(self, path: str, value: bytes, **kwargs: Any) -> None:
        def write() -> None:
            type(self).threads.add(threading.current_thread().name)
            self.sync_fs.pipe_file(path, value)

        await asyncio.to_thread(write)


fsspec.register_implementation("looped", LoopedFileSystem, clobber=True)


@pytest.fixture(params=["file", "memory", "failing"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(mirror, "ATTEMPTS", (0.0, 0.0))
    yield f"file://{tmp_path}/bucket/path" if request.param == "file" else f"{request.param}://bucket/path"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    FailingFileSystem.failing = False


def found(url: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return sorted(path[len(root) :] for path in system.find(root))


def test_a_lost_disk_comes_back(tmp_path: Path, url: str) -> None:
    first = CheckpointStore(tmp_path / "spot", url)
    first.put_run(RUN, {"base_model": "tiny"})
    save(first, "a", 1)
    save(first, "a", 2, overwrite=True, ttl_seconds=3600)
    first.set_public(key("a"), True)
    save(first, "b", 3, kind="sampler_weights", state=make_state(3, optimizer=False))
    record = first.record(key("a"))
    assert first.flush_mirror(60) and first.describe() == {"mirror": {"url": url, "waiting": 0, "failed": {}}}
    shutil.rmtree(tmp_path / "spot")

    second = CheckpointStore(tmp_path / "fresh", url)
    assert second.list() == [] and second.run(RUN) == {"base_model": "tiny"}
    state, again = second.load(key("a"))
    assert_same(state, make_state(2))
    assert again == record == second.verify(key("a"))
    assert second.record(key("b", "sampler_weights")).name == "b"
    assert len(second.list()) == 2, "they are on this disk now"
    with pytest.raises(NotFoundError):
        second.load(key("never"))
    assert not list((tmp_path / "fresh").rglob("never"))
    # The numbers of a fresh disk begin again; the newest upload wins.
    save(second, "a", 5, overwrite=True)
    assert second.flush_mirror(60)
    assert_same(CheckpointStore(tmp_path / "third", url).load(key("a"))[0], make_state(5))
    assert len({path.split("/")[5] for path in found(url) if "/weights/a/" in path}) == 1, "one version is kept"


def test_deletes_reach_the_mirror(tmp_path: Path, url: str, plain_arrays: None) -> None:
    store = CheckpointStore(tmp_path / "state", url)
    save(store, "a", 1)
    store.delete(key("a"))
    assert store.flush_mirror(60) and found(url) == []
    with pytest.raises(NotFoundError):
        store.load(key("a"))


def test_damage_in_the_mirror_is_not_restored(tmp_path: Path, url: str, plain_arrays: None) -> None:
    save(first := CheckpointStore(tmp_path / "spot", url), "a", 1)
    assert first.flush_mirror(60)
    system, root = fsspec.core.url_to_fs(url)
    victim = next(path for path in system.find(root) if "/arrays/" in path)
    data = bytearray(system.cat_file(victim))
    data[len(data) // 2] ^= 4
    system.pipe_file(victim, bytes(data))
    second = CheckpointStore(tmp_path / "fresh", url)
    with pytest.raises(RequestFailedError, match=r"could not be brought back from .* is damaged"):
        second.load(key("a"))
    assert second.list() == [] and not list((tmp_path / "fresh").rglob("*.json"))


@pytest.mark.parametrize("uploads", range(0, 8))
def test_a_store_that_fails_midway_harms_nothing(
    tmp_path: Path, uploads: int, plain_arrays: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "ATTEMPTS", (0.0,))
    MemoryFileSystem.store.clear()
    store = CheckpointStore(tmp_path / "state", "failing://bucket/path")
    save(store, "a", 1)
    assert store.flush_mirror(60)
    FailingFileSystem.failing, FailingFileSystem.uploads_left = True, uploads
    try:
        save(store, "a", 2, overwrite=True)
        assert not store.flush_mirror(60)
        assert "was not copied to failing://bucket/path (the bucket does not answer)" in caplog.text
        assert list(store.describe()["mirror"]["failed"]) == [f"{RUN.replace(':', '%3A')}/weights/a"]
        assert_same(store.load(key("a"))[0], make_state(2))
        # Half an upload is none: the older one is what another machine finds.
        elsewhere = CheckpointStore(tmp_path / "elsewhere", "failing://bucket/path")
        assert_same(elsewhere.load(key("a"))[0], make_state(1))
    finally:
        FailingFileSystem.failing = False
    assert store.flush_mirror(60), "what was owed is paid"
    assert_same(CheckpointStore(tmp_path / "third", "failing://bucket/path").load(key("a"))[0], make_state(2))
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("url", ["nosuchsystem://bucket", "/a/path", "bucket", 3])
def test_a_mirror_that_cannot_be_is_refused(tmp_path: Path, url: Any) -> None:
    with pytest.raises(BadRequestError, match=r"EngineConfig\.mirror is"):
        CheckpointStore(tmp_path, EngineConfig(mirror=url).mirror)


def test_an_event_loop_works_on_threads_that_serve_until_the_exit_ends(tmp_path: Path) -> None:
    """The loop's own would be a pool of `concurrent.futures`, which refuses work from the main module's end on."""
    copies = mirror.Mirror(f"looped://{tmp_path}/bucket")
    (tmp_path / "file").write_bytes(b"content")
    copies.push_file("run/run.json", tmp_path / "file")
    assert copies.flush(30)
    assert copies.fetch_file("run/run.json") == b"content"
    assert LoopedFileSystem.threads and all(
        name.startswith("jax_client-mirror-io") for name in LoopedFileSystem.threads
    )
