"""How do an adapter's weights leave the trainer? Copied once to the host, off the dispatch thread, then shared.

A version is held as long as its snapshot lives. A snapshot that no one holds any more is announced, so that the
replicas free theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from jax_client.threads import Workers

if TYPE_CHECKING:
    from jax_client.engine.core.adapters import Snapshot
    from jax_client.values import AdapterState

# Adapters that are copied at once. Each copy waits for the device.
COPIERS = 2


class Versions:
    """The weights of the snapshots that were sampled from, by number. Used by one thread.

    Args:
        share: `f(state) -> weights` makes an adapter's weights readable by every replica, on a thread of its own.
        gone: `f(number)` is called when a snapshot is gone, by any thread, inside any allocation: it may only put.
    """

    def __init__(self, share: Callable[[AdapterState], object], gone: Callable[[int], None]) -> None:
        self._share = share
        self._gone = gone
        self._copiers = Workers("jax_client-handover", COPIERS, ready=1)
        self._shared: dict[int, Future[object]] = {}

    def shared(self, snapshot: Snapshot) -> Future[object]:
        """Return the future of a snapshot's weights, float32 as the trainer has them; copied at the first request."""
        number = snapshot.number
        if (known := self._shared.get(number)) is not None and not (known.done() and known.exception() is not None):
            return known
        weakref.finalize(snapshot, self._gone, number).atexit = False
        share = self._share
        future = self._shared[number] = self._copiers.submit(lambda: share(snapshot.fetch()))
        return future

    def forget(self, number: int) -> None:
        """Drop the weights of a snapshot that is gone."""
        self._shared.pop(number, None)

    def close(self) -> None:
        """Drop all weights, and end the threads."""
        self._shared.clear()
        self._copiers.close(wait=False, cancel=True)
