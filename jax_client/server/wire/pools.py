"""On which threads does the server do what would stop its event loop? Cheap calls, work, files and bodies have pools.

A call of any pool computes or reads the disk, and then ends: what waits for a turn, a model or a compile is awaited
by its future and holds no thread. So a pool may be busy, but it is never filled by waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jax_client.host.memory import give_back
from jax_client.threads import Workers

P = ParamSpec("P")
T = TypeVar("T")

# Sessions, signs of life, polls, cancellations.
_cheap = Workers("jax_client-calls", 32)
# Data to check, files to read.
_work = Workers("jax_client-requests", 16)
# Every byte of a checkpoint to compare with its hash: listings do not wait behind it, nor does it take all cores.
_files = Workers("jax_client-file-checks", 2)
# Few: each thread has a heap, which keeps the size of the largest body.
_small_bodies, _large_bodies = Workers("jax_client-bodies", 2), Workers("jax_client-large-bodies", 1)
# The size up to which a body is a small one.
MEDIUM = 2**20


def return_memory() -> None:
    """Return free memory to the system, on a thread, for that takes a while."""
    _work.submit(give_back)


async def run_cheap(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that takes milliseconds on a thread; return its result."""
    return await asyncio.wrap_future(_cheap.submit(function, *args, **kwargs))


async def run_work(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that may compute, or read the disk, for longer on a thread; return its result."""
    return await asyncio.wrap_future(_work.submit(function, *args, **kwargs))


async def run_on_files(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that reads every byte of a checkpoint on a thread; return its result."""
    return await asyncio.wrap_future(_files.submit(function, *args, **kwargs))


async def run_on_body(size: int, work: Callable[[], T]) -> T:
    """Run work on a body of `size` bytes, -1 for unknown, on a thread, few at a time and large ones alone."""
    if 0 <= size <= MEDIUM:
        return await asyncio.wrap_future(_small_bodies.submit(work))

    def large() -> T:
        try:
            return work()
        finally:
            give_back()

    return await asyncio.wrap_future(_large_bodies.submit(large))
