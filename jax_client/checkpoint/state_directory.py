"""What is in a state directory besides checkpoints? It has the runs, their locks, an index and the mirror's copies."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TypeAlias

from jax_client.checkpoint.disk import files, run_lock, sealed
from jax_client.checkpoint.disk.names import run_directory, run_ids
from jax_client.checkpoint.disk.run_lock import LockHolder, LockRecord, RunLock
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.index_cache import ABSENT, IndexCache, Row, stamp
from jax_client.checkpoint.index_cache import FILE_NAME as INDEX_FILE
from jax_client.checkpoint.mirror import Mirror
from jax_client.checkpoint.reading import CheckpointReader, read_manifest
from jax_client.errors import NotFoundError, RequestFailedError, UnsupportedError, first_line
from jax_client.host.disk import advice
from jax_client.values import JsonObject, Owner

logger = logging.getLogger(__name__)

_RUN_FILE = "run.json"
# Among the metadata of a run and of a checkpoint; without it neither has an owner.
OWNER = "owner"

Runs: TypeAlias = list[tuple[str, JsonObject]]


class StateDirectory:
    """The runs under a state directory. Thread-safe; several processes may share the directory.

    Args:
        state_dir: made when something is first kept.
        mirror: an fsspec URL to copy to, None for none.
        owner: whose runs there are; those of others are as if they were not there. None is for all.

    Raises:
        BadRequestError: the mirror's URL cannot be opened.
    """

    def __init__(self, state_dir: Path, mirror: str | None = None, owner: Owner | None = None) -> None:
        state_dir = Path(state_dir).absolute()
        self._owner = owner
        self._runs = state_dir / "runs"
        self._index = IndexCache(state_dir / INDEX_FILE)
        self._mirror = None if mirror is None else Mirror(mirror)
        self._reader = CheckpointReader(self._runs, self._mirror)

    def put_run(self, run_id: str, metadata: JsonObject) -> None:
        """Keep what is known of a run, durably, replacing what was kept before; the run is the owner's.

        Raises:
            BadRequestError: a malformed id, or metadata that JSON cannot hold.
            RequestFailedError: the disk failed.
            UnsupportedError: the file system has no locks.
        """
        self._write_run(run_id, self._labelled(metadata))

    def change_run(self, run_id: str, **changes: object) -> None:
        """Replace some of what is known of a run, whose owner stays. Raises as `run` and `put_run`."""
        self._write_run(run_id, {**self.run(run_id), **changes})

    def _labelled(self, metadata: JsonObject) -> JsonObject:
        return metadata if self._owner is None else {**metadata, OWNER: self._owner.name}

    def _write_run(self, run_id: str, metadata: JsonObject) -> None:
        directory = run_directory(self._runs, run_id)
        data = sealed.seal({"run_id": run_id, "metadata": metadata}, "metadata")
        try:
            files.make_directories(directory, self._runs.parent)
            with files.locked(directory):
                files.replace(directory / _RUN_FILE, data)
        except OSError as error:
            raise RequestFailedError(
                f"run {run_id} was not recorded: {first_line(error)}. {advice(error, directory)}"
            ) from error
        if self._mirror is not None:
            self._mirror.push_file(f"{directory.name}/{_RUN_FILE}", directory / _RUN_FILE)

    def run(self, run_id: str) -> JsonObject:
        """Return what was kept of a run.

        Raises:
            NotFoundError: nothing was kept.
            RequestFailedError: the file is damaged.
        """
        missing = NotFoundError(f"there is no run {run_id!r} under {self._runs}; list the runs to see what is.")
        if not self.has_run(run_id):
            raise missing
        try:
            return self._read_run(run_id)
        except (FileNotFoundError, NotADirectoryError):
            raise missing from None
        except (DamagedError, OSError) as error:
            raise RequestFailedError(f"run {run_id}: {error}. Its checkpoints can still be loaded.") from error

    def has_run(self, run_id: str) -> bool:
        """Return whether a run is not another owner's. What was kept of it tells, else what its checkpoints say."""
        if self._owner is None:
            return True
        try:
            recorded: JsonObject | None = self._read_run(run_id)
        except (DamagedError, OSError):
            recorded = self._metadata_of_checkpoints(run_id)
        return recorded is not None and self._owner.has(recorded.get(OWNER))

    def _metadata_of_checkpoints(self, run_id: str) -> JsonObject | None:
        """Return the metadata of a checkpoint of a run, None where there is none that can be read."""
        for key, version in self._reader.newest_versions(run_id):
            with contextlib.suppress(DamagedError, UnsupportedError):
                return read_manifest(version, key).metadata
        return None

    def _read_run(self, run_id: str) -> JsonObject:
        path = run_directory(self._runs, run_id) / _RUN_FILE
        return sealed.unseal(self._run_bytes(path), str(path))["metadata"]

    def _run_bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if self._mirror is None:
                raise
            data = self._mirror.fetch_file(f"{path.parent.name}/{_RUN_FILE}")
            if data is None:
                raise
            return data

    def runs(self) -> Runs:
        """Return every run of the owner's with what was kept of it; a damaged entry is logged, not listed."""
        owner = self._owner
        return [each for each in self._all_runs() if owner is None or owner.has(each[1].get(OWNER))]

    def _all_runs(self) -> Runs:
        paths = {(run_id, "", ""): run_directory(self._runs, run_id) / _RUN_FILE for run_id in run_ids(self._runs)}
        stamps = {key: text for key, path in paths.items() if (text := stamp(path)) != ABSENT}

        def read(row: Row) -> JsonObject | None:
            try:
                return {"run_id": row[0], "metadata": self._read_run(row[0])}
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (DamagedError, OSError) as error:
                logger.warning("run %s: %s. Its checkpoints can still be loaded.", row[0], error)
                return None

        return [(entry["run_id"], entry["metadata"]) for entry in self._index.look_up("runs", stamps, read)]

    def lock_run(self, run_id: str) -> RunLock:
        """Open a run for this process alone, until the lock is released.

        Raises:
            BadRequestError: a malformed id.
            RequestFailedError: it is open elsewhere; the message has the pid. Or the disk failed.
            UnsupportedError: the file system has no locks.
        """
        directory = run_directory(self._runs, run_id)
        try:
            files.make_directories(directory, self._runs.parent)
            return run_lock.acquire(directory)
        except run_lock.RunLockedError as error:
            raise RequestFailedError(
                f"run {run_id} is open in {error}. Close it there, or go on from one of its checkpoints, which makes a "
                "run of its own.",
                category="user",
            ) from None
        except OSError as error:
            raise RequestFailedError(
                f"run {run_id} could not be opened: {first_line(error)}. {advice(error, directory)}"
            ) from error

    def lock_holder(self, run_id: str) -> LockHolder | None:
        """Return the process that has a run open."""
        return run_lock.lock_holder(run_directory(self._runs, run_id))

    def lock_record(self, run_id: str) -> LockRecord | None:
        """Return which process has a run open, or had it open last and how it ended; None where none ever had."""
        return run_lock.lock_record(run_directory(self._runs, run_id))

    def flush_mirror(self, timeout: float | None = None) -> bool:
        """Wait until the mirror has everything, `timeout` seconds at most; return whether it has."""
        return self._mirror is None or self._mirror.flush(timeout)

    def describe(self) -> JsonObject:
        """Return how the mirror does; nothing without one."""
        return {} if self._mirror is None else {"mirror": self._mirror.describe()}
