"""Is the reported gap between trainer and sampler the k3 estimate of their KL divergence, however small it is?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.losses import registry

POSITIONS = 512


@pytest.mark.parametrize("gap", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("loss", [name for name, loss in registry.LOSSES.items() if "kl_sample_train" in loss.stats])
def test_the_estimate_is_not_rounded_away(loss: str, gap: float) -> None:
    rng = np.random.default_rng(0)
    trained = rng.uniform(-3, 0, POSITIONS).astype(np.float32)
    sampled = (trained + rng.normal(0, gap, POSITIONS)).astype(np.float32)
    inputs = {name: jnp.ones((1, POSITIONS, 1)) for name in registry.INPUTS} | {"logprobs": sampled[None, :, None]}
    _, sums = jax.jit(registry.apply_loss)(
        registry.loss_number(loss),
        trained[None, :, None],
        inputs,
        jnp.ones((1, POSITIONS, 1), bool),
        jnp.arange(POSITIONS, dtype=jnp.int32)[None] + 1,
    )
    log_ratio = trained.astype(np.float64) - sampled
    expected = np.sum(np.expm1(log_ratio) - log_ratio)
    assert float(sums["kl_sample_train"]) == pytest.approx(expected, rel=1e-2)
