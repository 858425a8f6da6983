"""Which process has a run open? The one that holds the lock; the locked file names it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from jax_client.checkpoint.disk import files

FILE_NAME = ".owner"
# `lock_holder` holds the lock for an instant to see that nobody does.
_PATIENCE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder:
    """The process that has a run open; `since` is unix seconds."""

    pid: int
    host: str
    since: float


class RunLock:
    """The right to add to a run, until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._process = os.getpid()

    def release(self) -> None:
        """Let other processes open the run; a second call does nothing. A fork closes only its own descriptor."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            (files.unlock if os.getpid() == self._process else os.close)(descriptor)


class RunLockedError(Exception):
    """The run is locked; the message names the holder. Never leaves the package."""


def acquire(directory: Path) -> RunLock:
    """Lock a directory, such as a run's, for this process.

    Raises:
        RunLockedError: it is taken.
        UnsupportedError: the file system has no locks.
    """
    descriptor = os.open(directory / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not files.lock(descriptor, directory, wait=False):
            if time.monotonic() > deadline:
                holder = _read(descriptor)
                raise RunLockedError(f"process {holder.pid} on {holder.host}" if holder else "another process")
            time.sleep(0.01)
        os.ftruncate(descriptor, 0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except BaseException:
        files.unlock(descriptor)
        raise
    return RunLock(descriptor)


def lock_holder(directory: Path) -> LockHolder | None:
    """Return the process that has locked a directory, None if it is not locked."""
    try:
        descriptor = os.open(directory / FILE_NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        if files.lock(descriptor, directory, wait=False):
            return None
        return _read(descriptor)
    finally:
        files.unlock(descriptor)


def _read(descriptor: int) -> LockHolder | None:
    # Informative only, and not sealed: the lock is what counts.
    with contextlib.suppress(OSError, ValueError, TypeError):
        return LockHolder(**json.loads(os.pread(descriptor, 4096, 0)))
    return None
