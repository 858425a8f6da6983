"""Which objects does the server know by id, and how does a restarted server make one again?

A `Table` holds the objects that are in memory. For each it keeps a record, plain data that the next server makes the
object from when a client asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jax_client.errors import NotFoundError, shown
from jax_client.server.state.request_log import RequestLog

T = TypeVar("T")
Fields = dict[str, Any]


class Records:
    """What makes objects again: fields by kind and id, for this server, and in a log for the next one. Thread-safe.

    Args:
        log: the file that the records are kept in; None keeps them in memory.
    """

    def __init__(self, log: RequestLog | None) -> None:
        self._log = log
        # By session, whose id begins the id of all that belongs to it.
        self._memory: dict[str, dict[tuple[str, str], Fields]] = {}
        self._lock = threading.Lock()

    @property
    def kept(self) -> bool:
        """Whether a next server will know the records."""
        return self._log is not None

    def put(self, kind: str, key: str, fields: Fields) -> None:
        """Keep a record; when this returns, a killed server does not lose it."""
        if self._log is not None:
            self._log.put(kind, key, fields)
            return
        with self._lock:
            self._memory.setdefault(key.partition(":")[0], {})[kind, key] = fields

    def get(self, kind: str, key: str) -> Fields | None:
        """Return a record, None if there is none."""
        if self._log is not None:
            return self._log.get(kind, key)
        with self._lock:
            return self._memory.get(key.partition(":")[0], {}).get((kind, key))

    def forget(self, kind: str, key: str) -> None:
        """Forget one record."""
        if self._log is not None:
            self._log.forget(kind, key)
            return
        with self._lock:
            self._memory.get(key.partition(":")[0], {}).pop((kind, key), None)

    def forget_session(self, session_id: str) -> None:
        """Forget a session and what belongs to it."""
        if self._log is not None:
            self._log.forget_session(session_id)
            return
        with self._lock:
            self._memory.pop(session_id, None)


class Table(Generic[T]):
    """The objects of one kind. Thread-safe.

    Args:
        kind: what the objects are, for records and messages.
        records: what the next server will know.
        advice: what a client does without the object, the end of a message.
    """

    def __init__(self, kind: str, records: Records, advice: str) -> None:
        self._kind = kind
        self._records = records
        self._advice = advice
        self._objects: dict[str, T] = {}
        self._lock = threading.Lock()

    def in_memory(self, key: str) -> T | None:
        """Return an object that is in this table, without reading the disk."""
        with self._lock:
            return self._objects.get(key)

    def get(self, key: str, remake: Callable[[Fields], T]) -> T:
        """Return an object.

        Args:
            key: its id.
            remake: `remake(fields) -> object`, for one that only a record tells of.

        Raises:
            NotFoundError: this server does not know the id.
        """
        known = self.in_memory(key)
        if known is not None:
            return known
        fields = self._records.get(self._kind, key)
        if fields is None:
            raise NotFoundError(f"there is no {self._kind} {shown(key)} on this server{self._advice}")
        return self.add(key, remake(fields))

    def add(self, key: str, new: T) -> T:
        """Add an object and return it, or the one that another thread has added first."""
        with self._lock:
            return self._objects.setdefault(key, new)

    def put(self, key: str, new: T) -> None:
        """Add an object as the newest one, in place of the one that had the id."""
        with self._lock:
            self._objects.pop(key, None)
            self._objects[key] = new

    def record(self, key: str, fields: Fields) -> None:
        """Keep what the next server makes the object from."""
        self._records.put(self._kind, key, fields)

    def forget_record(self, key: str) -> None:
        """Forget what the next server would make the object from."""
        self._records.forget(self._kind, key)

    def __len__(self) -> int:
        return len(self._objects)

    def remove(self, key: str) -> None:
        """Remove an object from memory."""
        with self._lock:
            self._objects.pop(key, None)

    def items(self) -> list[tuple[str, T]]:
        """Return ids and objects, the oldest first."""
        with self._lock:
            return list(self._objects.items())

    def values(self) -> list[T]:
        """Return the objects, the oldest first."""
        with self._lock:
            return list(self._objects.values())
