"""How is a deletion taken back? The checkpoint is hidden, and given ten minutes to live; then the store deletes it.

The store keeps the lifetime that it had, so that any server of the directory can have it back. What is hidden is
remembered here, not on disk: a page of another process shows such a checkpoint with its last minutes, and may delete
it, too, which hides it there; a server that ends within them leaves the deletion to the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import JaxClientError, NotFoundError
from jax_client.values import CheckpointKey, JsonObject

UNDO_SECONDS = 600.0
# Two readings of a deadline may differ by as much, seconds.
_SAME = 5.0
# Checkpoints that are deleted at once; each change waits for the disk.
_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Hidden:
    """A deleted checkpoint.

    Attributes:
        created: unix seconds of the save: another one under the same path is not hidden.
        until: unix seconds at which it ends.
    """

    created: float
    until: float


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
        # One change of a checkpoint after the other, on disk and here.
        self._changing = [threading.Lock() for _ in range(_AT_ONCE)]

    def delete(self, key: CheckpointKey) -> float:
        """Hide a checkpoint and let it end; return until when it can be had back, unix seconds. Raises NotFoundError.

        A second call changes nothing.
        """
        with self._changing[hash(key) % _AT_ONCE]:
            record = self._store.delete_after(key, self.seconds)
            until = record.expires_at or time.time() + self.seconds
            with self._lock:
                self._hidden.pop(str(key), None)  # the newest is the last
                self._hidden[str(key)] = _Hidden(created=record.created, until=until)
            return until

    def undelete(self, key: CheckpointKey) -> None:
        """Show a checkpoint again, with the lifetime that it had. Raises NotFoundError."""
        with self._changing[hash(key) % _AT_ONCE]:
            with self._lock:
                known = str(key) in self._hidden
            if not known:
                raise NotFoundError(
                    f"{key} was not deleted on this page, or longer than {self.seconds / 60:.0f} min ago."
                )
            self._store.restore(key)
            with self._lock:
                self._hidden.pop(str(key), None)

    def sweep(self) -> None:
        """Delete what has ended, and forget it."""
        self._store.sweep_expired()
        now = time.time()
        with self._lock:
            ended = [(path, each) for path, each in self._hidden.items() if each.until < now]
        for path, each in ended:
            if not self._is_there(path, each):
                with self._lock:
                    if self._hidden.get(path) == each:
                        del self._hidden[path]

    def _is_there(self, path: str, hidden: _Hidden) -> bool:
        try:
            record = self._store.record(CheckpointKey.parse(path))
        except NotFoundError:
            return False
        except JaxClientError:  # a disk that does not answer now
            return True
        return _is_hidden(hidden, record.created, record.expires_at)

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
