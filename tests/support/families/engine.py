"""How do the tests run a family on the engine? They train a golden case, then sample from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jax_client.config import EngineConfig
from jax_client.engine.core.requests import AdamSettings, GenerationRequest, LossSpec
from jax_client.engine.engine import Engine
from jax_client.models.lora_arrays import flatten
from jax_client.values import AdapterState, TrainExample
from jax_client.weights.read.source import resolve
from support.families import cases as family_cases
from support.golden_cases import STEPS
from support.weight_files import write_hf

CROSS_ENTROPY = LossSpec(name="cross_entropy")


def tolerance(case: str) -> float:
    """Return how far logprobs, and gradients as a share of their norm, may be from the goldens.

    transformers' chunks of a gated delta rule are 1e-4 to 4e-4 from its own token by token.
    """
    return 1e-3 if family_cases.model_config(case).delta is not None else 1e-4


def open_engine(directory: Path, case: str, tensors: dict[str, np.ndarray] | None = None, **settings: Any) -> Engine:
    path = write_hf(directory, family_cases.CASES[case], family_cases.tensors(case) if tensors is None else tensors)
    settings = {"dtype": "float32", "compilation_cache_dir": "", "precompile": False} | settings
    return Engine(resolve(str(path)), EngineConfig(**settings))


def check_training(engine: Engine, case: str) -> tuple[Any, Any]:
    """Train a case and compare it with its goldens; return the lane and the trained adapter."""
    golden = np.load(family_cases.STORED / f"{case}.npz")
    lane = engine.open_lane()
    state = AdapterState(spec=family_cases.SPEC, step=0, weights=family_cases.adapter(case))
    adapter = engine.open_adapter(lane, state).result()
    first: Any = None
    grads: dict[str, np.ndarray] = {}
    for _ in range(STEPS):
        result = engine.train_batch(lane, adapter, family_cases.data(case), CROSS_ENTROPY).result()
        if first is None:
            assert adapter.grads is not None
            first, grads = result, {name: np.asarray(g) for name, g in flatten(adapter.grads).items()}
        engine.optim_step(lane, adapter, AdamSettings(**family_cases.adam(case))).result()
    trained = engine.score_batch(lane, adapter, family_cases.data(case), CROSS_ENTROPY).result()
    np.testing.assert_allclose(first.metrics["loss:sum"], golden["loss"], rtol=tolerance(case) / 10)
    if engine.model.experts is not None:
        assert first.metrics["e_frac_with_tokens:mean"] == 1.0  # of 8 experts, by 71 tokens with two choices each
        assert 0 < first.metrics["e_max_violation:mean"] <= first.metrics["e_max_violation:max"] < 7
    for i, (before, after) in enumerate(zip(first.logprobs, trained.logprobs, strict=True)):
        np.testing.assert_allclose(before, golden[f"logprobs.{i}"], atol=tolerance(case))
        np.testing.assert_allclose(after, golden[f"trained.{i}"], atol=tolerance(case))
    shortest = min(range(len(trained.logprobs)), key=lambda i: len(trained.logprobs[i]))  # it shared a row with others
    example = family_cases.data(case)[shortest]
    (alone,) = engine.score_batch(lane, adapter, [example], CROSS_ENTROPY).result().logprobs
    # Alone a sequence begins at another place of a chunk, and experts make more of the rule's rounding: transformers in
    # float32 is 3e-5 from itself in float64.
    close = 1e-5 if engine.model.delta is not None and engine.model.experts is not None else 1e-6
    np.testing.assert_allclose(trained.logprobs[shortest], alone, rtol=close, atol=close)
    assert grads.keys() == family_cases.adapter(case).keys()
    for name, grad in grads.items():
        error = np.linalg.norm(grad - golden[f"grad.{name}"]) / np.linalg.norm(golden[f"grad.{name}"])
        assert error < tolerance(case), (name, error)
    return lane, adapter


def check_sampling(engine: Engine, case: str, lane: Any, adapter: Any) -> list[list[int]]:
    """Sample two rows of each prompt; compare their logprobs with the trainer's, and return the tokens."""
    snapshot, found = engine.snapshot(lane, adapter).result(), []
    for example in family_cases.data(case):
        prompt = example.tokens_T
        request = GenerationRequest(tokens_T=prompt, max_tokens=24, num_samples=2, seed=3, prompt_logprobs=True)
        answer = engine.generate(snapshot, request).result()
        for row in answer.rows:
            whole = np.concatenate([prompt, row.tokens]).astype(np.int32)
            scored = TrainExample(tokens_T=whole[:-1], targets=whole[1:])
            (logprobs,) = engine.score_batch(lane, adapter, [scored], CROSS_ENTROPY).result().logprobs
            np.testing.assert_allclose(row.logprobs, logprobs[len(prompt) - 1 :], atol=5e-5)
            np.testing.assert_allclose(answer.prompt_logprobs_T[1:], logprobs[: len(prompt) - 1], atol=5e-5)
            found.append([int(token) for token in row.tokens])
    return found
