"""When does a save hash its files? `EarlyHashes` hashes them on a thread while others are still being written.

Hashing takes a third as long as writing and does not use the disk. A file that changes afterwards is hashed again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from jax_client.checkpoint.disk import files
from jax_client.threads import start_thread

# A file counts as written when it has been left alone for so long: longer than a tick of any file system's clock, so
# that a later change shows in its time.
_QUIET_SECONDS = 0.02
_POLL_SECONDS = 0.01


class EarlyHashes:
    """A context that hashes what appears below a directory, on a thread of its own.

    Args:
        directory: it is there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # By inode: writers rename what they have finished.
        self._known: dict[int, tuple[int, int, str]] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        # Where Python starts no thread any more, all is hashed at the end.
        with contextlib.suppress(RuntimeError):
            self._thread = start_thread("jax_client-hash", self._loop)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def of(self, path: Path) -> tuple[int, str]:
        """Return size and sha256 of a file that is complete."""
        found = os.stat(path)
        size, changed, digest = self._known.get(found.st_ino, (-1, -1, ""))
        if (size, changed) == (found.st_size, found.st_mtime_ns):
            return size, digest
        return found.st_size, files.sha256(path)

    def _loop(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            for parent, _, names in os.walk(self._directory):
                for name in names:
                    self._look_at(Path(parent, name))

    def _look_at(self, path: Path) -> None:
        try:
            found = os.stat(path)
            known = self._known.get(found.st_ino)
            if self._done.is_set() or (known is not None and known[:2] == (found.st_size, found.st_mtime_ns)):
                return
            if time.time_ns() - found.st_mtime_ns < _QUIET_SECONDS * 1e9:
                return
            self._known[found.st_ino] = found.st_size, found.st_mtime_ns, files.sha256(path)
        except OSError:
            # Renamed or removed meanwhile: it is met again, or gone.
            return
