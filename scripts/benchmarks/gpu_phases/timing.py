"""How is one program timed on a device? Queued several times in a row, so that the host's part is hidden."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def milliseconds(program: Callable[..., Any], *arguments: Any, calls: int = 10, repeats: int = 5) -> float:
    """Return the median over repeats of the time of one of `calls` queued calls; the first one is not counted."""
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        results = [program(*arguments) for _ in range(calls)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def peak_mib(device: Any) -> float | None:
    """Return the most memory of a device that was in use so far; None where it does not count."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None
