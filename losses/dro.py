"""DRO: -sum(log p A - beta / 2 (log p - log q)^2), a quadratic pull to the sampling policy.

Source: arXiv 2405.19107, in the token-level form of the Tinker documentation.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jax_client.losses.policy_ratio import policy_ratio

CONFIG = {"beta": 0.1}


def loss(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -(log p A - beta / 2 (log p - log q)^2) per target."""
    _, stats = policy_ratio(logprobs, inputs)
    gap = logprobs - inputs["logprobs"]
    return -(logprobs * inputs["advantages"] - 0.5 * inputs["beta"] * gap * gap), stats
