"""How fast does a server work? While it does, its log has a line every ten seconds with the tokens per second."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

from jax_client.runs.lifecycle.base_models import BaseModels
from jax_client.threads import start_thread

logger = logging.getLogger(__name__)
SECONDS = 10.0
# By the name of the line: the part of an engine's usage, and the sum in it.
_SUMS = {
    "trained": ("training", "tokens"),
    "sampled": ("sampling", "sampled_tokens"),
    "prompts": ("sampling", "prompt_tokens"),
}


class ActivityLog:
    """Writes the lines from a thread of its own, within its body.

    Args:
        models: whose engines work.
        seconds: between two looks.
    """

    def __init__(self, models: BaseModels, seconds: float = SECONDS) -> None:
        self._models = models
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = start_thread("jax_client-activity", self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        before, at = self._sums(), time.monotonic()
        while not self._ended.wait(self._seconds):
            sums, now = self._sums(), time.monotonic()
            if (line := rates_in_words(sums - before, now - at)) is not None:
                logger.info("%s", line + self._rows())
            before, at = sums, now

    def _sums(self) -> Counter[str]:
        sums: Counter[str] = Counter()
        for model in self._models.loaded():
            usage = model.engine.monitor.usage()
            for name, (part, field) in _SUMS.items():
                found = usage["training"] if part == "training" else usage["sampling"]
                sums[name] += int(found.get(field, 0))
        return sums

    def _rows(self) -> str:
        states = [model.engine.monitor.usage()["sampling"] for model in self._models.loaded()]
        running, waiting = (int(sum(each.get(f"rows_{name}", 0) for each in states)) for name in ("running", "waiting"))
        return f"; {running} samples run, {waiting} wait" if running or waiting else ""


def rates_in_words(new: Counter[str], seconds: float) -> str | None:
    """Return the tokens per second of what has been done in `seconds`, None where there was no work."""
    parts = [f"{name} {new[name] / seconds:,.0f}" for name in _SUMS if new[name] > 0]
    return f"tokens/s: {', '.join(parts)}" if parts else None
