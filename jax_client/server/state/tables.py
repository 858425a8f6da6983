"""Which objects does the server know by id, and how does a restarted server make one again?

A `Table` holds the objects that are in memory. For each it keeps a record, plain data that the next server makes the
object from when a client asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jax_client.errors import NotFoundError
from jax_client.server.state.request_log import RequestLog

T = TypeVar("T")
Fields = dict[str, Any]


class Records:
    """What the next server needs to know of objects: fields by kind and id. Without a log nothing is kept.

    Args:
        log: the file that the records are kept in.
    """

    def __init__(self, log: RequestLog | None) -> None:
        self._log = log

    @property
    def kept(self) -> bool:
        """Whether a next server will know the records."""
        return self._log is not None

    def put(self, kind: str, key: str, fields: Fields) -> None:
        """Keep a record; when this returns, a killed server does not lose it."""
        if self._log is not None:
            self._log.put(kind, key, fields)

    def get(self, kind: str, key: str) -> Fields | None:
        """Return a record, None if there is none."""
        return None if self._log is None else self._log.get(kind, key)

    def forget_session(self, session_id: str) -> None:
        """Forget a session and what belongs to it."""
        if self._log is not None:
            self._log.forget_session(session_id)


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
            raise NotFoundError(f"there is no {self._kind} {key!r} on this server{self._advice}")
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
