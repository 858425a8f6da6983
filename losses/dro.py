"""DRO: -sum(log p A - beta / 2 (log p - log q)^2), a quadratic pull to the sampling policy.

Source: arXiv 2405.19107, in the token-level form of the Tinker documentation.
"""

from __future__ import annotations

import jax

from jax_client.losses.loss import Arrays, Loss
from jax_client.losses.policy_ratio import RATIO_STATS, SAMPLED_INPUTS, policy_ratio


def loss(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -(log p A - beta / 2 (log p - log q)^2) per target."""
    _, stats = policy_ratio(logprobs, inputs)
    gap = logprobs - inputs["logprobs"]
    return -(logprobs * inputs["advantages"] - 0.5 * inputs["beta"] * gap * gap), stats


DRO = Loss(
    name="dro",
    fn=loss,
    inputs=SAMPLED_INPUTS,
    stats=RATIO_STATS,
    mask="advantages",
    config={"beta": 0.1},
    masked_has_gradient=True,
)
