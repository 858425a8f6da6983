"""CISPO: -sum(sg(clip(r, low, high)) log p A): the clipped ratio is a weight, no token loses its gradient.

Source: MiniMax-M1, arXiv 2506.13585, equation 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.losses.loss import Arrays, Loss
from jax_client.losses.policy_ratio import CLIPPED_INPUTS, RATIO_STATS, clip_bounds, policy_ratio


def loss(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -sg(clip(r)) log p A per target."""
    ratio, stats = policy_ratio(logprobs, inputs)
    weight = jax.lax.stop_gradient(jnp.clip(ratio, *clip_bounds(inputs)))
    return -weight * logprobs * inputs["advantages"], {**stats, "clip_fraction": (weight != ratio).astype(jnp.float32)}


CISPO = Loss(
    name="cispo",
    fn=loss,
    inputs=CLIPPED_INPUTS,
    stats=(*RATIO_STATS, "clip_fraction"),
    mask="advantages",
    config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
)
