"""Which process has a run open, and how did the last one end? The locked file names the process, and says how it ended.

A process that was killed has written nothing: its run is not locked, and no end is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jax_client.checkpoint.disk import files
from jax_client.checkpoint.disk.clock import unix_seconds
from jax_client.values import JsonObject

FILE_NAME = ".owner"
# For a process that ends, and, far longer, for those that share the lock for an instant to see that nobody has it.
_PATIENCE_SECONDS = 0.5
_READERS_SECONDS = 30.0
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
        began = time.monotonic()
        while not files.lock(descriptor, directory, wait=False):
            only_read = files.lock(descriptor, directory, wait=False, shared=True)
            if only_read:
                files.unlock(descriptor, close=False)
            if time.monotonic() - began > (_READERS_SECONDS if only_read else _PATIENCE_SECONDS):
                holder = _record(_fields(_bytes(descriptor)), held=True)
                raise RunLockedError(
                    "another process" if holder.pid is None else f"process {holder.pid} on {holder.host}"
                )
            # Of different lengths: several that wait for each other's looks would meet again and again.
            time.sleep(random.uniform(0.001, 0.01))
        claim = RunLock(descriptor)
        os.ftruncate(descriptor, _LENGTH)
        return claim
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
        descriptor = os.open(directory / FILE_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Shared, so that two that look do not take each other for the process that has the run.
        held = not files.lock(descriptor, directory, wait=False, shared=True)
        # Before it is given back: a process that opens the run now removes the end that another one recorded.
        data = _bytes(descriptor)
    finally:
        files.unlock(descriptor)
    return _record(_fields(data), held=held)


def _bytes(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 2 * _LENGTH, 0)
    except OSError:
        return b""


def _fields(data: bytes) -> JsonObject:
    # Informative only, and not sealed: the lock is what counts.
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        if isinstance(found, dict):
            return found
    return {}


def _record(fields: JsonObject, *, held: bool) -> LockRecord:
    text = lambda name: value if isinstance(value := fields.get(name), str) else ""  # noqa: E731
    pid = fields.get("pid")
    return LockRecord(
        held=held,
        pid=pid if isinstance(pid, int) else None,
        host=text("host") or None,
        since=unix_seconds(fields.get("since")),
        ended=unix_seconds(fields.get("ended")),
        how=text("how"),
        text=text("text"),
        tells=fields.get("tells") is True,
    )
