"""How is the progress of a start shown? As a line that changes on a terminal, as lines in a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TypeVar

import click

T = TypeVar("T")
# Between two updates of a terminal, and of a log.
LIVE_SECONDS, LOG_SECONDS = 0.2, 15.0


_times = False


def say(text: str) -> None:
    """Print a line, on stderr: stdout belongs to answers, and to the program of `jax_client run`."""
    click.echo(f"{stamp()}{text}", err=True)


def stamp() -> str:
    """Return what a line begins with: the time of day within `with_times`, else nothing."""
    return time.strftime("%H:%M:%S ") if _times else ""


@contextlib.contextmanager
def with_times() -> Iterator[None]:
    """Begin each line with the time: of a process that writes lines for days."""
    global _times
    _times = True
    try:
        yield
    finally:
        _times = False


class LineFormatter(logging.Formatter):
    """Writes a record as the commands write everything: [time] [warning: or error:] text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and those of a traceback."""
        level = "error" if record.levelno >= logging.ERROR else "warning" if record.levelno >= logging.WARNING else ""
        return f"{stamp()}{level_in_colour(level)}{super().format(record)}"


def level_in_colour(level: str) -> str:
    """Return "warning: " or "error: ", in colour where stderr shows one; "" for no level."""
    if not level:
        return ""
    text, plain = f"{level}:", os.environ.get("NO_COLOR") or not (sys.stderr and sys.stderr.isatty())
    return (text if plain else click.style(text, fg="red" if level == "error" else "yellow", bold=True)) + " "


def wait(future: Future[T], text: Callable[[], str]) -> T:
    """Return a future's result, and show the text of `text() -> str` until then.

    A terminal shows the text live. A log gets a line when the first word of the text changes, and one every 15 seconds.
    """
    with _shown() as show:
        while not future.done():
            show(text())
            wait_for([future], LIVE_SECONDS)
    return future.result()


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[str], object]]:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log().show
        return
    with console.status("") as status:
        # As Text, because a name may look like rich's markup.
        yield lambda text: status.update(Text(text))


class _Log:
    def __init__(self) -> None:
        self._stage, self._at = "", 0.0

    def show(self, text: str) -> None:
        stage, now = text.split()[0], time.monotonic()
        if stage != self._stage or now - self._at > LOG_SECONDS:
            say(text)
            self._stage, self._at = stage, now
