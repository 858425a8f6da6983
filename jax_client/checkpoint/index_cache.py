"""How are a thousand checkpoints listed without reading a thousand manifests? An index remembers what they said.

STATE/catalogue.sqlite holds an entry for each state of the files, which a stamp of their inodes, sizes and times
names. The index is never the truth: an entry whose stamp or seal does not fit is read from the files again. So an index
that is missing, damaged, locked or of another version costs time and nothing else.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from jax_client.checkpoint.disk import sealed
from jax_client.checkpoint.disk.sealed import DamagedError
from jax_client.sqlite_file import SqliteFile, transaction
from jax_client.values import JsonObject

FILE_NAME = "catalogue.sqlite"
# Every write is a favour to the next listing: not worth waiting long for another process.
BUSY_SECONDS = 0.2

Table = Literal["runs", "checkpoints"]
# Run, kind, name; a run's own entry has no kind and no name.
Row = tuple[str, str, str]
Stamp = str
# The stamp of a file that is not there.
ABSENT = "-"

# Older versions need no migration: what they remembered is read from the files again.
_TABLES = "".join(
    f"""
    DROP TABLE IF EXISTS {table};
    CREATE TABLE {table} (
        run TEXT, kind TEXT, name TEXT, stamp TEXT NOT NULL, entry BLOB NOT NULL, PRIMARY KEY (run, kind, name)
    ) WITHOUT ROWID;
    """
    for table in get_args(Table)
)


class IndexCache:
    """The index of one state directory. Thread-safe; any number of processes may share the file.

    Args:
        path: of the file; made when something is first remembered.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(
            path,
            (_TABLES,),
            busy_seconds=BUSY_SECONDS,
            synchronous="FULL",
            unused="checkpoints are listed from their manifests",
            quiet=True,
        )
        # What this object has seen: a list that is asked for again and again needs neither the file nor its seals.
        self._seen: dict[str, dict[Row, tuple[Stamp, JsonObject]]] = {}

    def look_up(
        self,
        table: Table,
        stamps: Mapping[Row, Stamp],
        read: Callable[[Row], JsonObject | None],
        run_id: str | None = None,
    ) -> list[JsonObject]:
        """Return the entry of each key: what is remembered where the stamp fits, else what `read` says, remembered.

        Args:
            table: what is asked for.
            stamps: what is on the disk, in the order of the answer.
            read: reads an entry, JSON, from the files; None leaves the key out and remembers nothing.
            run_id: all keys are of this run; None says that they are all there are, so that others are forgotten.
        """
        seen = self._seen.setdefault(table, {})
        if all(key in seen and seen[key][0] == stamp for key, stamp in stamps.items()) and (
            run_id is not None or len(seen) == len(stamps)
        ):
            return [dict(seen[key][1]) for key in stamps]
        known = self._remembered(table, run_id)
        if run_id is None:
            seen.clear()
        new: list[tuple[Row, Stamp, bytes]] = []
        found: list[JsonObject] = []
        for key, stamp in stamps.items():
            entry = _open(known.pop(key, None), key, stamp)
            if entry is None:
                entry = read(key)
                if entry is None:
                    continue
                new.append((key, stamp, sealed.seal({"key": key, "entry": entry}, "entry")))
            found.append(dict(entry))
            seen[key] = stamp, entry
        if new or known:
            self._remember(table, new, known)
        return found

    def forget_all(self) -> None:
        """Delete the file; the next listing makes it anew."""
        self._seen.clear()
        self._file.delete()

    def _remembered(self, table: Table, run_id: str | None) -> dict[Row, tuple[Stamp, bytes]]:
        if not self._file.path.exists():
            return {}
        where, values = ("", ()) if run_id is None else (" WHERE run = ?", (run_id,))
        query = f"SELECT run, kind, name, stamp, entry FROM {table}{where}"

        def work(database: sqlite3.Connection) -> list[tuple[str, str, str, Stamp, bytes]]:
            # A flipped bit may leave text that is no UTF-8; then it fits no key.
            database.text_factory = lambda data: data.decode(errors="replace")
            return database.execute(query, values).fetchall()

        rows = self._file.use(work, [])
        return {(run, kind, name): (stamp, entry) for run, kind, name, stamp, entry in rows}

    def _remember(self, table: Table, new: Iterable[tuple[Row, Stamp, bytes]], gone: Collection[Row]) -> None:
        rows = [(*key, stamp, entry) for key, stamp, entry in new]

        def work(database: sqlite3.Connection) -> None:
            with transaction(database):
                database.executemany(f"DELETE FROM {table} WHERE run = ? AND kind = ? AND name = ?", gone)
                database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?)", rows)

        self._file.use(work, None)


def _open(remembered: tuple[Stamp, bytes] | None, key: Row, stamp: Stamp) -> JsonObject | None:
    if remembered is None or remembered[0] != stamp or not isinstance(remembered[1], bytes):
        return None
    try:
        content = sealed.unseal(remembered[1], "entry")
    except DamagedError:
        return None
    return content["entry"] if tuple(content["key"]) == key else None


def stamp(*paths: Path) -> Stamp:
    """Return a text that changes whenever one of the files is replaced."""
    return "|".join(_stamp_of(path) for path in paths)


def _stamp_of(path: Path) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return ABSENT
    return f"{path.parent.name}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
