"""What does a server still know after it was killed? One SQLite file, written beside the requests.

Sessions, models and samplers are written before the client hears of them. Requests and answers are written in batches
by one thread, a few milliseconds later: what is lost with them was not answered yet. The file is a convenience, not
the truth: checkpoints do not depend on it, and a damaged one is set aside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_client import process
from jax_client.errors import RequestFailedError
from jax_client.host.disk import advice
from jax_client.process import Step
from jax_client.server.state.pending import Kind
from jax_client.server.wire.answers import Answer
from jax_client.sqlite_file import SqliteFile, is_damage, reclaim, transaction, used_bytes
from jax_client.threads import BatchWriter

logger = logging.getLogger(__name__)

FILE = "server.sqlite"
# Names of keys have no dot.
FILE_OF_KEY = "server.{}.sqlite"
BUSY_SECONDS = 10.0
# The newest answers are kept, as many as fit into a file of this size.
MAX_ANSWERS = 50_000
MAX_BYTES = 512 * 2**20
# What is left where there is too much, and the bytes of answers between two looks, and of one transaction.
_LEFT = 0.9
_LOOK_EVERY = 16 * 2**20
_MORE_ANSWERS = 5_000
# Records of sessions, models and samplers; those of the sessions that were written to last are kept.
MAX_RECORDS = 200_000
MAX_RECORD_BYTES = 64 * 2**20
# A session that nobody ended, such as one whose client was killed.
FORGOTTEN_SECONDS = 30 * 24 * 3600.0
_BATCH = 512
# How long the thread lets a batch grow.
_LINGER_SECONDS = 0.003

_SCHEMA = """
CREATE TABLE things (kind TEXT, id TEXT, about TEXT NOT NULL, written REAL NOT NULL, PRIMARY KEY (kind, id));
CREATE TABLE promises (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, digest BLOB NOT NULL, kind TEXT NOT NULL,
    body BLOB, media_type TEXT, status INTEGER, failed INTEGER
);
"""

_ANSWERED = """
INSERT INTO promises (id, digest, kind, body, media_type, status, failed) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    body = excluded.body, media_type = excluded.media_type, status = excluded.status, failed = excluded.failed
"""

_DELETE_OLDEST = (
    "DELETE FROM promises WHERE number IN "
    "(SELECT number FROM promises WHERE body IS NOT NULL ORDER BY number LIMIT ?) RETURNING id"
)
# Whole sessions, whose ids have 36 characters, and begin the ids of all that belongs to them. What has the id `all` is
# of no session, and stays.
_OLD_RECORDS = """
DELETE FROM things WHERE substr(id, 1, 36) IN (
    SELECT session FROM (
        SELECT session, sum(rows) OVER newest AS rows, sum(bytes) OVER newest AS bytes FROM (
            SELECT substr(id, 1, 36) AS session, max(written) AS last, count(*) AS rows,
                sum(length(about) + 200) AS bytes
            FROM things WHERE id != 'all' GROUP BY substr(id, 1, 36)
        ) WINDOW newest AS (ORDER BY last DESC, session)
    ) WHERE rows > ? OR bytes > ?
)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A request as it was written; `answer` is None if none was given."""

    digest: bytes
    kind: Kind
    answer: Answer | None


_Write = Callable[[sqlite3.Connection], Any]


class RequestLog:
    """The file behind a server. Thread-safe.

    A disk that fails is reported once in the log; the server continues with what it has in memory.

    Args:
        directory: the state directory.
        key: the name of the key whose requests these are, which have a file of their own; None without keys.
        parts: of how many files this is one: all together have the limits of one.
    """

    def __init__(self, directory: Path, key: str | None = None, parts: int = 1) -> None:
        place = directory / (FILE if key is None else FILE_OF_KEY.format(key))
        self._parts = parts
        self._file = SqliteFile(place, (_SCHEMA,), busy_seconds=BUSY_SECONDS, shrinks=True)
        self._ahead: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._failed = False
        # Of the thread that writes: the bytes of answers since the last look at the size of the file.
        self._unseen = 0
        with contextlib.closing(_open_or_set_aside(self._file, parts)) as connection:
            # Nearly every request is new: it costs no look at the file.
            self._ids = {row[0] for row in connection.execute("SELECT id FROM promises")}
        self._reading = threading.local()
        self._readers: list[sqlite3.Connection] = []
        # Of the thread that writes.
        self._writing: sqlite3.Connection | None = None
        self._batches = BatchWriter("jax_client-request-log", self._write, seconds=_LINGER_SECONDS, most=_BATCH)
        self._batches.start()
        steps = {Step.RUNS: RequestLog.close}
        process.register("request log", "requests and answers that are to be written", owner=self, at_exit=steps)

    def put(self, kind: str, key: str, record: dict[str, Any]) -> None:
        """Keep what is known of a session, a model or a sampler; on return a killed server does not forget it."""
        row = kind, key, json.dumps(record), time.time()
        self._now(lambda c: c.execute("INSERT OR REPLACE INTO things VALUES (?, ?, ?, ?)", row))

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return what was kept, None if nothing."""
        row = self._read("SELECT about FROM things WHERE kind = ? AND id = ?", (kind, key))
        return None if row is None else json.loads(row[0])

    def forget(self, kind: str, key: str) -> None:
        """Forget one record, soon."""
        self._later(lambda c: c.execute("DELETE FROM things WHERE kind = ? AND id = ?", (kind, key)))

    def forget_session(self, session_id: str) -> None:
        """Forget a session and what belongs to it; answers stay until newer ones need the room."""
        own = session_id, session_id + ":"
        self._later(lambda c: c.execute("DELETE FROM things WHERE id = ? OR substr(id, 1, length(?2)) = ?2", own))

    def accepted(self, request_id: str, digest: bytes, kind: Kind) -> None:
        """Write a request that was accepted, soon."""
        with self._lock:
            self._ahead[request_id] = Entry(digest=digest, kind=kind, answer=None)
            self._ids.add(request_id)
        row = request_id, digest, kind

        def write(connection: sqlite3.Connection) -> None:
            with self._lock:
                ahead = self._ahead.get(request_id)
            # Answered meanwhile: what comes next writes all of it.
            if ahead is None or ahead.answer is None:
                connection.execute("INSERT OR IGNORE INTO promises (id, digest, kind) VALUES (?, ?, ?)", row)

        self._later(write)

    def answered(self, request_id: str, digest: bytes, kind: Kind, answer: Answer) -> None:
        """Write the answer of a request, soon."""
        entry = Entry(digest=digest, kind=kind, answer=answer)
        with self._lock:
            self._ahead[request_id] = entry
        row = request_id, digest, kind, answer.body, answer.media_type, answer.status, answer.failed

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(_ANSWERED, row)
            self._unseen += len(answer.body)

        self._later(write, lambda: self._settled(request_id, entry))

    def _settled(self, request_id: str, entry: Entry) -> None:
        with self._lock:
            if self._ahead.get(request_id) is entry:
                del self._ahead[request_id]

    def find(self, request_id: str) -> Entry | None:
        """Return a request with its answer, None if it is not known, or not any more."""
        with self._lock:
            ahead = self._ahead.get(request_id)
            known = request_id in self._ids
        if ahead is not None or not known:
            return ahead
        columns = "digest, kind, body, media_type, status, failed"
        row = self._read(f"SELECT {columns} FROM promises WHERE id = ?", (request_id,))
        if row is None:
            return None
        answer = None if row[2] is None else Answer(body=row[2], media_type=row[3], status=row[4], failed=bool(row[5]))
        return Entry(digest=row[0], kind=row[1], answer=answer)

    def close(self) -> None:
        """Write what is still to be written."""
        self._batches.close()
        for connection in (self._writing, *self._readers):
            if connection is not None:
                connection.close()

    def _read(self, query: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return next(iter(self._read_all(query, values)), None)

    def _read_all(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        # One connection per thread: SQLite lets them read beside the writer.
        connection = getattr(self._reading, "connection", None)
        try:
            if connection is None:
                connection = self._reading.connection = self._file.open()
                # Of each thread that reads, KiB.
                connection.execute("PRAGMA cache_size = -128")
                self._readers.append(connection)
            return connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._report(error)
            return []

    def _now(self, write: _Write) -> None:
        self._later(write)
        self._batches.flush()

    def _later(self, write: _Write, then: Callable[[], None] | None = None) -> None:
        self._batches.put((write, then))

    def _write(self, writes: Sequence[tuple[_Write, Callable[[], None] | None]]) -> None:
        try:
            if self._writing is None:
                self._writing = self._file.open()
            waiting = deque(writes)
            while waiting:
                with transaction(self._writing):
                    # Not all at once: a transaction is in the log beside the file, until it is whole.
                    while waiting and self._unseen <= _LOOK_EVERY:
                        waiting.popleft()[0](self._writing)
                if self._unseen > _LOOK_EVERY or len(self._ids) > most_answers(self._parts) + _MORE_ANSWERS:
                    self._prune(self._writing)
        except sqlite3.Error as error:
            self._report(error)
            # A disk that takes nothing must not fill the memory.
            with self._lock:
                self._ahead.clear()
        for _, then in writes:
            if then is not None:
                then()

    def _prune(self, connection: sqlite3.Connection) -> None:
        pruned = prune(connection, self._parts)
        with self._lock:
            self._ids.difference_update(pruned)
            self._unseen = 0

    def _report(self, error: sqlite3.Error) -> None:
        if not self._failed:
            self._failed = True
            lost = "what was asked will not be known after a restart"
            logger.warning("%s: %s; %s. %s", self._file.path, error, lost, advice(error, self._file.path))


def _open_or_set_aside(file: SqliteFile, parts: int) -> sqlite3.Connection:
    try:
        return _opened(file, parts)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            # A full disk, a lock: what is in the file is not lost.
            raise RequestFailedError(
                f"{file.path} cannot be opened: {error}. See that no other process has the file, then start the server "
                f"again. {advice(error, file.path)}"
            ) from error
        aside = file.set_aside(f"{file.path.stem}.damaged-{int(time.time())}")
        logger.warning("%s is damaged (%s); it is now %s, and old promises are forgotten", file.path, error, aside.name)
        return _opened(file, parts)


def _opened(file: SqliteFile, parts: int) -> sqlite3.Connection:
    """Return a connection to a file that is whole from end to end, without the rows that are not needed any more."""
    connection = file.open()
    try:
        (found,) = connection.execute("PRAGMA quick_check").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        with transaction(connection):
            # Not by a clock alone, which may have jumped ahead: what was written last tells how old the rest is.
            last = "(SELECT min(max(written), ?) FROM things)"
            old = f"written < {last} - ? AND id != 'all'"
            connection.execute(f"DELETE FROM things WHERE {old}", (time.time(), FORGOTTEN_SECONDS))
            newest = "(SELECT max(number) FROM promises)"
            lost = f"DELETE FROM promises WHERE body IS NULL AND number < {newest} - ?"
            connection.execute(lost, (most_answers(parts),))
            connection.execute(_OLD_RECORDS, (MAX_RECORDS // parts, MAX_RECORD_BYTES // parts))
        prune(connection, parts)
        reclaim(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def most_answers(parts: int) -> int:
    """Return how many answers one of `parts` files keeps."""
    return max(1, MAX_ANSWERS // parts)


def prune(connection: sqlite3.Connection, parts: int = 1) -> list[str]:
    """Delete the oldest answers beyond the limits and return their ids; requests without an answer stay.

    Outside of a transaction. The size is that of the file's pages, which small answers do not fill.
    """
    pruned: list[str] = []
    (rows,) = connection.execute("SELECT count(*) FROM promises WHERE body IS NOT NULL").fetchone()
    if rows > (most := most_answers(parts)):
        with transaction(connection):
            found = connection.execute(_DELETE_OLDEST, (rows - most,)).fetchall()
        pruned += [row[0] for row in found]
    if used_bytes(connection) > MAX_BYTES // parts:
        while used_bytes(connection) > _LEFT * (MAX_BYTES // parts):
            (rows,) = connection.execute("SELECT count(*) FROM promises WHERE body IS NOT NULL").fetchone()
            with transaction(connection):
                found = connection.execute(_DELETE_OLDEST, (-(-rows // 20),)).fetchall()
            if not found:
                break
            pruned += [row[0] for row in found]
    if pruned:
        reclaim(connection)
    return pruned
