"""Does a training step of the engine with GSPO equal one with importance sampling where both have the same gradient?"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jax_client.engine.core.requests import LossSpec
from jax_client.values import TrainExample
from support.golden_cases import CASES
from support.golden_engine import SPEC, open_engine

CASE = CASES["llama_tied"]


def datum(length: int, seed: int) -> TrainExample:
    rng = np.random.default_rng(seed)
    inputs = {
        "advantages": rng.normal(size=length) * (rng.random(length) < 0.8),
        "sequence_ratio_mask": (rng.random(length) < 0.7) * rng.normal(2, 1, length),
    }
    tokens, targets = (rng.integers(0, CASE["vocab_size"], length).astype(np.int32) for _ in range(2))
    return TrainExample(
        tokens_T=tokens, targets=targets, inputs={name: value.astype(np.float32) for name, value in inputs.items()}
    )


def test_a_step_of_the_engine(tmp_path: Path) -> None:
    """On the policy that sampled, every ratio is 1: the loss is that of importance sampling."""
    engine = open_engine(tmp_path / "m", CASE)
    lane = engine.open_lane()
    gspo, plain = (engine.open_adapter(lane, SPEC).result() for _ in range(2))
    data = [datum(length, seed) for seed, length in enumerate((12, 30, 5))]
    scored = engine.score_batch(lane, gspo, data, LossSpec(name="cross_entropy")).result().logprobs
    data = [
        TrainExample(tokens_T=d.tokens_T, targets=d.targets, inputs=d.inputs | {"logprobs": q})  # type: ignore[operator]
        for d, q in zip(data, scored, strict=True)
    ]
    ours = engine.train_batch(lane, gspo, data, LossSpec(name="gspo")).result().metrics
    theirs = engine.train_batch(lane, plain, data, LossSpec(name="importance_sampling")).result().metrics
    assert ours["loss:sum"] == pytest.approx(theirs["loss:sum"], rel=1e-5)
    assert ours["ratio:mean"] == pytest.approx(1.0, abs=1e-6) and ours["clip_fraction:mean"] == 0.0
    engine.close()
    for a, b in zip(jax.tree.leaves(gspo.grads), jax.tree.leaves(plain.grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
