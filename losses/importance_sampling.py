"""Importance-weighted policy gradient: -sum(r A), r = p / q."""

from __future__ import annotations

import jax

from jax_client.losses.loss import Arrays, Loss
from jax_client.losses.policy_ratio import RATIO_STATS, SAMPLED_INPUTS, policy_ratio


def loss(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -r A per target."""
    ratio, stats = policy_ratio(logprobs, inputs)
    return -ratio * inputs["advantages"], stats


IMPORTANCE_SAMPLING = Loss(
    name="importance_sampling",
    fn=loss,
    inputs=SAMPLED_INPUTS,
    stats=RATIO_STATS,
    mask="advantages",
)
