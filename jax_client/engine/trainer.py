"""How does a training call become micro-batches on the device and come back as one answer?"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine import memory, packing
from jax_client.engine.adapters import Adapter, Weights
from jax_client.engine.compiled import CompileRecord
from jax_client.engine.dispatch import Task
from jax_client.engine.packing import MicroBatch
from jax_client.engine.requests import AdamSettings, CustomLoss, LossSpec, Sequence, TrainResult
from jax_client.engine.train_programs import NO_ADAPTER, TrainPrograms
from jax_client.errors import RequestFailedError
from jax_client.losses import registry
from jax_client.models.config import ModelConfig
from jax_client.models.transformer import Remat
from jax_client.sharding import put_rows, put_whole

# Micro-batches whose programs may be queued on the device at once: one runs while the next is launched.
IN_FLIGHT = 2
Steps = Generator[Any, Any, Any]


class Trainer:
    """Runs training calls with the engine's weights. Its tasks run on the engine's dispatch thread."""

    def __init__(
        self,
        params: Any,
        model: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        log: list[CompileRecord],
        *,
        max_tokens: int,
        remat: Remat,
    ):
        self.max_tokens = max_tokens
        self.remat: Remat = remat
        self._params = params
        self._model = model
        self._dtype = dtype
        self._mesh = mesh
        self._row_multiple = mesh.shape["data"] * mesh.shape["fsdp"]
        self._programs = TrainPrograms(model, dtype, mesh, log)
        heads = model.n_heads * model.head_dim
        per_layer = model.d_model * (2 * heads + 2 * model.n_kv_heads * model.head_dim + 3 * model.d_ff)
        self._attention_weight = 2 * heads / per_layer

    def prepare(self, sequences: list[Sequence], loss: LossSpec | None) -> list[MicroBatch]:
        """Pack a call on the host; runs on a worker thread while the device is busy with earlier calls."""
        defaults: dict[str, float] = {}
        if loss is not None:
            known = registry.LOSSES[loss.name]
            values = {**known.defaults, **loss.config}
            used = [n for n in known.inputs if n in known.defaults or any(n in s.inputs for s in sequences)]
            defaults = {name: values.get(name, 0.0) for name in used}
        plans = packing.plan_call(
            [len(s.tokens_T) for s in sequences],
            max_tokens=self.max_tokens,
            row_multiple=self._row_multiple,
            max_length=self._model.max_context,
            attention_weight=self._attention_weight,
        )
        return [packing.fill(plan, sequences, defaults) for plan in plans]

    def forward_task(
        self, adapter: Adapter | None, sequences: list[Sequence], loss: LossSpec, prepared: Future[list[MicroBatch]]
    ) -> Task[TrainResult]:
        """Score the sequences and their loss without a gradient."""
        weights = NO_ADAPTER if adapter is None else adapter.weights
        return (yield from self.score(weights, sequences, loss, prepared))

    def score(
        self, weights: Weights, sequences: list[Sequence], loss: LossSpec, prepared: Future[list[MicroBatch]]
    ) -> Task[TrainResult]:
        """As `forward_task`, with the given adapter weights."""
        batches = yield prepared.result
        out = _Answers(sequences)
        for batch in batches:
            device = self._device_batch(batch)
            logprobs_BTC, _ = self._programs.forward(self._params, weights, device, remat=None)
            _, sums = self._loss(loss, logprobs_BTC, batch)
            yield from out.add(batch, logprobs_BTC, sums)
        yield from out.drain()
        return out.result()

    def forward_backward_task(
        self, adapter: Adapter, sequences: list[Sequence], loss: LossSpec, prepared: Future[list[MicroBatch]]
    ) -> Task[TrainResult]:
        """Accumulate the gradient of a built-in loss."""
        batches = yield prepared.result
        out, grads = _Answers(sequences), self._accumulated(adapter)
        for batch in batches:
            device = self._device_batch(batch)
            logprobs_BTC, saved = self._programs.forward(self._params, adapter.weights, device, remat=self.remat)
            g_BTC, sums = self._loss(loss, logprobs_BTC, batch)
            grads = self._backward(adapter, device, saved, g_BTC, grads)
            del saved
            yield from out.add(batch, logprobs_BTC, sums)
        yield from out.drain()
        yield partial(jax.block_until_ready, grads)
        adapter.grads = grads
        return out.result()

    def custom_task(
        self, adapter: Adapter, sequences: list[Sequence], loss: CustomLoss, prepared: Future[list[MicroBatch]]
    ) -> Task[TrainResult]:
        """Accumulate the gradient of a loss that runs on the host: one forward, the user's function, one backward.

        What the forward pass saved waits on the device for the cotangents; the micro-batches beyond the memory's share
        run their forward pass again.
        """
        batches = yield prepared.result
        out = _Answers(sequences)
        room = memory.ACTIVATION_SHARE * memory.available_bytes(self._mesh.devices.flat[0])
        kept: list[Any] = []
        for batch in batches:
            size = memory.activation_bytes_per_token(self._model, self._dtype, self.remat) * batch.tokens_BT.size
            room -= size / self._row_multiple
            device = self._device_batch(batch)
            logprobs_BTC, saved = self._programs.forward(self._params, adapter.weights, device, remat=self.remat)
            kept.append((device, saved if room >= 0 else None))
            del saved
            yield from out.add(batch, logprobs_BTC, {})
        yield from out.drain()
        value, cotangents, metrics = yield partial(loss, out.logprobs())

        grads = self._accumulated(adapter)
        for batch, (device, saved) in zip(batches, kept, strict=True):
            if saved is None:
                _, saved = self._programs.forward(self._params, adapter.weights, device, remat=self.remat)
            g_BTC = put_rows(packing.scatter(batch.plan, sequences, cotangents), self._mesh)
            grads = self._backward(adapter, device, saved, g_BTC, grads)
            del saved
            yield partial(jax.block_until_ready, grads)
        adapter.grads = grads
        return TrainResult(logprobs=out.logprobs(), metrics={**metrics, "loss:sum": value})

    def optim_step(self, adapter: Adapter, settings: AdamSettings) -> Steps:
        """Yield-from: return ((weights, mu, nu), metrics on the host); the adapter is not changed."""
        hyper = {name: put_whole(np.float32(value), self._mesh) for name, value in asdict(settings).items()}
        *new, metrics = self._programs.optim_step(
            adapter.weights, adapter.mu, adapter.nu, adapter.grads, put_whole(np.int32(adapter.step), self._mesh), hyper
        )
        yield partial(jax.block_until_ready, new)
        return tuple(new), (yield partial(jax.device_get, metrics))

    def _accumulated(self, adapter: Adapter) -> Weights:
        return jax.tree.map(jnp.zeros_like, adapter.weights) if adapter.grads is None else adapter.grads

    def _backward(
        self, adapter: Adapter, device: dict[str, jax.Array], saved: Any, g_BTC: jax.Array, grads: Weights
    ) -> Weights:
        return self._programs.backward(self._params, adapter.weights, device, saved, g_BTC, grads, remat=self.remat)

    def _loss(self, loss: LossSpec, logprobs_BTC: jax.Array, batch: MicroBatch) -> tuple[jax.Array, Any]:
        inputs = {name: put_rows(array, self._mesh) for name, array in batch.inputs.items()}
        config = {name: put_whole(np.float32(value), self._mesh) for name, value in loss.config.items()}
        return self._programs.loss(logprobs_BTC, inputs, config, put_rows(batch.real_BTC, self._mesh), name=loss.name)

    def _device_batch(self, batch: MicroBatch) -> dict[str, jax.Array]:
        names = ("tokens_BT", "segments_BT", "positions_BT", "targets_BTC")
        return {name: put_rows(getattr(batch, name), self._mesh) for name in names}


class _Answers:
    """Collects logprobs and loss statistics of the micro-batches, at most `IN_FLIGHT` of them unfinished."""

    def __init__(self, sequences: list[Sequence]):
        self._sequences = sequences
        self._logprobs: list[np.ndarray | None] = [None] * len(sequences)
        self._sums: dict[str, float] = {}
        self._pending: list[tuple[MicroBatch, Any]] = []

    def add(self, batch: MicroBatch, logprobs_BTC: jax.Array, sums: dict[str, jax.Array]) -> Steps:
        self._pending.append((batch, (logprobs_BTC, sums)))
        if len(self._pending) >= IN_FLIGHT:
            yield from self._fetch()
        else:
            yield None

    def drain(self) -> Steps:
        while self._pending:
            yield from self._fetch()

    def _fetch(self) -> Steps:
        batch, arrays = self._pending.pop(0)
        logprobs_BTC, sums = yield partial(jax.device_get, arrays)
        packing.unpack(batch.plan, self._sequences, logprobs_BTC, self._logprobs)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def logprobs(self) -> list[np.ndarray]:
        missing = [i for i, array in enumerate(self._logprobs) if array is None]
        if missing:
            raise RequestFailedError(f"no logprobs came back for datum {missing[0]}; this is a bug, please report it.")
        return [array for array in self._logprobs if array is not None]

    def result(self) -> TrainResult:
        return TrainResult(logprobs=self.logprobs(), metrics=registry.metrics(self._sums))
