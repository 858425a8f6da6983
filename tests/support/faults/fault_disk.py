"""What is left on a disk when the power fails, if it keeps only what it was told to keep?

A file's bytes are safe after an fsync of the file, an entry of a directory after an fsync of the directory: POSIX
promises no more, and file systems that do more differ. So a run's calls, as fault_library logs them, say what each
moment may lose.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A call, or what the program said between two calls; `result` is 0 or minus the errno."""

    name: str
    path: str = ""
    target: str = ""
    result: int = 0
    said: dict[str, Any] = field(default_factory=dict)


def read_log(path: Path) -> list[Event]:
    events = []
    for line in path.read_text().splitlines():
        name, where, target, result = line.split("\t")
        if name == "said":
            events.append(Event(name=name, said=json.loads(where)))
        else:
            events.append(Event(name=name, path=where, target=target, result=int(result)))
    return events


@dataclass(slots=True)
class Entry:
    """A new name that is not safe yet: a creation, or a rename of `source`.

    Attributes:
        path, source: as they were called, corrected by later renames only once those are safe.
        now: what `path` is called now.
        replaces: there was something at `path`.
        unsynced: the directories to be synced, as they are called now.
    """

    path: str
    source: str | None
    now: str
    replaces: bool
    unsynced: set[str]


class Disk:
    """What is not safe after some calls on a directory that was empty before them."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.unsynced_files: set[str] = set()
        self.unsynced_entries: list[Entry] = []
        self._there: set[str] = set()
        for event in events:
            self.feed(event)

    def feed(self, event: Event) -> None:
        if event.name.startswith(("write", "pwrite", "sendfile", "copy_file", "ftruncate", "truncate", "posix_f")):
            # A call that failed may have done a part of it.
            self.unsynced_files.add(event.path)
        elif event.result < 0:
            return
        elif event.name in ("fsync", "fdatasync"):
            self.unsynced_files.discard(event.path)
            for entry in self.unsynced_entries:
                entry.unsynced.discard(event.path)
            while safe := [entry for entry in self.unsynced_entries if not entry.unsynced]:
                self._keep(safe[0])
        elif event.name in ("create", "mkdir", "mkdirat", "symlink"):
            self._there.add(event.path)
            self._add(event.path, None, False)
        elif event.name in ("link", "linkat"):
            self._there.add(event.target)
            self._add(event.target, None, False)
            if event.path in self.unsynced_files:
                self.unsynced_files.add(event.target)
        elif event.name.startswith("rename"):
            replaces = event.target in self._there
            for paths in (self.unsynced_files, self._there):
                paths.discard(event.target)
            for paths in (self.unsynced_files, self._there, *(entry.unsynced for entry in self.unsynced_entries)):
                moved = {renamed(path, event.path, event.target) for path in paths}
                paths.clear()
                paths.update(moved)
            for entry in self.unsynced_entries:
                entry.now = renamed(entry.now, event.path, event.target)
            self._add(event.target, event.path, replaces)
        elif event.name in ("unlink", "unlinkat", "rmdir", "remove"):
            self.unsynced_files.discard(event.path)
            self._there.discard(event.path)
        elif event.name not in ("open", "said"):
            raise NotImplementedError(event.name)

    def _add(self, path: str, source: str | None, replaces: bool) -> None:
        parents = {os.path.dirname(name) for name in (path, source) if name is not None}
        self.unsynced_entries.append(Entry(path, source, path, replaces, parents))

    def _keep(self, entry: Entry) -> None:
        """Regard an entry as safe.

        If it is a rename, so is the older name of the same thing, which is no more; and what was made below that name
        is now found below the new one.
        """
        number = next(i for i, other in enumerate(self.unsynced_entries) if other is entry)
        older, newer = self.unsynced_entries[:number], self.unsynced_entries[number + 1 :]
        if entry.source is not None:
            older = [other for other in older if other.path != entry.source]
            for other in older:
                other.path = renamed(other.path, entry.source, entry.path)
                other.source = other.source and renamed(other.source, entry.source, entry.path)
        self.unsynced_entries = older + newer

    def unsafe(self, place: str) -> Iterator[str]:
        """Say what of a file or directory, everything below it included, may be lost."""
        for path in sorted(self.unsynced_files):
            if is_below(path, place):
                yield f"the bytes of {path}"
        for entry in self.unsynced_entries:
            if is_below(entry.now, place) or is_below(place, entry.now):
                yield f"the name {entry.now}"

    def cut_power(self, rng: np.random.Generator | None = None) -> None:
        """Take what is not safe from the real directory: all of it, or what falls to `rng`.

        A removal that was not safe stays done, and a file that was replaced does not come back.
        """
        for path in sorted(self.unsynced_files):
            if os.path.isfile(path) and (rng is None or rng.random() < 0.5):
                os.truncate(path, 0 if rng is None else int(rng.integers(os.path.getsize(path) + 1)))
        while self.unsynced_entries:
            entry = self.unsynced_entries[-1]
            if entry.replaces or (rng is not None and rng.random() < 0.5):
                self._keep(entry)
                continue
            self.unsynced_entries.pop()
            if entry.source is not None:
                if os.path.lexists(entry.path) and os.path.isdir(os.path.dirname(entry.source)):
                    os.rename(entry.path, entry.source)
            elif os.path.isdir(entry.path):
                shutil.rmtree(entry.path)
            elif os.path.lexists(entry.path):
                os.unlink(entry.path)


def is_below(path: str, place: str) -> bool:
    """Say whether a path is `place` or lies below it."""
    return path == place or path.startswith(place + "/")


def renamed(path: str, source: str, target: str) -> str:
    """Return what a path is called after a rename."""
    return target + path[len(source) :] if is_below(path, source) else path
