"""Which rows does the torch comparison have, what are their tokens, and how is one step measured?

Imports the standard library only: both contenders and their parent use it, and a parent that has loaded a library
would pass its own peak memory on to its children (Linux keeps ru_maxrss across exec).
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

# Below every supported model's vocabulary size.
TOKEN_LIMIT = 32_000
RANK = 32
NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One workload: training sequences of these lengths, or prompts of these lengths to continue."""

    name: str
    kind: Literal["train", "generate"]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Return the tokens that count in one step: real training tokens (no padding), or new tokens."""
        return sum(self.lengths) if self.kind == "train" else NEW_TOKENS * len(self.lengths)

    def sequences(self) -> list[list[int]]:
        """Return random token ids, the same in every process; a training sequence has one more for its last target."""
        source = random.Random(self.name)
        extra = 1 if self.kind == "train" else 0
        return [[source.randrange(TOKEN_LIMIT) for _ in range(length + extra)] for length in self.lengths]


ROWS = {
    row.name: row
    for row in (
        Row(name="8x256", kind="train", lengths=(256,) * 8),
        Row(name="4x1024", kind="train", lengths=(1024,) * 4),
        Row(name="ragged16", kind="train", lengths=tuple(random.Random(0).choices(range(32, 513), k=16))),
        Row(name="generate8", kind="generate", lengths=(32,) * 8),
        Row(name="generate32", kind="generate", lengths=(32,) * 32),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one child process measures."""

    contender: str
    row: Row
    dtype: str
    model: str | None
    surface: str
    steps: int
    torch_compile: bool
    torch_micro_tokens: int


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Time the first step, one more to settle, then `steps`; seconds, with `compile_s` the first step's surplus."""
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    median = statistics.median(times[2:])
    return {"step_s": median, "first_step_s": times[0], "compile_s": max(0.0, times[0] - median)}


def peak_rss_mib() -> float:
    """Return this process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def median_of(results: Sequence[dict[str, float]], key: str) -> float | None:
    """Return the median over repeats; None where no repeat has the key."""
    values = [result[key] for result in results if result.get(key) is not None]
    return statistics.median(values) if values else None
