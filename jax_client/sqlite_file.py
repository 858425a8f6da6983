"""Who opens, migrates and sets aside the SQLite files of a state directory? A `SqliteFile`, one for each path.

No file is worth the training. A file that cannot be used is reported once and left alone until it can be; only a
damaged one is moved away, so that a new one begins. A full disk, a lock or a later version is no damage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from jax_client.host.disk import advice

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Beside the file: what is not yet in it, and an index of that, which SQLite makes anew. Then the rollback mode's.
LOG = "-wal"
OTHERS = ("-shm", "-journal")
MAX_LOG_BYTES = 16 * 2**20
# SQLite's number for auto_vacuum = INCREMENTAL.
INCREMENTAL = 2
# What SQLite says where it can write nothing beside the file, as it does even to read: no right, no room, a bad disk.
_CANNOT_WRITE = (
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)


class OtherVersionError(sqlite3.DatabaseError):
    """A later version of this package wrote the file."""


class _ChangedError(Exception):
    """A file is not the whole of what was written, or not for long; the text says so. Never leaves the module."""


class SqliteFile:
    """One SQLite file in WAL mode. Thread-safe; any number of processes may share the file.

    Args:
        path: of the file; made when it is first opened.
        migrations: statements that lead from version N to N + 1, at place N. The file's `user_version` is their number.
        busy_seconds: how long an operation waits for another process.
        synchronous: "NORMAL" may lose the last seconds at a loss of power, "FULL" does not; the file is whole.
        unused: what follows when the file cannot be used, for the log.
        quiet: log that at level INFO, because nothing is lost by it.
        shrinks: give space of deleted rows back to the disk, where `reclaim` is called. A file that was made without it
            is rewritten when it is opened, once.
        damaged: the suffix of a damaged file that `use` sets aside; None deletes the file.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        *,
        busy_seconds: float,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        unused: str = "nothing is remembered",
        quiet: bool = False,
        shrinks: bool = False,
        damaged: str | None = None,
    ) -> None:
        self.path = path
        self._migrations = migrations
        self._busy_seconds = busy_seconds
        self._synchronous = synchronous
        self._unused = unused
        self._level = logging.INFO if quiet else logging.WARNING
        self._shrinks = shrinks
        self._damaged = damaged
        # By what was said of the file before the colon.
        self._reported: dict[str, str] = {}
        self._rewritten = False

    def open(self) -> sqlite3.Connection:
        """Return a connection without implicit transactions, after the file is migrated; the caller closes it.

        Raises:
            OtherVersionError: a later version wrote the file; it is as it was.
            sqlite3.Error: the file is damaged (`is_damage`), or cannot be used now.
        """
        # Used by one thread at a time; another one may close it.
        database = sqlite3.connect(self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA schema_version")  # makes the file
            self._make_private()
            self._migrate(database)
        except BaseException:
            database.close()
            raise
        return database

    def use(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Return `work(connection)`; where SQLite cannot, report it once and return `otherwise`.

        A damaged file is set aside, and the work tried once more, with a new one. A ValueError is damage, too: the
        text in the file is not what was written.
        """
        return self._use(work, otherwise, only_reads=False)

    def read(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """As `use`, for work that only reads, of a file that is there.

        On a disk that is full or mounted for reading, the file is read as it is, if there is no log beside it.
        """
        return self._use(work, otherwise, only_reads=True)

    def _use(self, work: Callable[[sqlite3.Connection], T], otherwise: T, *, only_reads: bool) -> T:
        unused = "a file is not read" if only_reads else self._unused
        for _ in range(2):
            identity = _identity(self.path)
            try:
                with contextlib.closing(self.open()) as database:
                    done = work(database)
                self._reported.pop(unused, None)
                return done
            except OtherVersionError as error:
                self._report(unused, f"{self.path}: {error}", logging.WARNING)
                return otherwise
            except (sqlite3.OperationalError, OSError) as error:
                hint = self._advice(error)
                if only_reads and _primary(error) in _CANNOT_WRITE:
                    try:
                        return self._read_as_it_is(work)
                    except _ChangedError as changed:
                        hint = str(changed)
                    except (sqlite3.Error, OSError, ValueError):
                        pass  # the first error says more
                # No room, read-only, no directory, locked for too long: another day it may work.
                self._report(unused, f"{self.path}: {error}. {hint}", self._level)
                return otherwise
            except (sqlite3.DatabaseError, ValueError) as error:
                # Another process may have been first; the file that is there now is a new one.
                if identity is not None and _identity(self.path) == identity and not self._clear(unused, error):
                    return otherwise
        return otherwise

    def _read_as_it_is(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return `work(connection)` of a file in which nothing may be written, not even a lock.

        Raises:
            _ChangedError: not all is in the file, or a process wrote it meanwhile.
            sqlite3.Error: it cannot be read so.
        """
        before = self._stamps()
        address = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(address, uri=True, isolation_level=None)) as database:
            self._version(database)
            done = work(database)
        if self._stamps() != before:
            raise _ChangedError("It was written meanwhile.")
        return done

    def _stamps(self) -> tuple[int, int, int]:
        """Return what differs once the file is written. Raises _ChangedError where there is a log or a journal."""
        for suffix in (LOG, "-journal"):
            with contextlib.suppress(FileNotFoundError):
                if self._beside(suffix).stat().st_size:
                    raise _ChangedError(
                        f"Some of it is in {self.path.name}{suffix}, which SQLite reads only where it can write: copy "
                        "the directory to a place for that."
                    )
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def set_aside(self, name: str) -> Path:
        """Rename the file, and its log with it; return the new path.

        Raises:
            OSError: it stays where it is.
        """
        aside = self.path.with_name(name)
        self.path.replace(aside)
        aside.with_name(aside.name + LOG).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._beside(LOG).replace(aside.with_name(aside.name + LOG))
        for other in OTHERS:
            self._beside(other).unlink(missing_ok=True)
        return aside

    def delete(self) -> None:
        """Delete the file as far as that is possible; the next `open` makes a new one."""
        for suffix in ("", LOG, *OTHERS):
            with contextlib.suppress(OSError):
                self._beside(suffix).unlink(missing_ok=True)

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _clear(self, unused: str, error: Exception) -> bool:
        """Set the damaged file aside, or delete it; say whether it is gone."""
        if self._damaged is None:
            logger.warning("%s is damaged (%s) and is made anew", self.path, error)
            self.delete()
            return not self.path.exists()
        try:
            aside = self.set_aside(self.path.name + self._damaged)
        except OSError as problem:
            self._report(unused, f"{self.path} is damaged and stays where it is: {problem}", logging.WARNING)
            return False
        logger.warning("%s was damaged (%s); it is kept as %s, and a new one begun", self.path, error, aside.name)
        return True

    def _advice(self, error: Exception) -> str:
        # Where a file system has no locks, SQLite takes each of its refusals for another process's lock.
        busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
        return ("Another process may hold it. " if busy else "") + advice(error, self.path)

    def _report(self, unused: str, text: str, level: int) -> None:
        if self._reported.get(unused) != text:
            self._reported[unused] = text
            logger.log(level, "%s: %s", unused, text)

    def _make_private(self) -> None:
        """Let no other user read the file; SQLite gives its mode to the log and the index beside it."""
        # By its name: SQLite loses its locks where the process opens and closes the file itself.
        for suffix in ("", LOG, *OTHERS):
            with contextlib.suppress(OSError):  # not there, or another user's
                path = self._beside(suffix)
                if stat.S_IMODE(path.stat().st_mode) & 0o077:
                    path.chmod(0o600)

    def _migrate(self, database: sqlite3.Connection) -> None:
        version = self._version(database)
        database.execute(f"PRAGMA synchronous = {self._synchronous}")
        # Without a limit the log keeps the size of the largest transaction.
        database.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
        if self._shrinks:
            self._let_it_shrink(database)
        if version == len(self._migrations):
            return
        with contextlib.suppress(sqlite3.OperationalError):  # another process is about to do the same
            database.execute("PRAGMA journal_mode = WAL")
        with transaction(database):
            # Read again, as another process may have been first.
            for migration in self._migrations[self._version(database) :]:
                for statement in filter(str.strip, migration.split(";")):
                    database.execute(statement)
            database.execute(f"PRAGMA user_version = {len(self._migrations)}")

    def _let_it_shrink(self, database: sqlite3.Connection) -> None:
        """Have SQLite keep the places of free pages, so that they can be given back."""
        (kept,) = database.execute("PRAGMA auto_vacuum").fetchone()
        if kept == INCREMENTAL:
            return
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA auto_vacuum = {INCREMENTAL}")
        if pages and not self._rewritten:
            # Where another process holds it, or there is no room for a copy, it works as before until the next start.
            self._rewritten = True
            with contextlib.suppress(sqlite3.OperationalError):
                database.execute("VACUUM")

    def _version(self, database: sqlite3.Connection) -> int:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(self._migrations):
            raise OtherVersionError(f"it has version {version}, this package knows {len(self._migrations)}")
        return version


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error means that the file is of no use: SQLite says what may pass as OperationalError."""
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)


def used_bytes(database: sqlite3.Connection) -> int:
    """Return how many bytes of a file hold something."""
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def reclaim(database: sqlite3.Connection) -> None:
    """Give the space of deleted rows back to the disk, outside of a transaction; only of a file that `shrinks`."""
    # As a script: it frees a page with each step, and a statement without columns gets one step.
    database.executescript("PRAGMA incremental_vacuum")
    # Without waiting for readers: the next one gets further.
    database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def _primary(error: Exception) -> int | None:
    """Return SQLite's number of the kind of an error, which is the last byte of its code."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Write all that the body executes, or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
