"""When is a run saved that nobody saves? Every few minutes, on SIGTERM, at exit, and when its client goes.

One thread of the process does it, off the path of the steps. What it writes can be continued from like any checkpoint;
the line to do that is printed where the process or the client ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from jax_client.runs.lifecycle.run_checkpointer import RunCheckpointer
from jax_client.runs.results import run_metrics
from jax_client.values import CheckpointKey

logger = logging.getLogger(__name__)

# A spot machine gets 30 s from the signal to the end of its power.
SIGNAL_SECONDS = 25.0


@dataclass(slots=True, eq=False)
class _Watch:
    checkpointer: RunCheckpointer
    seconds: float
    due: float = field(init=False)

    def __post_init__(self) -> None:
        self.due = time.monotonic() + self.seconds


_lock = threading.Lock()
_watched: dict[RunCheckpointer, _Watch] = {}
# Keepers whose run was forgotten. A destructor may run inside any allocation, with any lock held, so it only puts here
# (SimpleQueue.put is re-entrant); the thread does the rest. None wakes the thread up.
_forgotten: SimpleQueue[RunCheckpointer | None] = SimpleQueue()
_thread: threading.Thread | None = None
_previous: Callable[[int, FrameType | None], Any] | int | None = None


def watch(checkpointer: RunCheckpointer, minutes: float | None) -> None:
    """Save a run every so many minutes from now on, and when the process ends; None only ends it when forgotten."""
    with _lock:
        if minutes is not None:
            _watched[checkpointer] = _Watch(checkpointer, minutes * 60)
        _start()
    _forgotten.put(None)


def forget(checkpointer: RunCheckpointer) -> None:
    """Save a run a last time soon, and end it; for destructors."""
    _forgotten.put(checkpointer)


def save_now(checkpointers: list[RunCheckpointer]) -> None:
    """Save those of these runs that are watched, saying how to go on from them; they are watched no longer."""
    for checkpointer in checkpointers:
        if checkpointer in _watched:
            _save(checkpointer, aloud=True)
            # Only now: until then an exit of the process would save it too, and waits for this.
            with _lock:
                _watched.pop(checkpointer, None)


def unwatch(checkpointer: RunCheckpointer) -> None:
    """Save a run by itself no longer."""
    with _lock:
        _watched.pop(checkpointer, None)


def announce(run_id: str, path: CheckpointKey, step: int) -> None:
    """Print how to go on from a run that was saved by itself."""
    print(
        f"jax_client saved step {step} of run {run_id}, which nobody had saved. To go on from it:\n"
        f'  service_client.create_training_client_from_state_with_optimizer("{path}")',
        file=sys.stderr,
    )


def handle_sigterm() -> None:
    """Save every watched run on SIGTERM, then do what SIGTERM did before. Only the main thread can, others do not.

    A process that ignores SIGTERM goes on ignoring it.
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
    # On another thread, and not for ever: this one was interrupted anywhere, perhaps with a lock held.
    saving = threading.Thread(target=_save_all, name="jax_client-sigterm", daemon=True)
    saving.start()
    saving.join(SIGNAL_SECONDS)
    if callable(_previous):
        _previous(number, frame)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _after_fork() -> None:
    """Leave a forked process without runs to save: it has no device, and its parent saves them."""
    global _lock, _forgotten, _thread
    _lock, _forgotten, _thread = threading.Lock(), SimpleQueue(), None
    _watched.clear()
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, _previous if callable(_previous) else signal.SIG_DFL)


os.register_at_fork(after_in_child=_after_fork)


def _start() -> None:
    global _thread
    if _thread is not None:
        return
    _thread = threading.Thread(target=_loop, name="jax_client-autosave", daemon=True)
    _thread.start()
    # Before the interpreter stops the thread pools that saving needs, which `atexit` comes after. Executors themselves
    # register there; it has no public name.
    getattr(threading, "_register_atexit", atexit.register)(_save_all)


def _loop() -> None:
    while True:
        with _lock:
            due = min((each.due for each in _watched.values()), default=None)
        try:
            checkpointer = _forgotten.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except Empty:
            _save_due()
        else:
            if checkpointer is not None:
                _finish(checkpointer)


def _save_due() -> None:
    now = time.monotonic()
    with _lock:
        due = [each for each in _watched.values() if each.due <= now]
        for each in due:
            each.due = now + each.seconds
    for each in due:
        _save(each.checkpointer, aloud=False)
    for store in {each.checkpointer.store for each in due}:
        try:
            store.sweep_expired()
        except Exception as error:
            # This thread has runs to save yet.
            logger.warning("expired checkpoints could not be looked for: %s", error)


def _finish(checkpointer: RunCheckpointer) -> None:
    save_now([checkpointer])
    try:
        checkpointer.end()
    except Exception as error:
        logger.warning("run %s could not be ended: %s", checkpointer.run_id, error)


def _save_all() -> None:
    with _lock:
        # Those that are forgotten, too, until they are saved.
        checkpointers = list(_watched)
    save_now(checkpointers)
    run_metrics.shared.flush()
    for store in {checkpointer.store for checkpointer in checkpointers}:
        store.flush_mirror(SIGNAL_SECONDS)


def _save(checkpointer: RunCheckpointer, *, aloud: bool) -> None:
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
    if aloud:
        announce(checkpointer.run_id, path, step)
