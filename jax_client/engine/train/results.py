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
from jax_client.engine.devices.arrays import fetch
from jax_client.engine.train import packing
from jax_client.engine.train.packing import MicroBatch
from jax_client.engine.train.programs import EXPERT_LOAD
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
        self._load_LE: np.ndarray | None = None
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
        get = partial(fetch, arrays)
        logprobs_BTC, sums = yield get if wait is None else Unawaited(get, wait)
        start = time.perf_counter()
        packing.unpack(batch.plan, self._sequences, logprobs_BTC, self._logprobs)
        for name, value in sums.items():
            if name == EXPERT_LOAD:
                self._load_LE = value if self._load_LE is None else self._load_LE + value
            else:
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
        metrics = registry.metrics(loss.name, self._sums)
        if self._load_LE is not None:
            metrics |= load_metrics(self._load_LE)
        return TrainResult(logprobs=self.logprobs(), metrics=metrics)


def load_metrics(load_LE: np.ndarray) -> dict[str, float]:
    """Return how evenly the tokens of a call went to the experts, by the names that the hosted service has.

    `e_frac_with_tokens` is the share of a layer's experts that got a token; `e_max_violation` how much more than an
    equal share its busiest expert got, 0 for none and E - 1 for all.
    """
    share_LE = load_LE / load_LE.sum(axis=-1, keepdims=True)
    violation_L = share_LE.max(axis=-1) * share_LE.shape[-1] - 1
    return {
        "e_frac_with_tokens:mean": float((load_LE > 0).mean()),
        "e_max_violation:mean": float(violation_L.mean()),
        "e_max_violation:max": float(violation_L.max()),
    }
