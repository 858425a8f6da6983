"""Which process has a run open, and how did the last one end? The locked file names the process, and says how it ended.

A process that was killed has written nothing: its run is not locked, and no end is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jax_client.checkpoint.disk import files
from jax_client.values import JsonObject

FILE_NAME = ".owner"
# `lock_holder` holds the lock for an instant to see that nobody does.
_PATIENCE_SECONDS = 0.5
# Of the file, and of what is said about an end.
_LENGTH = 2048
MAX_WORD = 32
MAX_TEXT = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder:
    """The process that has a run open; `since` is unix seconds."""

    pid: int
    host: str
    since: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LockRecord:
    """What the lock file of a run says.

    Attributes:
        held: whether a process holds the lock now.
        pid, host, since: of the process that holds it, or held it last; unix seconds.
        ended: unix seconds, None where no end was recorded.
        how: a word for the end, such as "closed" or "signal"; "" where none was recorded.
        text: more about it, for people.
        tells: whether this process's version records its end, so that a missing one means that it was killed.
    """

    held: bool
    pid: int | None = None
    host: str | None = None
    since: float | None = None
    ended: float | None = None
    how: str = ""
    text: str = ""
    tells: bool = False


class RunLock:
    """The right to add to a run, until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._process = os.getpid()
        self._since = time.time()
        self._write({})

    def note_end(self, how: str, text: str = "") -> None:
        """Record how this process ends, or ends with the run; a later note replaces it. Never raises."""
        if self._descriptor is not None and os.getpid() == self._process:
            with contextlib.suppress(OSError):
                self._write({"ended": time.time(), "how": how[:MAX_WORD], "text": text[:MAX_TEXT]})

    def release(self, how: str = "closed", text: str = "") -> None:
        """Let other processes open the run; a second call does nothing. A fork closes only its own descriptor."""
        self.note_end(how, text)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            (files.unlock if os.getpid() == self._process else os.close)(descriptor)

    def _write(self, end: Mapping[str, object]) -> None:
        if self._descriptor is not None:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": self._since, "tells": True}
            # One write, of one length: a reader sees the old text or the new one.
            os.pwrite(self._descriptor, json.dumps(holder | dict(end)).encode().ljust(_LENGTH), 0)


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
        return RunLock(descriptor)
    except BaseException:
        files.unlock(descriptor)
        raise


def lock_holder(directory: Path) -> LockHolder | None:
    """Return the process that has locked a directory, None if it is not locked."""
    record = lock_record(directory)
    if record is None or not record.held or record.pid is None:
        return None
    return LockHolder(pid=record.pid, host=record.host or "", since=record.since or 0.0)


def lock_record(directory: Path) -> LockRecord | None:
    """Return whether a directory is locked, and by which process it is or was; None if it never was."""
    try:
        descriptor = os.open(directory / FILE_NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        held = not files.lock(descriptor, directory, wait=False)
        return _record(_fields(descriptor), held=held)
    finally:
        files.unlock(descriptor)


def _read(descriptor: int) -> LockHolder | None:
    record = _record(_fields(descriptor), held=True)
    return None if record.pid is None else LockHolder(pid=record.pid, host=record.host or "", since=record.since or 0.0)


def _fields(descriptor: int) -> JsonObject:
    # Informative only, and not sealed: the lock is what counts.
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(found, dict):
            return found
    return {}


def _record(fields: JsonObject, *, held: bool) -> LockRecord:
    number = lambda name: float(value) if isinstance(value := fields.get(name), int | float) else None  # noqa: E731
    text = lambda name: value if isinstance(value := fields.get(name), str) else ""  # noqa: E731
    pid = fields.get("pid")
    return LockRecord(
        held=held,
        pid=pid if isinstance(pid, int) else None,
        host=text("host") or None,
        since=number("since"),
        ended=number("ended"),
        how=text("how"),
        text=text("text"),
        tells=fields.get("tells") is True,
    )
