"""When does a run save itself? Every few minutes, on SIGTERM, at exit, and when its client is forgotten.

One thread of the process saves, beside the training steps. Training can be continued from such a save as from any
checkpoint; the call that does so is printed when the program ends and when a client is closed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TypeVar, cast

from jax_client import interpreter_end, process
from jax_client.host.program import error_in_words, unhandled_error
from jax_client.process import Step
from jax_client.runs.lifecycle.run_checkpointer import RunCheckpointer, forget_open_runs, note_ends
from jax_client.runs.results import run_metrics
from jax_client.threads import start_thread
from jax_client.values import CheckpointKey

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A spot machine gets 30 s from the signal to the end of its power.
SIGNAL_SECONDS = 25.0


@dataclass(slots=True, eq=False)
class _Watch:
    checkpointer: RunCheckpointer
    seconds: float
    due: float = field(init=False)

    def __post_init__(self) -> None:
        self.due = time.monotonic() + self.seconds


@dataclass(frozen=True, slots=True, eq=False)
class _SaveAll:
    """Save every watched run, then wait at most `mirror_seconds` for the mirrors; `done` is set at the end.

    `signal` names the signal for which this is asked, "" for none.
    """

    mirror_seconds: float
    signal: str = ""
    done: threading.Event = field(default_factory=threading.Event)


class _End:
    """End the thread."""


_lock = threading.Lock()
_watched: dict[RunCheckpointer, _Watch] = {}
# What the thread is asked to do. Destructors ask too, which may run inside any allocation, with any lock held:
# SimpleQueue.put is re-entrant. None only wakes the thread up.
_asked: SimpleQueue[RunCheckpointer | _SaveAll | _End | None] = SimpleQueue()
_thread: threading.Thread | None = None
_previous: Callable[[int, FrameType | None], object] | int | None = None
# Saves that the user asked for, until they are written.
_explicit: set[Future[object]] = set()


def watch(checkpointer: RunCheckpointer, minutes: float | None) -> None:
    """Save a run at every interval from now on, and when the process ends.

    Args:
        checkpointer: of the run.
        minutes: the interval; None never saves the run, and only ends it when it is forgotten.
    """
    with _lock:
        if minutes is not None:
            _watched[checkpointer] = _Watch(checkpointer, minutes * 60)
        _start()
    _asked.put(None)


def forget(checkpointer: RunCheckpointer) -> None:
    """Save a run a last time soon, and end it; for destructors."""
    _asked.put(checkpointer)


def finish_at_exit(save: Future[T]) -> None:
    """Have the end of the program wait for a save that the user asked for."""
    some = cast("Future[object]", save)
    _explicit.add(some)
    some.add_done_callback(_explicit.discard)


def save_now(checkpointers: list[RunCheckpointer]) -> None:
    """Save and announce those of these runs that are watched; afterwards they are watched no longer."""
    for checkpointer in checkpointers:
        if checkpointer in _watched:
            _save(checkpointer, announced=True)
            # Only now: until then an exit of the process would save it too, and waits for this.
            with _lock:
                _watched.pop(checkpointer, None)


def unwatch(checkpointer: RunCheckpointer) -> None:
    """Save a run by itself no longer."""
    with _lock:
        _watched.pop(checkpointer, None)


def announce(run_id: str, path: CheckpointKey, step: int) -> None:
    """Print the call that continues a run from its automatic save."""
    print(
        f"jax_client saved step {step} of run {run_id}, which nobody had saved. To go on from it:\n"
        f'  service_client.create_training_client_from_state_with_optimizer("{path}")',
        file=sys.stderr,
    )


def handle_sigterm() -> None:
    """Save every watched run on SIGTERM, then do what SIGTERM did before. Only the main thread can, others do not.

    A process that ignores SIGTERM continues to ignore it.
    """
    global _previous
    if threading.current_thread() is not threading.main_thread():
        return
    current = signal.getsignal(signal.SIGTERM)
    # None: a handler that is not Python's, which could not be called from here.
    if current in (_on_sigterm, signal.SIG_IGN, None):
        return
    _previous = current
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    # On another thread, and with a limit: this one was interrupted anywhere, perhaps with a lock held.
    _save_all(SIGNAL_SECONDS, mirror_seconds=SIGNAL_SECONDS, signal_name=signal.Signals(number).name)
    if callable(_previous):
        _previous(number, frame)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _after_fork() -> None:
    """Leave a forked process without runs to save: it has no device, and its parent saves them."""
    global _lock, _asked, _thread
    interpreter_end.keep_in_fork(_watched.copy(), _asked)
    _lock, _asked, _thread = threading.Lock(), SimpleQueue(), None
    _watched.clear()
    _explicit.clear()
    forget_open_runs()
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, _previous if callable(_previous) else signal.SIG_DFL)


def _start() -> None:
    global _thread
    if _thread is None:
        _thread = start_thread("jax_client-autosave", _loop)


def _loop() -> None:
    while True:
        with _lock:
            due = min((each.due for each in _watched.values()), default=None)
        try:
            asked = _asked.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except Empty:
            _save_due()
            continue
        if isinstance(asked, _End):
            return
        if isinstance(asked, _SaveAll):
            _save_watched(asked)
        elif asked is not None:
            _finish(asked)
        del asked  # a thread that waits must not keep the last run


def _save_due() -> None:
    now = time.monotonic()
    with _lock:
        due = [each for each in _watched.values() if each.due <= now]
        for each in due:
            each.due = now + each.seconds
    for each in due:
        _save(each.checkpointer, announced=False)
    for store in {each.checkpointer.store for each in due}:
        try:
            store.sweep_expired()
        except Exception as error:
            # This thread still has runs to save.
            logger.warning("expired checkpoints could not be looked for: %s", error)


def _finish(checkpointer: RunCheckpointer) -> None:
    save_now([checkpointer])
    try:
        checkpointer.end("forgotten", wait=False)
    except Exception as error:
        logger.warning("run %s could not be ended: %s", checkpointer.run_id, error)


def _save_all(seconds: float | None = None, mirror_seconds: float = 0.0, signal_name: str = "") -> None:
    """Have the thread save every watched run; wait for it, at most `seconds`."""
    if _thread is None or not _thread.is_alive():
        return
    asked = _SaveAll(mirror_seconds, signal_name)
    _asked.put(asked)
    asked.done.wait(seconds)


def _save_watched(asked: _SaveAll) -> None:
    try:
        with _lock:
            # Those that are forgotten, too, until they are saved.
            checkpointers = list(_watched)
        save_now(checkpointers)
        if asked.signal:
            # Not final: a handler of the program's own may end it in order, or let it continue.
            note_ends("signal", asked.signal, final=False)
        run_metrics.shared.flush()
        for store in {checkpointer.store for checkpointer in checkpointers}:
            if asked.mirror_seconds:
                store.flush_mirror(asked.mirror_seconds)
    finally:
        asked.done.set()


def _save_after_loss() -> list[str]:
    """Save every watched run; return a line with each one's newest checkpoint."""
    with _lock:
        checkpointers = list(_watched)
    _save_all(SIGNAL_SECONDS, mirror_seconds=0.0)
    note_ends("lost")
    run_metrics.shared.flush()
    return [f"Run {each.run_id}: {'no checkpoint' if each.newest is None else each.newest}." for each in checkpointers]


