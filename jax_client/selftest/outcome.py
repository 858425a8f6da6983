"""What does an engine make of the toy? Its logprobs, gradients, two optimizer steps and greedy samples, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jax_client.config import EngineConfig
from jax_client.engine.core.adapters import Adapter
from jax_client.engine.core.requests import AdamSettings, GeneratedRow, GenerationRequest, GenerationResult, LossSpec
from jax_client.engine.engine import Engine
from jax_client.models.config import ModelConfig
from jax_client.models.lora_arrays import flatten
from jax_client.selftest import toy
from jax_client.sharding import Device, only_devices
from jax_client.weights.read.source import ModelSource

DType = Literal["bfloat16", "float32"]
# The norm of the toy's gradient is far above the clip, and eps far below its entries.
ADAM = AdamSettings(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)
CROSS_ENTROPY = LossSpec(name="cross_entropy")
STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What training gave.

    Attributes:
        logprobs: of each example's targets, float32 (T,), before the first step.
        start: the adapter's arrays by flat name.
        grads: the gradient of each step, by flat name.
        end: the arrays after the last step.
        metrics: of the last step.
    """

    logprobs: list[np.ndarray]
    start: Mapping[str, np.ndarray]
    grads: list[Mapping[str, np.ndarray]]
    end: Mapping[str, np.ndarray]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What an engine made of the toy.

    Attributes:
        attention: the name of what it trained with.
        samples: a row for each of the toy's prompts; none where it was not asked to sample.
    """

    model: ModelConfig
    dtype: DType
    attention: str
    training: Trained
    samples: list[GeneratedRow]


def outcome(engine: Engine, dtype: DType) -> Outcome:
    """Train the toy's adapter; `sampled` gives the samples."""
    name = engine.attention.name
    return Outcome(model=engine.model, dtype=dtype, attention=name, training=trained(engine), samples=[])


def open_engine(
    source: ModelSource, dtype: DType, devices: Sequence[Device], mesh: Mapping[str, int] | None = None
) -> Engine:
    """Open an engine of a model on some devices, all of them on "fsdp" if no mesh is given."""
    # This leaves the cache of compiled programs to the environment: without one, all are compiled here and now.
    settings = EngineConfig(dtype=dtype, mesh=mesh or "auto", precompile=False, compilation_cache_dir="")
    with only_devices(devices):
        return Engine(source, settings)


def trained(engine: Engine) -> Trained:
    """Train the toy's adapter for `STEPS` steps on its examples."""
    lane, state = engine.open_lane(), toy.adapter(engine.model)
    adapter, data = engine.open_adapter(lane, state).result(), toy.examples(engine.model.vocab_size)
    logprobs: list[np.ndarray] = []
    grads, metrics = [], {}
    for _ in range(STEPS):
        result = engine.train_batch(lane, adapter, data, CROSS_ENTROPY).result()
        logprobs = logprobs or result.logprobs
        grads.append(_gradient(adapter))
        metrics = engine.optim_step(lane, adapter, ADAM).result()
    end = engine.snapshot(lane, adapter).result().fetch().weights
    engine.release(adapter)
    return Trained(logprobs=logprobs, start=state.weights, grads=grads, end=end, metrics=metrics)


def sampled(engine: Engine) -> list[GeneratedRow]:
    """Sample greedily after each of the toy's prompts, with its adapter."""
    snapshot = engine.snapshot(engine.open_lane(), toy.adapter(engine.model)).result()
    asked: list[Future[GenerationResult]] = [
        engine.generate(snapshot, GenerationRequest(tokens_T=prompt_T, max_tokens=toy.NEW_TOKENS, temperature=0.0))
        for prompt_T in toy.prompts(engine.model.vocab_size)
    ]
    return [future.result().rows[0] for future in asked]


def _gradient(adapter: Adapter) -> Mapping[str, np.ndarray]:
    if adapter.grads is None:
        raise RuntimeError("train_batch left no gradient")
    return {name: np.asarray(grad) for name, grad in flatten(adapter.grads).items()}
