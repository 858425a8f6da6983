"""What does a program wait for while it is silent? A line on stderr says what is loaded or compiled, and the seconds.

A terminal shows it live, on one row; elsewhere it is a line at the beginning, one every 15 seconds and one at the end.
A thread of the process looks at the sessions four times a second while requests are in flight. What takes less than a
second is not told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from jax_client import process
from jax_client.config import EngineConfig
from jax_client.process import Step
from jax_client.threads import start_thread

VARIABLE = "JAX_CLIENT_PROGRESS"
TICK_SECONDS, LEAST_SECONDS, LOG_SECONDS = 0.25, 1.0, 15.0
# Between two programs of a step nothing is compiled for an instant.
GAP_SECONDS = 0.75
# The thread ends when nothing was in flight for so long; the next request starts it again.
IDLE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """What the requests of a session wait for.

    Attributes:
        model: the name of the base model.
        text: such as "loading 4.1/8.0 GB" or "compiling forward (8x512)".
        ended: `f() -> text` says what had come of it by the time it was over, None for nothing.
    """

    model: str
    text: str
    ended: Callable[[], str | None]


class Waits(Protocol):
    """What is asked of a session."""

    def in_flight(self) -> bool:
        """Return whether a request is not done."""
        ...

    def waiting_for(self) -> Waiting | None:
        """Return what the requests wait for, None where they only compute."""
        ...


_lock = threading.Lock()
_sessions: weakref.WeakSet[Waits] = weakref.WeakSet()
_thread: threading.Thread | None = None
_ended = threading.Event()


def wanted(config: EngineConfig) -> bool:
    """Return whether the settings, the environment and the kind of program want to be told.

    Tests of pytest do not, unless the variable is set: the lines would be in what they capture.
    """
    said = os.environ.get(VARIABLE, "").strip().lower()
    if not config.progress or said in ("0", "false", "no", "off"):
        return False
    return bool(said) or "PYTEST_CURRENT_TEST" not in os.environ


def watch(session: Waits) -> None:
    """Tell what the requests of a session wait for, from now until none is in flight."""
    global _thread
    if _thread is not None and session in _sessions:
        return
    with _lock:
        _sessions.add(session)
        if _thread is None and not _ended.is_set():
            with contextlib.suppress(RuntimeError):  # Python starts no thread any more
                _thread = start_thread("jax_client-progress", _tell)


def _tell() -> None:
    global _thread
    teller, idle = Teller(), 0.0
    while not _ended.wait(TICK_SECONDS):
        with _lock:
            sessions = [session for session in _sessions if session.in_flight()]
        teller.tick(next((found for session in sessions if (found := session.waiting_for())), None))
        idle = 0.0 if sessions or teller.tells else idle + TICK_SECONDS
        del sessions  # a thread that waits must not keep a session
        if idle > IDLE_SECONDS:
            with _lock:
                if not any(session.in_flight() for session in _sessions):
                    _sessions.clear()
                    _thread = None
                    return
    teller.tick(None, last=True)


@dataclass(slots=True)
class _Stage:
    """Something that is waited for, as it was when it began."""

    kind: Literal["load", "compile"]
    waiting: Waiting
    began: float
    seen: float
    told: float | None = None


class Teller:
    """Turns what is waited for, tick by tick, into lines on stderr."""

    def __init__(self) -> None:
        self._stage: _Stage | None = None

    @property
    def tells(self) -> bool:
        """Whether something is waited for."""
        return self._stage is not None

    def tick(self, waiting: Waiting | None, *, last: bool = False) -> None:
        """Take what is waited for now, None for nothing; `last` ends what was told before."""
        now = time.monotonic()
        kind = None if waiting is None else "compile" if waiting.text.startswith("compiling") else "load"
        stage = self._stage
        if stage is not None and (kind != stage.kind if kind else last or now - stage.seen > GAP_SECONDS):
            self._end(stage)
            stage = self._stage = None
        if waiting is None or kind is None:
            return
        if stage is None:
            stage = self._stage = _Stage(kind, waiting, now, now)
        stage.seen = now
        self._show(stage, waiting, now)

    def _show(self, stage: _Stage, waiting: Waiting, now: float) -> None:
        seconds = now - stage.began
        text = f"{waiting.text} of {waiting.model}" if stage.kind == "compile" else _with_name(waiting)
        if _is_terminal():
            if seconds >= LEAST_SECONDS:
                stage.told = now
                _draw(f"jax_client: {text}, {seconds:.0f} s")
        elif seconds >= LEAST_SECONDS and (stage.told is None or now - stage.told > LOG_SECONDS):
            more = "" if stage.told is None else f", {seconds:.0f} s"
            stage.told = now
            _say(f"jax_client: {text}{more}")

    def _end(self, stage: _Stage) -> None:
        if stage.told is None:
            return
        if _is_terminal():
            _draw("")
        seconds, ended = stage.seen - stage.began, stage.waiting.ended()
        if ended is not None:
            _say(f"jax_client: {ended} in {seconds:.1f} s")


def _with_name(waiting: Waiting) -> str:
    verb, _, rest = waiting.text.partition(" ")
    return f"{verb} {waiting.model} {rest}".rstrip()


def _is_terminal() -> bool:
    with contextlib.suppress(AttributeError, ValueError):  # None, or closed
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return False


def _draw(text: str) -> None:
    """Replace the row; the cursor goes back to its beginning, so that what the program prints begins there."""
    text = text[: shutil.get_terminal_size().columns - 1]
    dim, plain = ("", "") if os.environ.get("NO_COLOR") or not text else ("\x1b[2m", "\x1b[0m")
    _write(f"\r\x1b[2K{dim}{text}{plain}\r")


def _say(text: str) -> None:
    _write(f"{text}\n")


def _write(text: str) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _after_fork() -> None:
    global _lock, _thread, _ended
    _lock, _thread, _ended = threading.Lock(), None, threading.Event()
    _sessions.clear()


process.register(
    "progress",
    "the thread that says what a program waits for",
    at_exit={Step.INTAKE: lambda: _ended.set()},
    after_fork=_after_fork,
)
