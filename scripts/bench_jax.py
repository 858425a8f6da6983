"""How does jax_client run one row of the comparison? Through its public clients, or the engine alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_client.config import EngineConfig

from bench_rows import NEW_TOKENS, RANK, Job

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Step = Callable[[], None]


def run(job: Job) -> tuple[Step, Callable[[], float | None]]:
    """Load the model; return one step of the row, and a function that reads the device's peak memory in MiB."""
    # No program may come from a cache: the first step has to show what compiling costs.
    config: Any = EngineConfig(dtype=job.dtype, compilation_cache_dir="")  # type: ignore[arg-type]
    step = on_engine(job, config) if job.surface == "engine" else on_clients(job, config)
    return step, device_peak_mib


def device_peak_mib() -> float | None:
    """Return the accelerator's peak memory; None on a CPU, which has no counter."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return stats["peak_bytes_in_use"] / 2**20 if stats else None


def on_clients(job: Job, config: EngineConfig) -> Step:
    """Return a step through ServiceClient: what a user's loop runs."""
    import jax_client
    from jax_client import types

    service = jax_client.ServiceClient(config=config)
    client = service.create_lora_training_client(base_model=job.model or MODEL, rank=RANK, train_unembed=False).result()
    if job.row.kind == "generate":
        sampler = client.save_weights_and_get_sampling_client().result()
        prompts = [types.ModelInput.from_ints(tokens) for tokens in job.row.sequences()]
        # An empty list turns every stop off, the end-of-text token's included.
        params = types.SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, stop=[])

        def generate() -> None:
            futures = [sampler.sample(prompt, 1, params) for prompt in prompts]
            check([len(future.result().sequences[0].tokens) for future in futures])

        return generate
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": types.TensorData.from_numpy(np.asarray(tokens[1:], np.int64))},
        )
        for tokens in job.row.sequences()
    ]

    def train() -> None:
        fwdbwd = client.forward_backward(data, "cross_entropy")
        optim = client.optim_step(types.AdamParams(learning_rate=1e-4))
        fwdbwd.result()
        optim.result()

    return train


def on_engine(job: Job, config: EngineConfig) -> Step:
    """Return a step on the engine itself, which needs neither `tinker` nor torch: for a bare accelerator image."""
    from jax_client.engine.engine import Engine
    from jax_client.engine.requests import AdamSettings, GenerationRequest, LoraSpec, LossSpec, Sequence
    from jax_client.weights.source import resolve

    engine = Engine(resolve(job.model or MODEL), config)
    lane = engine.open_lane()
    adapter = engine.create_adapter(lane, LoraSpec(rank=RANK, seed=0, train_unembed=False)).result()
    if job.row.kind == "generate":
        snapshot = engine.snapshot(lane, adapter).result()
        requests = [
            GenerationRequest(tokens_T=np.asarray(tokens, np.int32), max_tokens=NEW_TOKENS, temperature=0.0)
            for tokens in job.row.sequences()
        ]

        def generate() -> None:
            futures = [engine.generate(lane, snapshot, request) for request in requests]
            check([len(future.result().rows[0].tokens) for future in futures])

        return generate
    data = [
        Sequence(
            tokens_T=np.asarray(tokens[:-1], np.int32),
            targets=np.asarray(tokens[1:], np.int32),
            inputs={"weights": np.ones(len(tokens) - 1, np.float32)},
        )
        for tokens in job.row.sequences()
    ]
    adam = AdamSettings(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0)

    def train() -> None:
        fwdbwd = engine.forward_backward(lane, adapter, data, LossSpec(name="cross_entropy"))
        optim = engine.optim_step(lane, adapter, adam)
        fwdbwd.result()
        optim.result()

    return train


def check(lengths: list[int]) -> None:
    """Refuse a measurement in which a row stopped early."""
    if any(length != NEW_TOKENS for length in lengths):
        raise RuntimeError(f"Rows of {sorted(set(lengths))} tokens instead of {NEW_TOKENS}: the numbers would lie.")
