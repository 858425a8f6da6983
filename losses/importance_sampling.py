"""Importance-weighted policy gradient: -sum(r A), r = p / q."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jax_client.losses.policy_ratio import policy_ratio


def loss(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -r A per target."""
    ratio, stats = policy_ratio(logprobs, inputs)
    return -ratio * inputs["advantages"], stats
