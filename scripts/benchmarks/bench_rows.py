"""Which rows does the torch comparison have, how is one step measured, and under which conditions?

Imports the standard library only: both contenders and their parent use it, and a parent that has loaded a library
would pass its own peak memory on to its children (Linux keeps ru_maxrss across exec).
"""

from __future__ import annotations

import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

# Below every supported model's vocabulary size.
TOKEN_LIMIT = 32_000
RANK = 32
NEW_TOKENS = 64
SETTLE_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One workload: training sequences of these lengths, or prompts of these lengths to continue.

    Attributes:
        name: on the command line and in the tables.
        kind: what a step is.
        lengths: tokens of each sequence of one client; a training sequence's last target is not counted.
        batch: rows that name the same batch get the same tokens; None is a batch of its own.
        custom: the loss is a torch function, through forward_backward_custom.
        clients: training clients of one base model, each with its own batch of these lengths.
        ours_only: torch has nothing to compare.
    """

    name: str
    kind: Literal["train", "generate"]
    lengths: tuple[int, ...]
    batch: str | None = None
    custom: bool = False
    clients: int = 1
    ours_only: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens that count in one step: real training tokens (no padding), or new tokens."""
        return sum(self.lengths) * self.clients if self.kind == "train" else NEW_TOKENS * len(self.lengths)

    def sequences(self, client: int = 0) -> list[list[int]]:
        """Return random token ids, the same in every process; a training sequence has one more for its last target.

        Args:
            client: whose sequences; of prompts, the number of the step, so that none is found in a cache.
        """
        batch = self.batch or self.name
        source = random.Random(f"{batch}/{client}" if client else batch)
        extra = 1 if self.kind == "train" else 0
        return [[source.randrange(TOKEN_LIMIT) for _ in range(length + extra)] for length in self.lengths]


def drawn(low: int, high: int, count: int) -> tuple[int, ...]:
    """Return lengths drawn uniformly from low to high; fewer of them are the beginning of more."""
    return tuple(random.Random(0).choices(range(low, high + 1), k=count))


# Rows that are compared with each other stand together, so that little time passes between them.
ROWS = {
    row.name: row
    for row in (
        Row(name="8x256", kind="train", lengths=(256,) * 8),
        Row(name="custom8x256", kind="train", lengths=(256,) * 8, batch="8x256", custom=True, ours_only=True),
        Row(name="clients8", kind="train", lengths=(256,) * 8, batch="8x256", clients=8, ours_only=True),
        Row(name="4x1024", kind="train", lengths=(1024,) * 4),
        Row(name="ragged16", kind="train", lengths=drawn(32, 512, 16)),
        Row(name="1x8192", kind="train", lengths=(8192,)),
        Row(name="scale64", kind="train", lengths=drawn(16, 48, 64), ours_only=True),
        Row(name="scale256", kind="train", lengths=drawn(16, 48, 256), ours_only=True),
        Row(name="scale1024", kind="train", lengths=drawn(16, 48, 1024), ours_only=True),
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
    budget_s: float
    torch_compile: bool
    torch_group: int
    torch_micro_tokens: int


def nothing() -> dict[str, Any]:
    """Report nothing."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A contender that has loaded its model: one step of the row, and what can be asked after the timed steps.

    Attributes:
        step: does the work of one step and waits for it.
        device_peak_mib: the accelerator's peak memory; None on a CPU.
        report: what the contender knows of its own work, by the names that the JSON file has.
    """

    step: Callable[[], None]
    device_peak_mib: Callable[[], float | None]
    report: Callable[[], dict[str, Any]] = nothing


def measure(step: Callable[[], None], steps: int, budget_s: float) -> dict[str, float]:
    """Time the first step, one more to settle, then `steps`; seconds, with `compile_s` the first step's surplus.

    A first step that took longer than `SETTLE_LIMIT_S` is not followed by one to settle. No step is begun when
    `budget_s` has gone by since the first one began, but one is always timed.
    """
    began = time.perf_counter()
    first = seconds(step)
    if first <= SETTLE_LIMIT_S:
        step()
    times: list[float] = []
    while not times or (len(times) < steps and time.perf_counter() - began < budget_s):
        times.append(seconds(step))
    median = statistics.median(times)
    return {
        "step_s": median,
        "first_step_s": first,
        "compile_s": max(0.0, first - median),
        "steps_timed": len(times),
    }


def seconds(step: Callable[[], None]) -> float:
    """Return how long one step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def peak_rss_mib() -> float:
    """Return this process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def median_of(results: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the median over repeats; None where no repeat has a number under the key."""
    values = [value for result in results if isinstance(value := result.get(key), int | float)]
    return statistics.median(values) if values else None


def medians(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Reduce one contender's repeats; `steps_timed` is the number in all of them together."""
    reports = [repeat["report"] for repeat in repeats if repeat.get("report")]
    report = {}
    for part in dict.fromkeys(part for whole in reports for part in whole):
        found = [whole[part] for whole in reports if whole.get(part)]
        numbers = {name: median_of(found, name) for name in dict.fromkeys(name for facts in found for name in facts)}
        report[part] = {name: value for name, value in numbers.items() if value is not None}
    return {
        "tokens_per_s": median_of(repeats, "tokens_per_s"),
        "step_s": median_of(repeats, "step_s"),
        "memory_mib": median_of(repeats, "device_mib") or median_of(repeats, "rss_mib"),
        "compile_s": median_of(repeats, "compile_s"),
        "steps_timed": sum(repeat.get("steps_timed", 0) for repeat in repeats) or None,
        "report": report,
        "errors": [repeat["error"] for repeat in repeats if "error" in repeat],
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Say on which machine, with which versions and at which commit this process runs."""
    names = ("jax", "jaxlib", "flax", "torch", "transformers", "peft")
    root = Path(__file__).parents[2]
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": cores(),
        "gpu": output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": output("git", "-C", str(root), "describe", "--always", "--dirty") or "unknown",
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
