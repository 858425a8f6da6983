"""What lives as long as the process, what becomes of it in a fork, and in which order does it end?

Each room registers its threads, pools and process-wide state here, with exit steps and a fork rule. This module knows
none of these rooms. At the end of the program the exit steps run on the main thread, in this order:

| step | what happens | registered by |
|---|---|---|
| `INTAKE` | sockets of this process accept no more requests | `server/sharing` |
| `REQUESTS` | saves that were asked for are finished; other waiting requests are dropped | `autosave`, `Engine` |
| `RUNS` | steps and how runs end are saved; mirrors and metrics are written out | `autosave`, `Mirror`, `run_metrics` |
| `SAMPLING` | the running block of decode steps ends, its rows are dropped | `Engine` |
| `ENGINES` | engines and pools close; every thread of `threads` is joined | `Engine`, `threads`, each thread's owner |
| `MEMORY` | base weights, adapters and caches are dropped | `Engine` |

Then the interpreter ends as it would without this package.

The steps are one `atexit` callback, because Python ends in this order: the main module ends, the pools of
`concurrent.futures` are shut, the user's threads are joined, `atexit` callbacks run (last registered first), daemon
threads lose the interpreter. So an engine serves a thread that outlives the main module, and no daemon thread of ours
meets finalisation. (`threading._register_atexit` would run before such threads have ended.) Python 3.12.0 to 3.12.2
start no thread from the end of the main module on: no exit step needs a new thread, nor a pool of `concurrent.futures`.

A thread that is still inside the compiler, or whose device does not answer, cannot be joined. `interpreter_end` then
ends the process without finalising beside it.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jax_client import interpreter_end

logger = logging.getLogger(__name__)

# Most that the exit waits for threads, from the step SAMPLING on. Saving has no limit.
JOIN_SECONDS = 2.0


class Step(enum.Enum):
    """The exit steps, in their order."""

    INTAKE = "intake"
    REQUESTS = "requests"
    RUNS = "runs"
    SAMPLING = "sampling"
    ENGINES = "engines"
    MEMORY = "memory"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """Something that lives as long as the process, or as its `owner`.

    Attributes:
        name: for logs and `report`.
        owns: what it keeps, in words.
        at_exit: `f(owner)` by exit step; `f()` of a part without an owner.
        after_fork: likewise, called in the child.
        at_loss: `f() -> lines`, called when devices are lost for good, and the process will end.
        owner: the object to which it belongs, whose end ends the part; None for a module.
    """

    name: str
    owns: str
    at_exit: Mapping[Step, Callable[..., object]]
    after_fork: Callable[..., object] | None
    at_loss: Callable[[], list[str]] | None
    owner: weakref.ref[Any] | None

    def call(self, function: Callable[..., object]) -> None:
        """Call an exit step or the fork rule, unless the owner is gone."""
        if self.owner is None:
            function()
        elif (owner := self.owner()) is not None:
            function(owner)


# A dict keeps the order of registration. Its operations are atomic: a destructor, which may run inside any of them,
# unregisters without a lock.
_parts: dict[int, Part] = {}
_threads: set[threading.Thread] = set()
_not_waited_for: set[threading.Thread] = set()
_done: set[tuple[Part, Step]] = set()  # the exit steps that have been called
_ending = False
_deadline: float | None = None  # of all joins, once the exit has begun to join


def register(
    name: str,
    owns: str,
    *,
    at_exit: Mapping[Step, Callable[..., object]] | None = None,
    after_fork: Callable[..., object] | None = None,
    at_loss: Callable[[], list[str]] | None = None,
    owner: object = None,
) -> None:
    """Add a part. Within a step, and after a fork, parts are called in the order of their registration.

    Args:
        name: for logs and `report`.
        owns: what it keeps, in words.
        at_exit: `f()`, or `f(owner)` where there is one, by exit step. It starts no thread.
        after_fork: `f()` or `f(owner)`, called in the child, where no other thread of the parent's exists. A part with
            an owner is forgotten there afterwards.
        at_loss: `f() -> lines` saves what can be saved, and says where that is.
        owner: is referred to weakly; the part ends with it, or by `unregister`.
    """
    key = id(owner)
    reference = None if owner is None else weakref.ref(owner, lambda _: _parts.pop(key, None))
    part = Part(name=name, owns=owns, at_exit=at_exit or {}, after_fork=after_fork, at_loss=at_loss, owner=reference)
    _parts[id(part) if owner is None else key] = part


def unregister(owner: object) -> None:
    """Forget the part of an owner that has ended by itself."""
    _parts.pop(id(owner), None)


def run_exit_steps_before_others() -> None:
    """Have the exit steps run before every `atexit` callback that is registered already, such as those of jax."""
    atexit.unregister(_run_exit_steps)
    atexit.register(_run_exit_steps)


def save_after_loss() -> list[str]:
    """Save what this process holds, as devices are lost for good; return where that is, in lines for people."""
    lines: list[str] = []
    for part in _parts.copy().values():
        if part.at_loss is not None:
            try:
                lines += part.at_loss()
            except Exception:
                logger.exception("%s: what it holds could not be saved", part.name)
    return lines


def end_now(code: int) -> NoReturn:
    """End the process with an exit code, without its finalisation, in which threads that hang would take part."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def ending() -> bool:
    """Whether the exit steps have begun: no one waits for an answer any more."""
    return _ending


