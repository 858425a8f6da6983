"""How does jax_client run one row of the comparison? Through its public clients, or the engine alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench_rows import NEW_TOKENS, RANK, Contender, Job
from jax_client.config import EngineConfig

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEARNING_RATE = 1e-4
Submit = Callable[[], Any]  # queues one request, returns its future
Describe = Callable[[], dict[str, Any]]


def run(job: Job) -> Contender:
    """Load the model, and return the row's step."""
    # No program may come from a cache: the first step has to show what compiling costs.
    config: Any = EngineConfig(dtype=job.dtype, compilation_cache_dir="", autosave_minutes=None)  # type: ignore[arg-type]
    return on_engine(job, config) if job.surface == "engine" else on_clients(job, config)


def device_peak_mib() -> float | None:
    """Return the accelerator's peak memory; None on a CPU, which has no counter."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return stats["peak_bytes_in_use"] / 2**20 if stats else None


def training(submits: list[tuple[Submit, Submit]], describe: Describe) -> Contender:
    """Queue every client's forward_backward and optim_step, one client after the other, then wait for all results.

    Reports the metrics of the last optim_step, and `describe()["training"]` where there is such a thing.
    """
    metrics: dict[str, float] = {}

    def train() -> None:
        futures = [submit() for pair in submits for submit in pair]
        answers = [future.result() for future in futures]
        metrics.update(getattr(answers[-1], "metrics", answers[-1]) or {})

    def report() -> dict[str, Any]:
        return {"training": describe().get("training"), "optim_step": metrics}

    return Contender(step=train, device_peak_mib=device_peak_mib, report=report)


def generation(job: Job, submit: Callable[[list[int]], Any], count: Callable[[Any], int]) -> Contender:
    """Queue every prompt, then wait for all answers; `count` gives the new tokens of one."""
    steps = itertools.count()

    def generate() -> None:
        futures = [submit(tokens) for tokens in job.row.sequences(next(steps))]
        lengths = {count(future.result()) for future in futures}
        if lengths != {NEW_TOKENS}:
            raise RuntimeError(f"Rows of {sorted(lengths)} tokens instead of {NEW_TOKENS}: the numbers would lie.")

    return Contender(step=generate, device_peak_mib=device_peak_mib)


def on_clients(job: Job, config: EngineConfig) -> Contender:
    """Return a step through ServiceClient: what a user's loop runs."""
    import jax_client
    from jax_client import types

    service = jax_client.ServiceClient(config=config)
    create = service.create_lora_training_client
    base_model = job.model or MODEL
    clients = [
        create(base_model=base_model, rank=RANK, seed=0, train_unembed=False).result() for _ in range(job.row.clients)
    ]
    if job.row.kind == "generate":
        sampler = clients[0].save_weights_and_get_sampling_client().result()
        # An empty list turns every stop off, the end-of-text token's included.
        params = types.SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, stop=[])

        def sample(tokens: list[int]) -> Any:
            return sampler.sample(types.ModelInput.from_ints(tokens), 1, params)

        return generation(job, sample, lambda answer: len(answer.sequences[0].tokens))

    def datum(tokens: list[int]) -> types.Datum:
        targets = types.TensorData.from_numpy(np.asarray(tokens[1:], np.int64))
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets}
        )

    def submits(client: Any, data: list[types.Datum]) -> tuple[Submit, Submit]:
        def forward_backward() -> Any:
            if job.row.custom:
                return client.forward_backward_custom(data, cross_entropy_in_torch)
            return client.forward_backward(data, "cross_entropy")

        return forward_backward, lambda: client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))

    batches = [[datum(tokens) for tokens in job.row.sequences(index)] for index in range(job.row.clients)]
    return training([submits(*pair) for pair in zip(clients, batches, strict=True)], service.describe)


def cross_entropy_in_torch(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    """Return the built-in loss with weights of one, from torch tensors: minus the sum of all logprobs."""
    return -sum(logprobs_T.sum() for logprobs_T in logprobs), {}


def on_engine(job: Job, config: EngineConfig) -> Contender:
    """Return a step on the engine itself, which needs neither `tinker` nor torch: for a bare accelerator image."""
    from jax_client.engine.core.requests import AdamSettings, GenerationRequest, LossSpec
    from jax_client.engine.engine import Engine
    from jax_client.values import LoraSpec, TrainExample
    from jax_client.weights.read.source import resolve

    engine = Engine(resolve(job.model or MODEL), config)
    lanes = [engine.open_lane() for _ in range(job.row.clients)]
    spec = LoraSpec(rank=RANK, seed=0, train_unembed=False)
    adapters = [engine.open_adapter(lane, spec).result() for lane in lanes]
    if job.row.kind == "generate":
        snapshot = engine.snapshot(lanes[0], adapters[0]).result()

        def generate(tokens: list[int]) -> Any:
            tokens_T = np.asarray(tokens, np.int32)
            request = GenerationRequest(tokens_T=tokens_T, max_tokens=NEW_TOKENS, temperature=0.0)
            return engine.generate(snapshot, request)

        return generation(job, generate, lambda answer: len(answer.rows[0].tokens))

    def sequence(tokens: list[int]) -> TrainExample:
        return TrainExample(
            tokens_T=np.asarray(tokens[:-1], np.int32),
            targets=np.asarray(tokens[1:], np.int32),
            inputs={"weights": np.ones(len(tokens) - 1, np.float32)},
        )

    adam = AdamSettings(
        learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0
    )

    def submits(lane: Any, adapter: Any, data: list[TrainExample]) -> tuple[Submit, Submit]:
        return (
            lambda: engine.train_batch(lane, adapter, data, LossSpec(name="cross_entropy")),
            lambda: engine.optim_step(lane, adapter, adam),
        )

    batches = [[sequence(tokens) for tokens in job.row.sequences(index)] for index in range(job.row.clients)]
    return training([submits(*three) for three in zip(lanes, adapters, batches, strict=True)], engine.monitor.describe)
