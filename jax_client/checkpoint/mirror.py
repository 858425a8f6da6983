"""How does a checkpoint outlive the disk it was saved on? A mirror copies it to an object store after the local commit.

    MIRROR/runs/RUN/KIND/NAME/000001/...        as on the disk; manifest.json is uploaded last

A version without its manifest is no copy. The mirror numbers the versions itself: on a fresh disk the local numbers
begin again at 1, and the newest upload must win.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

from jax_client import process
from jax_client.checkpoint import manifest
from jax_client.checkpoint.disk.names import place
from jax_client.errors import BadRequestError
from jax_client.process import Step
from jax_client.threads import LoopExecutor, Workers
from jax_client.values import CheckpointKey, JsonObject

logger = logging.getLogger(__name__)

# Seconds before each attempt of an upload.
ATTEMPTS = (0.0, 1.0, 5.0)
# Most that the end of the program waits for uploads.
EXIT_SECONDS = 300.0
LOOP_THREADS = 32


class Mirror:
    """Copies below an fsspec URL, such as gs://bucket/path. Uploads run one after another on a thread of their own.

    What cannot be uploaded is logged, and tried again before the next upload and at `flush`.

    Args:
        url: of any file system that fsspec knows.

    Raises:
        BadRequestError: fsspec does not know it, or the package for it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # Takes a third of a second to import.
        import fsspec

        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BadRequestError(f"EngineConfig.mirror is {url!r}, which cannot be opened: {error}.") from error
        self._root = root.rstrip("/")
        if self._fs.async_impl and not self._fs.asynchronous:
            # What its event loop does on threads, such as looking up a host's name, must go on until the exit's end.
            executor = LoopExecutor(Workers("jax_client-mirror-io", LOOP_THREADS))
            self._fs.loop.call_soon_threadsafe(self._fs.loop.set_default_executor, executor)
        self._thread = Workers("jax_client-mirror", 1, ready=1)
        self._lock = threading.Lock()
        self._pending: dict[str, Callable[[], None]] = {}
        self._failed: dict[str, str] = {}
        process.register(
            f"mirror {url}", "uploads of checkpoints", owner=self, at_exit={Step.RUNS: Mirror._flush_at_exit}
        )

    def push(self, key: CheckpointKey, version: Path) -> None:
        """Copy a version of a checkpoint."""
        self._later(place(key), lambda: self._push(place(key), version))

    def push_file(self, below: str, path: Path) -> None:
        """Copy one file; `below` is its path below the runs."""

        def work() -> None:
            self._fs.makedirs(self._at(below).rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(self._at(below), path.read_bytes())

        self._later(below, work)

    def push_tags(self, key: CheckpointKey, tags: Path) -> None:
        """Copy the file of tags to the newest version."""

        def work() -> None:
            found = self._versions(place(key))
            if found:
                self._fs.pipe_file(f"{found[-1]}/{tags.name}", tags.read_bytes())

        self._later(f"{place(key)}/{tags.name}", work)

    def delete(self, key: CheckpointKey) -> None:
        """Delete the copy of a checkpoint, manifests first, so that no half of it is ever restored."""
        remote = self._at(place(key))

        def work() -> None:
            for version in reversed(self._versions(place(key))):
                self._fs.rm_file(f"{version}/{manifest.FILE_NAME}")
            if self._fs.exists(remote):
                self._fs.rm(remote, recursive=True)

        self._later(place(key), work)

    def fetch(self, key: CheckpointKey, into: Path) -> bool:
        """Download the newest whole version into an empty directory; False where there is none."""
        found = self._versions(place(key))
        if not found:
            return False
        for remote in self._fs.find(found[-1]):
            target = into / remote[len(found[-1]) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(remote, str(target))
        return True

    def fetch_file(self, below: str) -> bytes | None:
        """Download one file, None where there is none."""
        try:
            return self._fs.cat_file(self._at(below))
        except FileNotFoundError:
            return None

    def flush(self, timeout: float | None = None) -> bool:
        """Wait for the uploads, trying once more what failed; say whether everything is there."""
        last = self._thread.submit(self._upload_pending)
        wait([last], timeout)
        return last.done() and not self._failed

    def _flush_at_exit(self) -> None:
        if self._pending and not self.flush(EXIT_SECONDS):
            logger.warning("not every checkpoint was copied to %s before the program ended", self.url)

    def describe(self) -> JsonObject:
        """Return the URL, how many uploads wait, and what failed, by place."""
        with self._lock:
            return {"url": self.url, "waiting": len(self._pending) - len(self._failed), "failed": dict(self._failed)}

    def _later(self, below: str, work: Callable[[], None]) -> None:
        with self._lock:
            # Only the newest state of a place is worth uploading.
            self._pending[below] = work
            self._failed.pop(below, None)
        self._thread.submit(self._upload_pending)

    def _upload_pending(self) -> None:
        with self._lock:
            pending = list(self._pending.items())
        for below, work in pending:
            error = _attempt(work)
            with self._lock:
                if self._pending.get(below) is not work:
                    continue
                if error is None:
                    del self._pending[below]
                    self._failed.pop(below, None)
                    continue
                self._failed[below] = f"{type(error).__name__}: {error}"
            logger.warning(
                "%s is safe on this disk, but was not copied to %s (%s); it is tried again with the next save",
                below,
                self.url,
                error,
            )

    def _push(self, below: str, version: Path) -> None:
        # An overwrite may have taken the version away since; then a newer upload is waiting.
        if not (version / manifest.FILE_NAME).exists():
            return
        older = self._numbered(below)
        number = max((int(path.rsplit("/", 1)[1]) for path in older), default=0) + 1
        remote = f"{self._at(below)}/{number:06d}"
        paths = sorted(path for path in version.rglob("*") if path.is_file() and path.name != manifest.FILE_NAME)
        for path in (*paths, version / manifest.FILE_NAME):
            target = f"{remote}/{path.relative_to(version).as_posix()}"
            # Object stores have no directories; where there are some, they must be made.
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), target)
        for path in older:
            self._fs.rm(path, recursive=True)

    def _at(self, below: str) -> str:
        return f"{self._root}/runs/{below}"

    def _numbered(self, below: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            names = [path.rstrip("/") for path in self._fs.ls(self._at(below), detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if name.rsplit("/", 1)[1].isdigit())

    def _versions(self, below: str) -> list[str]:
        return [path for path in self._numbered(below) if self._fs.exists(f"{path}/{manifest.FILE_NAME}")]


def _attempt(work: Callable[[], None]) -> Exception | None:
    error: Exception | None = None
    for pause in ATTEMPTS:
        time.sleep(pause)
        try:
            work()
            return None
        except Exception as failed:
            error = failed
    return error
