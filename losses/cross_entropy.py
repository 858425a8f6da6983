"""Cross entropy: -sum(w log p)."""

from __future__ import annotations

from collections.abc import Mapping

import jax


def loss(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -w log p per target; weights may be negative, as in the two-pass form of a custom loss."""
    return -inputs["weights"] * logprobs, {"nll": -logprobs}
