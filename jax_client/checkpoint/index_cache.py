"""How are a thousand checkpoints listed without reading a thousand manifests?

STATE/catalogue.sqlite remembers what the files said, and for which state of the files (a stamp of their inodes, sizes
and times). It is never the truth: an entry whose stamp or seal does not fit is read from the files again, so a
catalogue that is missing, damaged, locked or of another version costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from jax_client.checkpoint.disk import sealed
from jax_client.checkpoint.disk.sealed import DamagedError

logger = logging.getLogger(__name__)

FILE_NAME = "catalogue.sqlite"
VERSION = 1
# Every write is a favour to the next listing: not worth waiting long for another process.
BUSY_SECONDS = 0.2

Table = Literal["runs", "checkpoints"]
# Run, kind, name; a run's own entry has no kind and no name.
Key = tuple[str, str, str]
Stamp = str
T = TypeVar("T")


class IndexCache:
    """The catalogue of one state directory. Thread-safe; any number of processes may share the file.

    Args:
        path: of the file; made when something is first remembered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def look_up(
        self,
        table: Table,
        stamps: Mapping[Key, Stamp],
        read: Callable[[Key], Mapping[str, Any] | None],
        run_id: str | None = None,
    ) -> list[Mapping[str, Any]]:
        """Return the entry of each key: what is remembered where the stamp fits, else what `read` says, remembered.

        Args:
            table: what is asked for.
            stamps: what is on the disk, in the order of the answer.
            read: reads an entry, JSON, from the files; None leaves the key out and remembers nothing.
            run_id: all keys are of this run; None says that they are all there are, so that others are forgotten.
        """
        known = self._remembered(table, run_id)
        new: list[tuple[Key, Stamp, bytes]] = []
        found: list[Mapping[str, Any]] = []
        for key, stamp in stamps.items():
            entry = _open(known.pop(key, None), key, stamp)
            if entry is None:
                entry = read(key)
                if entry is None:
                    continue
                new.append((key, stamp, sealed.seal({"key": key, "entry": entry}, "entry")))
            found.append(entry)
        if new or known:
            self._remember(table, new, known)
        return found

    def forget_all(self) -> None:
        """Remove the file; the next listing makes it anew."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(OSError):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _remembered(self, table: Table, run_id: str | None) -> dict[Key, tuple[Stamp, bytes]]:
        if not self._path.exists():
            return {}
        where, values = ("", ()) if run_id is None else (" WHERE run = ?", (run_id,))
        query = f"SELECT run, kind, name, stamp, entry FROM {table}{where}"
        rows = self._try(lambda database: database.execute(query, values).fetchall()) or []
        return {(run, kind, name): (stamp, entry) for run, kind, name, stamp, entry in rows}

    def _remember(self, table: Table, new: Iterable[tuple[Key, Stamp, bytes]], gone: Collection[Key]) -> None:
        rows = [(*key, stamp, entry) for key, stamp, entry in new]

        def work(database: sqlite3.Connection) -> None:
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.executemany(f"DELETE FROM {table} WHERE run = ? AND kind = ? AND name = ?", gone)
                database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?)", rows)

        self._try(work)

    def _try(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do something with the file; None where SQLite cannot, and then a damaged file goes away."""
        try:
            with contextlib.closing(
                sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
            ) as database:
                _prepare(database)
                return work(database)
        except _OtherVersionError as error:
            logger.warning("%s is of version %s, which this version does not use", self._path, error)
        except sqlite3.OperationalError as error:
            # Locked for too long, read-only, no room: the files say the same.
            logger.info("%s was not used: %s", self._path, error)
        except sqlite3.DatabaseError as error:
            logger.warning("%s is damaged (%s) and is made anew from the manifests", self._path, error)
            self.forget_all()
        return None


class _OtherVersionError(Exception):
    pass


def _prepare(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise _OtherVersionError(version)
    database.execute("PRAGMA synchronous = FULL")
    # A flipped bit may leave text that is no UTF-8; then it fits no key.
    database.text_factory = lambda data: data.decode(errors="replace")
    if version == VERSION:
        return
    database.execute("PRAGMA journal_mode = WAL")
    # Older versions need no migration: what they remembered is read from the files again.
    tables = [
        f"""
        DROP TABLE IF EXISTS {table};
        CREATE TABLE {table} (
            run TEXT, kind TEXT, name TEXT, stamp TEXT NOT NULL, entry BLOB NOT NULL, PRIMARY KEY (run, kind, name)
        ) WITHOUT ROWID;
        """
        for table in get_args(Table)
    ]
    database.executescript(f"BEGIN IMMEDIATE; {''.join(tables)} PRAGMA user_version = {VERSION}; COMMIT;")


def _open(remembered: tuple[Stamp, bytes] | None, key: Key, stamp: Stamp) -> Mapping[str, Any] | None:
    if remembered is None or remembered[0] != stamp or not isinstance(remembered[1], bytes):
        return None
    try:
        content = sealed.unseal(remembered[1], "entry")
    except DamagedError:
        return None
    return content["entry"] if tuple(content["key"]) == key else None
