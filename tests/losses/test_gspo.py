"""Does GSPO's ratio belong to one sequence each, however they are packed?"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.train import packing
from jax_client.losses import registry
from jax_client.losses.gspo import segment_totals
from jax_client.values import TrainExample
from support.golden_cases import CASES

CASE = CASES["llama_tied"]
LENGTHS = (1, 40, 7, 100, 33, 256, 2, 90)
BOUNDS = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.15}
apply_loss = jax.jit(registry.apply_loss)


def datum(length: int, seed: int, *, masked: bool = True) -> TrainExample:
    rng = np.random.default_rng(seed)
    ids = lambda: rng.integers(0, CASE["vocab_size"], length).astype(np.int32)  # noqa: E731
    inputs = {
        "logprobs": rng.normal(-4, 0.3, length),
        "advantages": rng.normal(size=length) * (rng.random(length) < 0.8),
        "sequence_ratio_mask": (rng.random(length) < 0.7) * rng.normal(2, 1, length) * masked,
    }
    tokens, targets = ids(), ids()
    return TrainExample(tokens_T=tokens, targets=targets, inputs={k: v.astype(np.float32) for k, v in inputs.items()})


def reference(p: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """The formula over one sequence in float64, its gradient by hand."""
    p, q, a, mask = (np.asarray(x, np.float64) for x in (p, *(inputs[k] for k in ("logprobs", "advantages", "sequence_ratio_mask"))))  # noqa: E501 # fmt: skip
    counted = mask != 0
    s = np.exp((p - q)[counted].mean()) if counted.any() else 1.0
    plain, clipped = s * a, np.clip(s, *BOUNDS.values()) * a
    return -np.minimum(plain, clipped).sum(), np.where(plain <= clipped, -s * a, 0.0)


def run(
    data: Sequence[TrainExample], logprobs: Sequence[np.ndarray]
) -> tuple[float, list[np.ndarray], dict[str, float]]:
    """Pack the data, two rows to a micro-batch, and unpack the cotangents."""
    limits = packing.Limits(ways=2, tokens=256)
    loss, cotangents, sums = 0.0, [np.zeros(0)] * len(data), {}
    for plan in packing.plan_call([len(d.tokens_T) for d in data], limits):
        batch = packing.fill(plan, data, dict.fromkeys(registry.INPUTS, 0.0) | BOUNDS, "advantages")
        p_BTC = jnp.asarray(packing.scatter(plan, data, logprobs))
        arrays = batch.inputs, batch.real_BTC, batch.segments_BT
        g_BTC, sums = apply_loss(jnp.int32(registry.loss_number("gspo")), p_BTC, *arrays)
        packing.unpack(plan, data, np.asarray(g_BTC), cotangents)  # type: ignore[arg-type]
        loss += float(sums["loss"])
    return loss, cotangents, {key: float(value) for key, value in sums.items()}


def test_equals_the_formula_packed_and_alone() -> None:
    data = [datum(length, seed) for seed, length in enumerate(LENGTHS)]
    rng = np.random.default_rng(9)
    logprobs = [d.inputs["logprobs"] + rng.normal(0.05, 0.3, len(d.tokens_T)).astype(np.float32) for d in data]
    loss, packed, _ = run(data, logprobs)
    expected = [reference(p, dict(d.inputs)) for p, d in zip(logprobs, data, strict=True)]
    assert loss == pytest.approx(sum(value for value, _ in expected), rel=1e-6)
    clipped = [bool((gradient[d.inputs["advantages"] != 0] == 0).any()) for (_, gradient), d in zip(expected, data, strict=True)]  # noqa: E501 # fmt: skip
    assert True in clipped and False in clipped
    for p, d, got, (value, gradient) in zip(logprobs, data, packed, expected, strict=True):
        np.testing.assert_allclose(got, gradient, rtol=1e-6, atol=1e-6)
        one, (alone,), _ = run([d], [p])
        assert one == pytest.approx(value, rel=1e-6, abs=1e-6)
        np.testing.assert_allclose(alone, gradient, rtol=1e-6, atol=1e-6)


def test_a_sequence_of_which_nothing_counts_has_the_ratio_one() -> None:
    """Neither it nor its neighbour in the row is disturbed."""
    data = [datum(20, 1, masked=False), datum(30, 2)]
    logprobs = [d.inputs["logprobs"] + np.float32(0.1) for d in data]
    loss, gradients, sums = run(data, logprobs)
    np.testing.assert_allclose(gradients[0], -data[0].inputs["advantages"], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], reference(logprobs[1], dict(data[1].inputs))[1], rtol=1e-6)
    assert np.isfinite([loss, *sums.values()]).all()


@pytest.mark.parametrize("length", [1, 2, 7, 64, 300])
def test_segment_totals(length: int) -> None:
    rng = np.random.default_rng(length)
    segments = np.sort(rng.integers(0, 1 + length // 5, (3, length)), axis=1).astype(np.int32)
    x = rng.normal(size=(3, length, 2)).astype(np.float32)
    expected = [[sum(x[b, s] for s in range(length) if segments[b, s] == segments[b, t]) for t in range(length)] for b in range(3)]  # noqa: E501 # fmt: skip
    np.testing.assert_allclose(segment_totals(jnp.asarray(x), jnp.asarray(segments)), expected, rtol=1e-5, atol=1e-5)