def track(thread: threading.Thread) -> None:
    """Join a thread at exit, until it is untracked; its owner tells it to end, in the step ENGINES or before."""
    _threads.add(thread)


def untrack(thread: threading.Thread) -> None:
    """Forget a thread that has done its last work."""
    _threads.discard(thread)


@contextlib.contextmanager
def not_waited_for() -> Iterator[None]:
    """Mark what this thread does in the body as endless for the exit, which then does not wait for the thread."""
    thread = threading.current_thread()
    if thread in _not_waited_for:  # in a body around this one
        yield
        return
    _not_waited_for.add(thread)
    try:
        yield
    finally:
        _not_waited_for.discard(thread)


def join(*threads: threading.Thread) -> bool:
    """Wait for threads in an exit step; return whether they have ended. All exit steps share JOIN_SECONDS."""
    global _deadline
    _deadline = _deadline or time.monotonic() + JOIN_SECONDS
    for thread in threads:
        # In short turns: a thread may begin to compile meanwhile.
        while thread.is_alive() and thread not in _not_waited_for and time.monotonic() < _deadline:
            thread.join(0.05)
    return not any(thread.is_alive() for thread in threads)


def report() -> dict[str, list[str]]:
    """Return what lives: the registered parts with what they own, and the names of the running threads."""
    return {
        "parts": [f"{part.name}: {part.owns}" for part in _parts.copy().values()],
        "threads": sorted(thread.name for thread in _threads.copy()),
    }


def _run_exit_steps() -> None:
    global _ending, _deadline
    _ending = True
    for step in Step:
        try:
            if step is Step.MEMORY and not _join_all():
                interpreter_end.abandon_threads()
                return
            _run(step)
        except KeyboardInterrupt:
            # The second Ctrl-C: the user wants the end now. What was being written is whole or absent.
            logger.warning("the program was interrupted again while it was ending; nothing more is waited for")
            _deadline = time.monotonic()


def _join_all() -> bool:
    """Join every thread; return whether none is left. A load that ends meanwhile makes parts and threads, which end."""
    while join(*_threads.copy()):
        if not _threads:
            return True
        for step in list(Step)[:-1]:
            _run(step)
    return False


def _run(step: Step) -> None:
    for part in _parts.copy().values():
        if (function := part.at_exit.get(step)) is not None and (part, step) not in _done:
            _done.add((part, step))
            try:
                part.call(function)
            except Exception:
                logger.exception("%s: the exit step %r failed", part.name, step.value)


# For a process without an engine; an engine has them registered anew, after jax's.
atexit.register(_run_exit_steps)


def _after_fork() -> None:
    # The parent's threads are not here.
    _threads.clear()
    _not_waited_for.clear()
    for key, part in _parts.copy().items():
        if part.owner is not None:
            _parts.pop(key, None)
        if part.after_fork is not None:
            try:
                part.call(part.after_fork)
            except Exception:
                logger.exception("%s: the fork rule failed", part.name)


# The one fork hook of the package.
os.register_at_fork(after_in_child=_after_fork)
