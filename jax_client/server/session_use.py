"""What does each session keep, counted in its key's account, and when did its client last give a sign of life?

`SessionUse` also remembers which sessions have ended, so that their clients are told so, and which of their samplers of
unsaved weights are past. All of that is bounded.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from jax_client.server.wire.accounts import Account, BusyError

# Sessions that have ended, whose clients are told so; the clients of older ones hear that there is no such session.
MAX_ENDED = 1_000
# Samplers of unsaved weights that a session still tells apart from those that never were.
MAX_UNSAVED = 1_000


class SessionUse:
    """The account of a server's sessions, and their signs of life. Thread-safe.

    Args:
        account: what counts them.
        end_idle: `end_idle() -> bool` ends a session that keeps nothing which is lost with it, if there is one.
    """

    def __init__(self, account: Account, end_idle: Callable[[], bool]) -> None:
        self._account = account
        self._end_idle = end_idle
        self._counted: dict[str, Counter[str]] = {}
        self._unsaved: dict[str, deque[str]] = {}
        self._ended: deque[str] = deque()
        # Monotonic times, the oldest first.
        self._signs: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, **amounts: int) -> None:
        """Count what a session will keep, ending idle sessions where there is no room. Raises BusyError."""
        while True:
            try:
                return self._account.take(**amounts)
            except BusyError:
                if not self._end_idle():
                    raise

    def check(self, **amounts: int) -> None:
        """Raise BusyError unless there is room."""
        self.take(**amounts)
        self._account.give(**amounts)

    def keep(self, session_id: str, counted: Mapping[str, int], *, taken: bool = True) -> None:
        """Note what a session keeps.

        Args:
            session_id: the session.
            counted: the amounts.
            taken: whether they were taken; else they are added now, whatever the quota.
        """
        if not taken:
            self._account.add(**counted)
        with self._lock:
            self._counted.setdefault(session_id, Counter()).update(counted)

    def take_load(self) -> Callable[[object], None]:
        """Count a load; return what uncounts it, for its future. Raises BusyError."""
        self.take(loads=1)
        return lambda _: self._account.give(loads=1)

    def note_sign(self, session_id: str) -> None:
        """Note a sign of life of a session's client."""
        with self._lock:
            self._signs[session_id] = time.monotonic()
            self._signs.move_to_end(session_id)

    def last_sign(self, session_id: str) -> float:
        """Return the monotonic time of the last sign of life of a session's client, 0 for none."""
        return self._signs.get(session_id, 0.0)

    def silent(self, least: float) -> Iterator[tuple[str, float]]:
        """Yield the sessions whose clients have been silent for `least` seconds, and the seconds, the longest first."""
        now = time.monotonic()
        with self._lock:
            signs = list(self._signs.items())
        for session_id, sign in signs:
            if now - sign < least:
                return
            yield session_id, now - sign

    def note_unsaved(self, session_id: str, sampler_id: str) -> str | None:
        """Note a sampler of unsaved weights; return the oldest one where there are too many."""
        with self._lock:
            unsaved = self._unsaved.setdefault(session_id, deque())
            unsaved.append(sampler_id)
            return unsaved.popleft() if len(unsaved) > MAX_UNSAVED else None

    def forget(self, session_id: str) -> tuple[bool, str | None]:
        """Forget an ended session; return whether it was known, and an older one that no client is told of any more."""
        with self._lock:
            self._signs.pop(session_id, None)
            self._unsaved.pop(session_id, None)
            counted = self._counted.pop(session_id, None)
            if counted is None:
                return False, None
            self._ended.append(session_id)
            oldest = self._ended.popleft() if len(self._ended) > MAX_ENDED else None
        self._account.give(**counted)
        return True, oldest


def size(fields: object) -> int:
    """Return about how many bytes a record takes."""
    return len(json.dumps(fields)) + 200
