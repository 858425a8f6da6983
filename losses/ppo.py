"""PPO: -sum(min(r A, clip(r, low, high) A)).

Source: arXiv 1707.06347, equation 7; the bounds are absolute values of the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jax_client.losses.policy_ratio import clip_bounds, policy_ratio

CONFIG = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def loss(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the clipped surrogate per target."""
    ratio, stats = policy_ratio(logprobs, inputs)
    low, high = clip_bounds(inputs)
    plain = ratio * inputs["advantages"]
    clipped = jnp.clip(ratio, low, high) * inputs["advantages"]
    return -jnp.minimum(plain, clipped), {**stats, "clip_fraction": (clipped < plain).astype(jnp.float32)}
