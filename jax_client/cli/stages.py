"""How is the progress of a start shown? As a line that changes on a terminal, as lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TypeVar

import click

T = TypeVar("T")
# Between two updates of a terminal, and of a log.
LIVE_SECONDS, LOG_SECONDS = 0.2, 15.0


def say(text: str) -> None:
    """Print a line, on stderr: stdout belongs to answers, and to the program of `jax_client run`."""
    click.echo(text, err=True)


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
