"""Cross entropy: -sum(w log p)."""

from __future__ import annotations

import jax

from jax_client.losses.loss import Arrays, Loss


def loss(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -w log p per target; weights may be negative, as in the two-pass form of a custom loss."""
    return -inputs["weights"] * logprobs, {"nll": -logprobs}


CROSS_ENTROPY = Loss(
    name="cross_entropy",
    fn=loss,
    inputs={"weights": False},
    stats=("nll",),
    mask="weights",
    defaults={"weights": 1.0},
)
