"""How does a kill during a save leave the old or the new checkpoint whole? A save commits by one rename.

It fills a temporary directory, writes the manifest last, waits for the disk, and then renames the directory to the
next number. Older versions are removed after this rename.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from jax_client.checkpoint import manifest, tags
from jax_client.checkpoint.arrays import InterruptedWriteError
from jax_client.checkpoint.disk import clock, files, sealed
from jax_client.checkpoint.disk.clock import Deadline
from jax_client.checkpoint.disk.hashes import EarlyHashes
from jax_client.checkpoint.disk.names import (
    checkpoint_directory,
    children,
    newest_version,
    run_directory,
    run_ids,
    versions,
)
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.manifest import Manifest
from jax_client.checkpoint.mirror import Mirror
from jax_client.checkpoint.record import Record
from jax_client.checkpoint.tags import Tags
from jax_client.errors import JaxClientError, RequestFailedError, UnsupportedError, first_line
from jax_client.host.disk import advice
from jax_client.values import KINDS

logger = logging.getLogger(__name__)

Fill: TypeAlias = Callable[[Path], None]

# Manifest, directories, and what the file system needs for itself.
_SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A checkpoint that is to be written.

    Attributes:
        manifest: what it is, without its files.
        fill: `f(directory) -> None`, writes the files into a new directory; called once.
        size_bytes: about as much as `fill` will write.
        overwrite: whether it may replace an older one of its name.
        ttl_seconds: until it expires, None for never.
    """

    manifest: Manifest
    fill: Fill
    size_bytes: int
    overwrite: bool = False
    ttl_seconds: float | None = None


class CheckpointWriter:
    """Commits versions of checkpoints. Thread-safe; several processes may share the directory.

    Args:
        runs: the directory of all runs.
        mirror: where each version is copied after its commit.
    """

    def __init__(self, runs: Path, mirror: Mirror | None) -> None:
        self._runs = runs
        self._mirror = mirror
        self._swept = False

    def commit(self, draft: Draft) -> Record:
        """Write a checkpoint; on return it is durable on this disk.

        Raises:
            BadRequestError: metadata that JSON cannot hold.
            RequestFailedError: the name is taken and `overwrite` is False (category user), or the disk failed
                (category server); earlier checkpoints are as they were.
            UnsupportedError: the file system has no locks.
            JaxClientError: as `fill` raises it.
        """
        key = draft.manifest.key
        directory = checkpoint_directory(self._runs, key)
        run_place = run_directory(self._runs, key.run_id)
        sealed.check_json(draft.manifest.metadata, "metadata")
        try:
            files.make_directories(run_place, self._runs.parent)
            self._sweep_once()
            with files.locked(run_place):
                if not draft.overwrite:
                    _refuse_taken(directory, draft.manifest)
                try:
                    record = self._write_version(directory, draft)
                except InterruptedWriteError:
                    record = self._write_version(directory, draft)
        except (JaxClientError, DamagedError):
            raise
        except Exception as error:
            # Orbax reports a failed write as ValueError, the system as OSError.
            raise RequestFailedError(
                f"{key.in_words} was not saved: {first_line(error)}. It needs about {draft.size_bytes} bytes under "
                f"{self._runs}{_free(self._runs)}. Earlier checkpoints are as they were. {advice(error, self._runs)}"
            ) from error
        version = newest_version(directory)
        if self._mirror is not None and version is not None:
            self._mirror.push(key, version)
        return record

    def _write_version(self, directory: Path, draft: Draft) -> Record:
        files.make_directories(directory, self._runs.parent)
        need, free = draft.size_bytes + _SPARE_BYTES, files.free_bytes(directory)
        if need > free:
            raise OSError(errno.ENOSPC, f"{need} bytes are needed, {free} are free")
        older = versions(directory)
        number = int(older[-1].name) + 1 if older else 1
        expires = None if draft.ttl_seconds is None else Deadline.after(draft.ttl_seconds, clock.now())
        # An overwrite is the same checkpoint to those it was published to.
        tag = Tags(expires=expires, public=bool(older) and tags.read_or_none_set(older[-1]).public)
        with files.temporary_directory(directory) as temporary:
            with EarlyHashes(temporary) as hashes:
                draft.fill(temporary)
            written = manifest.write(temporary, draft.manifest, hashes)
            if tag != Tags():
                tags.write(temporary, tag)
            files.fsync_tree(temporary)
            version = directory / f"{number:06d}"
            try:
                files.move(temporary, version)
            except OSError:
                # Renamed perhaps, but not durably: what is reported as not saved must not be there.
                if version.exists():
                    _remove_quietly(version)
                raise
        for path in older:
            _remove_quietly(path)
        return Record.of(written, tag)

    def _sweep_once(self) -> None:
        """Remove the leftovers of crashes, except in runs that another process is writing."""
        if self._swept:
            return
        self._swept = True
        for run_id in run_ids(self._runs):
            directory = run_directory(self._runs, run_id)
            # Another user's run that cannot be tidied is no reason to refuse a save.
            with contextlib.suppress(OSError, RequestFailedError), files.locked(directory, wait=False) as held:
                if held:
                    places = [directory]
                    for kind in KINDS:
                        for child in children(directory / kind):
                            places += [child, *versions(child)]
                        places.append(directory / kind)
                    for place in places:
                        files.sweep(place)


def _free(place: Path) -> str:
    """Return how much room there is, for a message about a disk that may not even say that."""
    with contextlib.suppress(OSError):
        return f", {files.free_bytes(place)} are free"
    return ""


def _refuse_taken(directory: Path, draft: Manifest) -> None:
    version = newest_version(directory)
    if version is None:
        return
    try:
        taken = manifest.read(version)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken.created))
        state = f"from step {taken.step}, saved {when}"
    except (DamagedError, UnsupportedError) as error:
        state = f"but cannot be read: {error}"
    raise RequestFailedError(
        f"{draft.key.in_words} exists already ({state}); pass overwrite=True "
        "where the call takes it, or choose another name.",
        category="user",
    )


def _remove_quietly(directory: Path) -> None:
    # The commit is done: what cannot be removed now is removed by a later save.
    try:
        files.remove(directory)
    except OSError as error:
        logger.warning("the older version %s could not be removed: %s", directory, error)
