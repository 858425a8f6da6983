"""How is a deletion taken back? The checkpoint is hidden, and given ten minutes to live; then the store deletes it.

What is hidden is remembered here, not on disk: a page of another process shows such a checkpoint with its last minutes,
and a server that ends within them leaves the deletion to the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError
from jax_client.values import CheckpointKey, JsonObject

UNDO_SECONDS = 600.0
# Two readings of a deadline may differ by as much, seconds.
_SAME = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Hidden:
    """A deleted checkpoint.

    Attributes:
        created: unix seconds of the save: another one under the same path is not hidden.
        until: unix seconds at which it ends.
        former: the lifetime that it had, unix seconds, None for no end.
    """

    created: float
    until: float
    former: float | None


class Deleted:
    """The checkpoints that were deleted on the page, and can be had back. Thread-safe.

    Args:
        store: where they are; of the owner who may delete them.
        seconds: that they can be had back.
    """

    def __init__(self, store: CheckpointStore, seconds: float = UNDO_SECONDS) -> None:
        self._store = store
        self.seconds = seconds
        self._hidden: dict[str, _Hidden] = {}
        self._lock = threading.Lock()

    def delete(self, key: CheckpointKey) -> float:
        """Hide a checkpoint and let it end; return until when it can be had back, unix seconds. Raises NotFoundError.

        A second call changes nothing.
        """
        record = self._store.record(key)
        with self._lock:
            known = self._hidden.get(str(key))
        if known is not None and _is_hidden(known, record.created, record.expires_at):
            return known.until
        changed = self._store.set_ttl(key, self.seconds)
        until = changed.expires_at or time.time() + self.seconds
        with self._lock:
            self._hidden[str(key)] = _Hidden(created=record.created, until=until, former=record.expires_at)
        return until

    def undelete(self, key: CheckpointKey) -> None:
        """Show a checkpoint again, with the lifetime that it had. Raises NotFoundError."""
        with self._lock:
            hidden = self._hidden.get(str(key))
        if hidden is None:
            raise NotFoundError(f"{key} was not deleted on this page, or longer than {self.seconds / 60:.0f} min ago.")
        record = self._store.record(key)
        if _is_hidden(hidden, record.created, record.expires_at):
            left = None if hidden.former is None else max(0.0, hidden.former - time.time())
            self._store.set_ttl(key, left)
        with self._lock:
            self._hidden.pop(str(key), None)

    def sweep(self) -> None:
        """Delete what has ended."""
        self._store.sweep_expired()

    def shown(self, rows: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the rows of checkpoints that are not hidden."""
        with self._lock:
            hidden = dict(self._hidden)
        return [row for row in rows if not _hides(hidden.get(str(row["path"])), row)]

    def listed(self) -> list[JsonObject]:
        """Return what can be had back, each with its path and until when, the newest first."""
        now = time.time()
        with self._lock:
            hidden = list(self._hidden.items())
        return [{"path": path, "until": each.until} for path, each in reversed(hidden) if each.until > now]


def _is_hidden(hidden: _Hidden, created: float, expires_at: float | None) -> bool:
    """Return whether a checkpoint is still the deleted one: not saved anew, and not given another lifetime."""
    return created == hidden.created and expires_at is not None and abs(expires_at - hidden.until) < _SAME


def _hides(hidden: _Hidden | None, row: JsonObject) -> bool:
    return hidden is not None and _is_hidden(hidden, row["created"], row.get("expires_at"))
