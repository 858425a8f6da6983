"""PPO: -sum(min(r A, clip(r, low, high) A)).

Source: arXiv 1707.06347, equation 7; the bounds are absolute values of the ratio.
"""

from __future__ import annotations

import jax

from jax_client.losses.loss import Arrays, Loss
from jax_client.losses.policy_ratio import (
    CLIPPED_INPUTS,
    RATIO_STATS,
    clip_bounds,
    clipped_surrogate,
    policy_ratio,
)


def loss(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the clipped surrogate per target."""
    ratio, stats = policy_ratio(logprobs, inputs)
    value, clip_fraction = clipped_surrogate(ratio, inputs["advantages"], *clip_bounds(inputs))
    return value, {**stats, "clip_fraction": clip_fraction}


PPO = Loss(
    name="ppo",
    fn=loss,
    inputs=CLIPPED_INPUTS,
    stats=(*RATIO_STATS, "clip_fraction"),
    mask="advantages",
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
)