def _save_at_exit() -> None:
    """Save every watched run, and record how the program ends."""
    _save_all()
    error = unhandled_error()
    if error is None:
        note_ends("exit")
    elif isinstance(error, KeyboardInterrupt):
        note_ends("interrupted", "Ctrl-C")
    else:
        note_ends("exception", error_in_words(error))
    run_metrics.shared.flush()


def _end_thread() -> None:
    _asked.put(_End())


process.register(
    "autosave",
    "the runs that save themselves, the thread that saves them, and the saves that were asked for",
    at_exit={
        Step.REQUESTS: lambda: wait(_explicit.copy()),
        Step.RUNS: _save_at_exit,
        Step.ENGINES: _end_thread,
    },
    after_fork=_after_fork,
    at_loss=_save_after_loss,
)


def _save(checkpointer: RunCheckpointer, *, announced: bool) -> None:
    try:
        saved = checkpointer.save_if_needed()
    except Exception as error:
        # Training goes on; the next time may find room.
        logger.warning("run %s could not be saved by itself: %s", checkpointer.run_id, error)
        return
    if saved is None:
        return
    path, step = saved
    logger.info("run %s was saved by itself at step %d: %s", checkpointer.run_id, step, path)
    if announced:
        announce(checkpointer.run_id, path, step)
