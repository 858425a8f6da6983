"""What leaves memory when a model does not fit? The object that was idle longest, then base models, then lost sessions.

Loading goes through `Eviction.make_fit`, which evicts one thing after another until the load succeeds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypeVar

from jax_client.errors import DoesNotFitError
from jax_client.runs.lifecycle.run import Run
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
from jax_client.runs.lifecycle.session import Session
from jax_client.server.state.evictable import Evictable, Served
from jax_client.server.state.tables import Table

T = TypeVar("T")

# An object that was not used for this long may be evicted when something else needs its memory.
IDLE_SECONDS = 60.0
# Of the samplers that a session made of weights in memory, the newest ON_DEVICE stay on the device and the newest
# IN_MEMORY can be used. A loop makes one with every step, and uses the newest few.
ON_DEVICE, IN_MEMORY = 4, 16
# The SDK gives a sign of life every ten seconds. A session without one for this long is ended where memory is needed.
SILENT_SECONDS = 120.0


class Eviction:
    """The rules by which a server frees memory. Thread-safe; the state is in the tables that it looks at.

    Args:
        own: the session of the server itself, which holds the base models that were loaded at the start.
        sessions, models, samplers: the objects that are in memory.
        last_sign: `last_sign(session_id) -> monotonic time` of the client's last sign of life.
        end_session: `end_session(session_id, detail)` ends a session and waits for that.
        peers: those of the servers on the same devices, to which this one is added. What is not found here is freed
            there.
    """

    def __init__(
        self,
        own: Session,
        sessions: Table[Session],
        models: Table[Served[Run]],
        samplers: Table[Served[SamplerHandle]],
        last_sign: Callable[[str], float],
        end_session: Callable[[str, str], None],
        peers: list[Eviction],
    ) -> None:
        self._peers = peers
        peers.append(self)
        self._own = own
        self._sessions = sessions
        self._models = models
        self._samplers = samplers
        self._last_sign = last_sign
        self._end_session = end_session

    def make_fit(self, make: Callable[[], T]) -> T:
        """Call `make() -> object`, evicting something as long as the object does not fit.

        Raises:
            DoesNotFitError: the object does not fit, and there is nothing left to evict.
        """
        while True:
            try:
                return make()
            except DoesNotFitError:
                if not self._free_something():
                    raise
                # The rest of an evicted object may be in reference cycles.
                gc.collect()

    def _free_something(self) -> bool:
        order = [self, *(peer for peer in self._peers if peer is not self)]
        steps = (Eviction._evict_idle, Eviction._release_base_models, Eviction._end_silent_sessions)
        return any(step(each) for step in steps for each in order)

    def _evict_idle(self) -> bool:
        """Evict what was not used for the longest, if that is long enough; return whether there was anything."""
        idle = [(since, evictable) for evictable in self._evictables() if (since := evictable.idle_since()) is not None]
        for since, evictable in sorted(idle, key=lambda each: each[0]):
            if time.monotonic() - since >= IDLE_SECONDS and evictable.evict():
                self._release_base_models()
                return True
        return False

    def _evictables(self) -> list[Evictable[Run] | Evictable[SamplerHandle]]:
        return [
            *(model.evictable for model in self._models.values()),
            *(sampler.evictable for sampler in self._samplers.values()),
        ]

    def _served(self) -> list[Served[Run] | Served[SamplerHandle]]:
        return [*self._models.values(), *self._samplers.values()]

    def _release_base_models(self) -> bool:
        """Release the base models that sessions and the server hold and do not use; return whether any were."""
        served = self._served()
        released = False
        for session_id, session in [*self._sessions.items(), ("", self._own)]:
            used = {each.base_model_name for each in served if each.session_id == session_id and each.evictable.in_use}
            # None: a sampler is loading, and only its checkpoint tells which base model it needs.
            if None not in used:
                released |= session.release_unused(used)
        return released

    def _end_silent_sessions(self) -> bool:
        """End the sessions that hold memory and whose clients are gone, and wait; return whether there were any."""
        last_used: dict[str, float] = {}
        holding: set[str] = set()
        for each in self._served():
            used = last_used.get(each.session_id, 0.0)
            last_used[each.session_id] = max(used, self._last_sign(each.session_id), each.evictable.last_used)
            if each.evictable.in_use:
                holding.add(each.session_id)
        limit = time.monotonic() - SILENT_SECONDS
        known = {session_id for session_id, _ in self._sessions.items()}
        silent = [session_id for session_id in sorted(holding & known) if last_used[session_id] < limit]
        for session_id in silent:
            self._end_session(session_id, f"its client was silent for {SILENT_SECONDS:g} s, and the memory was needed")
        return bool(silent)

    def evict_superseded(self, session_id: str) -> None:
        """Move a session's superseded samplers of unsaved weights off the device, and forget the oldest."""
        samplers = [
            (key, each) for key, each in self._samplers.items() if each.session_id == session_id and each.ephemeral
        ]
        for _, sampler in samplers[:-ON_DEVICE]:
            sampler.evictable.evict()
        for key, sampler in samplers[:-IN_MEMORY]:
            if not sampler.evictable.pinned:
                self._samplers.remove(key)
