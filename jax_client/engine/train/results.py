"""How do the results of micro-batches come back from the device, a few at a time, as one answer?

`Results` waits for the oldest micro-batch when `IN_FLIGHT` of them are unfinished, and copies each sequence's part
to its place in the answer. Where owners share the device, the newest one ends before the turn does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from jax_client.engine.core.requests import LossSpec, TrainResult
from jax_client.engine.core.turns import Task, Unawaited
from jax_client.engine.train import packing
from jax_client.engine.train.packing import MicroBatch
from jax_client.errors import RequestFailedError
from jax_client.losses import registry
from jax_client.values import TrainExample

# Micro-batches whose programs may be queued on the device at once: one runs while the next is launched.
IN_FLIGHT = 2
# The logprobs (B, T, C) of a micro-batch, and its loss's sums.
Launched = tuple[jax.Array, dict[str, jax.Array]]


class Results:
    """Collects logprobs and loss statistics of the micro-batches, at most `IN_FLIGHT` of them unfinished.

    Attributes:
        host_s: seconds of copying results to where they belong.
    """

    def __init__(self, sequences: list[TrainExample]):
        self.host_s = 0.0
        self._sequences = sequences
        self._logprobs: list[np.ndarray | None] = [None] * len(sequences)
        self._sums: dict[str, float] = {}
        self._pending: list[tuple[MicroBatch, Launched]] = []

    def add(
        self, batch: MicroBatch, logprobs_BTC: jax.Array, sums: dict[str, jax.Array], *, running: object
    ) -> Task[None]:
        """Yield-from: take what a launched program will return; wait for earlier ones if too many are unfinished.

        Args:
            batch: that the program computes.
            logprobs_BTC: its logprobs.
            sums: of its loss.
            running: a tree of the arrays that end last, of all that is launched.
        """
        wait = partial(jax.block_until_ready, running)
        self._pending.append((batch, (logprobs_BTC, sums)))
        if len(self._pending) >= IN_FLIGHT:
            yield from self._fetch(wait)
        else:
            yield Unawaited(None, wait)

    def drain(self) -> Task[None]:
        """Yield-from: wait for everything."""
        while self._pending:
            yield from self._fetch()

    def _fetch(self, wait: Callable[[], object] | None = None) -> Task[None]:
        batch, arrays = self._pending.pop(0)
        get = partial(jax.device_get, arrays)
        logprobs_BTC, sums = yield get if wait is None else Unawaited(get, wait)
        start = time.perf_counter()
        packing.unpack(batch.plan, self._sequences, logprobs_BTC, self._logprobs)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self.host_s += time.perf_counter() - start

    def logprobs(self) -> list[np.ndarray]:
        """Return the logprobs of every sequence of the call."""
        missing = [i for i, array in enumerate(self._logprobs) if array is None]
        if missing:
            raise RequestFailedError(f"no logprobs came back for datum {missing[0]}; this is a bug, please report it.")
        return [array for array in self._logprobs if array is not None]

    def result(self, loss: LossSpec) -> TrainResult:
        """Return the call's answer."""
        return TrainResult(logprobs=self.logprobs(), metrics=registry.metrics(loss.name, self._sums))
