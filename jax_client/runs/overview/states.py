"""Is a run alive, at its end, or dead? Its lock, the end that its process recorded, and its newest sign of life tell.

A process that is killed records nothing, and the system takes its locks back: a run that no process holds, and of
which no end is recorded, was killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from jax_client.checkpoint.disk.clock import unix_seconds
from jax_client.checkpoint.disk.run_lock import LockRecord
from jax_client.metrics.summary import Summary, newest_sign
from jax_client.runs.overview.records import State

LIVE_SECONDS = 60.0
# How an end that was recorded is shown; its own text follows.
_ENDS: dict[str, tuple[State, str]] = {
    "closed": ("done", "closed"),
    "forgotten": ("done", "its client was forgotten"),
    "exit": ("done", "the program ended without closing it"),
    "interrupted": ("done", "interrupted"),
    "unloaded": ("unloaded", "its next request loads it again"),
    "errored": ("crashed", "closed after an error"),
    "exception": ("crashed", "the program ended by an exception"),
    "signal": ("crashed", "the process was ended by a signal"),
    "lost": ("crashed", "hosts or devices were lost"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """How a run is: its state, why, and when it ended."""

    state: State
    reason: str | None = None
    ended: float | None = None


def condition(lock: LockRecord | None, summary: Summary | None, now: float) -> Condition:
    """Return how a run is.

    Args:
        lock: what its lock file says, None where it has none.
        summary: of its metrics, None where it has none.
        now: unix seconds.
    """
    if lock is not None and lock.held:
        return _open(summary, lock, now)
    if lock is not None and (lock.ended is not None or lock.how):
        return _ended(lock.how, lock.text, lock.ended)
    if lock is not None and lock.tells:
        who = "its process" if lock.pid is None else f"process {lock.pid} on {lock.host or 'an unknown host'}"
        active = None if summary is None else unix_seconds(summary.active)
        last = "" if active is None else f", last seen {_clock(active)}"
        return Condition(
            state="crashed",
            reason=f"{who} was killed, or lost its power: no end is recorded{last}",
            ended=active,
        )
    # An earlier version of this package wrote it: the metrics alone may know.
    if summary is not None and summary.ended is not None:
        return _ended(str(summary.ended["how"]), str(summary.ended["text"]), unix_seconds(summary.ended["time"]))
    return Condition(state="unknown")


def _open(summary: Summary | None, lock: LockRecord, now: float) -> Condition:
    def is_recent(*times: float | None) -> bool:
        newest = newest_sign(times, now)
        return newest is not None and now - newest <= LIVE_SECONDS

    if summary is not None and summary.compiling and is_recent(summary.active):
        return Condition(state="live", reason=f"compiles {summary.compiling}")
    active = None if summary is None else summary.active
    return Condition(state="live" if is_recent(lock.since, active) else "idle")


def _ended(how: str, text: str, when: float | None) -> Condition:
    state, words = _ENDS.get(how, ("crashed", how or "ended"))
    reason = f"{words}: {text}" if text else None if how == "closed" else words
    return Condition(state=state, reason=reason, ended=when)


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
