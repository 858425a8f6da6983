"""How is a checkpoint read while others overwrite, delete or damage it? A reader retries until it has a whole version.

The reader takes the newest version, or brings one back from the mirror. For a damaged checkpoint, its error names the
newest good one of the same run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from jax_client.checkpoint import manifest
from jax_client.checkpoint.disk import files
from jax_client.checkpoint.disk.names import (
    checkpoint_directory,
    children,
    newest_version,
    run_directory,
)
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.manifest import Manifest
from jax_client.checkpoint.mirror import Mirror
from jax_client.errors import JaxClientError, NotFoundError, RequestFailedError, UnsupportedError, first_line
from jax_client.values import KINDS, CheckpointKey, is_name

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointReader:
    """Reads versions of checkpoints. Thread-safe; other threads and processes may write at the same time.

    Args:
        runs: the directory of all runs.
        mirror: where a checkpoint is looked for that is not on this disk.
    """

    def __init__(self, runs: Path, mirror: Mirror | None) -> None:
        self._runs = runs
        self._mirror = mirror

    def read(self, key: CheckpointKey, work: Callable[[Path], T], *, others: bool = True) -> T:
        """Return `work(version)` for the directory of the checkpoint's newest version.

        Args:
            key: of the checkpoint.
            work: `work(version) -> T`; may be called again where another version took this one's place.
            others: whether errors may name other checkpoints of the run.

        Raises:
            NotFoundError: there is none of this name, here or in the mirror.
            RequestFailedError: a file is missing or damaged; the message names it and the newest good checkpoint.
            JaxClientError: as `work` raises it.
        """
        directory = checkpoint_directory(self._runs, key)
        while True:
            version = newest_version(directory) or self._restored(directory, key)
            if version is None:
                raise self.not_found(key, others=others)
            identity = _identity(version)
            try:
                found = work(version)
                # A name that was deleted and saved again has the same numbers; parts of both may have been read.
                if _identity(version) in (identity, None):
                    return found
            except JaxClientError:
                raise
            except Exception as error:
                # An overwrite or delete by another thread or process takes files away under a reader.
                if newest_version(directory) != version or _identity(version) != identity:
                    continue
                advice = self._advice(key) if others else "Ask whoever saved it for another one."
                raise RequestFailedError(f"{key.in_words} cannot be loaded: {first_line(error)}. {advice}") from error

    def newest_versions(self, run_id: str) -> Iterator[tuple[CheckpointKey, Path]]:
        """Yield the checkpoints of a run, each with its newest version; only names are read."""
        try:
            run = run_directory(self._runs, run_id)
            for kind in KINDS:
                for directory in children(run / kind):
                    version = newest_version(directory) if is_name(directory.name) else None
                    if version is not None:
                        yield CheckpointKey(run_id, kind, directory.name), version
        except OSError as error:  # such as another user's run; the others are no worse for it
            logger.warning("the checkpoints of run %s could not be listed: %s", run_id, first_line(error))

    def not_found(self, key: CheckpointKey, *, others: bool = True) -> NotFoundError:
        """Return the error that says which checkpoints there are instead, if it may name `others`."""
        places = children(run_directory(self._runs, key.run_id) / key.kind) if others else []
        names = [path.name for path in places if newest_version(path)]
        found = f"of this kind it has {', '.join(names)}" if names else "it has none of this kind"
        return NotFoundError(f"run {key.run_id!r} has no checkpoint {key.checkpoint_id} under {self._runs}; {found}.")

    def _restored(self, directory: Path, key: CheckpointKey) -> Path | None:
        """Bring a checkpoint back from the mirror; None if it has none."""
        if self._mirror is None:
            return None
        try:
            files.make_directories(directory, self._runs.parent)
            with (
                files.locked(run_directory(self._runs, key.run_id)),
                files.temporary_directory(directory) as temporary,
            ):
                # Another process may have brought it back while this one waited.
                if (restored := newest_version(directory)) is not None:
                    return restored
                if not self._mirror.fetch(key, temporary):
                    return None
                manifest.verify(temporary, read_manifest(temporary, key))
                files.fsync_tree(temporary)
                files.move(temporary, directory / "000001")
        except Exception as error:
            raise RequestFailedError(
                f"{key.in_words} is not on this disk and could not be brought back from "
                f"{self._mirror.url}: {first_line(error)}."
            ) from error
        finally:
            # Neither a name that is nowhere nor a failure leaves an empty directory.
            for place in (directory, directory.parent):
                with contextlib.suppress(OSError):
                    os.rmdir(place)
        logger.info("%s was brought back from %s", key.in_words, self._mirror.url)
        return directory / "000001"

    def _advice(self, key: CheckpointKey) -> str:
        good = self._newest_good(key)
        return f"The newest good checkpoint of this run is {good}." if good else "This run has no other good one."

    def _newest_good(self, key: CheckpointKey) -> str | None:
        """Return KIND/NAME of the newest undamaged checkpoint of a run besides one."""
        candidates = []
        for other, version in self.newest_versions(key.run_id):
            if other == key:
                continue
            try:
                candidates.append((version, read_manifest(version, other)))
            except (DamagedError, UnsupportedError):
                continue
        # One that can be loaded the same way comes before a newer one of the other kind.
        candidates.sort(key=lambda candidate: (candidate[1].key.kind == key.kind, candidate[1].created), reverse=True)
        for version, found in candidates:
            try:
                manifest.verify(version, found)
                return found.key.checkpoint_id
            except DamagedError:
                continue
        return None


def read_manifest(version: Path, key: CheckpointKey) -> Manifest:
    """Read the manifest of a checkpoint's version.

    Raises:
        DamagedError: it is missing, damaged, or that of another checkpoint.
        UnsupportedError: a newer version of this package wrote it.
    """
    found = manifest.read(version)
    if found.key != key:
        raise DamagedError(
            f"{version / manifest.FILE_NAME} is that of {found.key.checkpoint_id} of run {found.key.run_id}"
        )
    return found


def _identity(version: Path) -> tuple[int, int] | None:
    """Return what tells a version from another one of the same number, None if it is gone."""
    try:
        found = os.stat(version / manifest.FILE_NAME)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
