"""On which threads does the server do what would stop its event loop? On two pools: one of work, one of cheap calls.

A call of either pool computes or reads the disk, and then ends: what waits for a turn, a model or a compile is awaited
by its future and holds no thread. So a pool may be busy, but it is never filled by waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jax_client.threads import Workers

P = ParamSpec("P")
T = TypeVar("T")

# Sessions, signs of life, polls, cancellations.
_cheap = Workers("jax_client-calls", 32)
# Bodies to parse, data to check, files to read.
_work = Workers("jax_client-requests", 16)


async def run_cheap(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that takes milliseconds on a thread; return its result."""
    return await asyncio.wrap_future(_cheap.submit(function, *args, **kwargs))


async def run_work(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that may compute, or read the disk, for longer on a thread; return its result."""
    return await asyncio.wrap_future(_work.submit(function, *args, **kwargs))
