"""PPO: -sum(min(r A, clip(r, low, high) A)).

Source: arXiv 1707.06347, equation 7; the bounds are absolute values of the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jax_client.losses.policy_ratio import clip_bounds, clipped_surrogate, policy_ratio

CONFIG = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def loss(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the clipped surrogate per target."""
    ratio, stats = policy_ratio(logprobs, inputs)
    value, clip_fraction = clipped_surrogate(ratio, inputs["advantages"], *clip_bounds(inputs))
    return value, {**stats, "clip_fraction": clip_fraction}
