"""What is in a state directory besides checkpoints? The runs, who has them open, the catalogue and the mirror."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jax_client.checkpoint.disk import files, run_lock, sealed
from jax_client.checkpoint.disk.run_lock import Owner, RunLock
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.checkpoint.index_cache import FILE_NAME as CATALOGUE
from jax_client.checkpoint.index_cache import IndexCache, Key, Stamp
from jax_client.checkpoint.mirror import Mirror
from jax_client.checkpoint.names import children, run_directory, run_id_of
from jax_client.errors import NotFoundError, RequestFailedError

logger = logging.getLogger(__name__)

_RUN_FILE = "run.json"

Runs: TypeAlias = list[tuple[str, dict[str, Any]]]


class StateDirectory:
    """The runs under a state directory. Thread-safe; several processes may share the directory.

    Args:
        state_dir: made when something is first kept.
        mirror: an fsspec URL to copy to, None for none.

    Raises:
        BadRequestError: the mirror's URL cannot be opened.
    """

    def __init__(self, state_dir: Path, mirror: str | None = None) -> None:
        state_dir = Path(state_dir).absolute()
        self._runs = state_dir / "runs"
        self._catalogue = IndexCache(state_dir / CATALOGUE)
        self._mirror = None if mirror is None else Mirror(mirror)

    def put_run(self, run_id: str, metadata: dict[str, Any]) -> None:
        """Keep what is known of a run, durably, replacing what was kept before.

        Raises:
            BadRequestError: a malformed id, or metadata that JSON cannot hold.
            RequestFailedError: the disk failed.
        """
        directory = run_directory(self._runs, run_id)
        data = sealed.seal({"run_id": run_id, "metadata": metadata}, "metadata")
        try:
            self._make(directory)
            with files.locked(directory):
                files.replace(directory / _RUN_FILE, data)
        except OSError as error:
            raise RequestFailedError(
                f"run {run_id} was not recorded: {first_line(error)}. Check that {directory} is writable and has room."
            ) from error
        if self._mirror is not None:
            self._mirror.push_file(f"{directory.name}/{_RUN_FILE}", directory / _RUN_FILE)

    def run(self, run_id: str) -> dict[str, Any]:
        """Return what was kept of a run.

        Raises:
            NotFoundError: nothing was kept.
            RequestFailedError: the file is damaged.
        """
        path = run_directory(self._runs, run_id) / _RUN_FILE
        try:
            data = self._run_bytes(path)
            return sealed.unseal(data, str(path))["metadata"]
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"there is no run {run_id!r} under {self._runs}; list the runs to see what is."
            ) from None
        except (DamagedError, OSError) as error:
            raise RequestFailedError(f"run {run_id}: {error}. Its checkpoints can still be loaded.") from error

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
        """Return every run with what was kept of it; a damaged entry is logged, not listed."""
        paths = {(run_id, "", ""): run_directory(self._runs, run_id) / _RUN_FILE for run_id in self._run_ids()}
        stamps = {key: text for key, path in paths.items() if (text := stamp(path)) != _ABSENT}

        def read(key: Key) -> Mapping[str, Any] | None:
            try:
                return {"run_id": key[0], "metadata": self.run(key[0])}
            except NotFoundError:
                return None
            except RequestFailedError as error:
                logger.warning("%s", error)
                return None

        return [(entry["run_id"], entry["metadata"]) for entry in self._catalogue.look_up("runs", stamps, read)]

    def claim(self, run_id: str) -> RunLock:
        """Open a run for this process alone, until the claim is released.

        Raises:
            BadRequestError: a malformed id.
            RequestFailedError: it is open elsewhere; the message has the pid. Or the disk failed.
            UnsupportedError: the file system has no locks.
        """
        directory = run_directory(self._runs, run_id)
        try:
            self._make(directory)
            return run_lock.claim(directory)
        except run_lock.RunLockedError as error:
            raise RequestFailedError(
                f"run {run_id} is open in {error}. Close it there, or go on from one of its checkpoints, which makes a "
                "run of its own.",
                category="user",
            ) from None
        except OSError as error:
            raise RequestFailedError(
                f"run {run_id} could not be opened: {first_line(error)}. Check that {directory} is writable."
            ) from error

    def owner(self, run_id: str) -> Owner | None:
        """Return the process that has a run open."""
        return run_lock.owner(run_directory(self._runs, run_id))

    def flush_mirror(self, timeout: float | None = None) -> bool:
        """Wait until the mirror has everything, `timeout` seconds at most; return whether it has."""
        return self._mirror is None or self._mirror.flush(timeout)

    def describe(self) -> dict[str, Any]:
        """Return how the mirror does; nothing without one."""
        return {} if self._mirror is None else {"mirror": self._mirror.describe()}

    def _make(self, directory: Path) -> None:
        files.make_directories(directory, self._runs.parent)

    def _run_ids(self) -> list[str]:
        ids = (run_id_of(path) for path in children(self._runs))
        return sorted(run_id for run_id in ids if run_id is not None)


_ABSENT = "-"


def stamp(*paths: Path) -> Stamp:
    """Return a text that changes whenever one of the files is replaced."""
    return "|".join(_stamp_of(path) for path in paths)


def _stamp_of(path: Path) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return _ABSENT
    return f"{path.parent.name}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
