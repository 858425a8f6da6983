"""What do the off-policy losses share? The ratio of the trained policy to the one that sampled, and its statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.losses.loss import Arrays

# Fields of a `Loss` that reads the sampling policy's logprobs, of one that clips the ratio too, and their statistics.
SAMPLED_INPUTS = {"logprobs": True, "advantages": True}
CLIPPED_INPUTS = {**SAMPLED_INPUTS, "clip_low_threshold": False, "clip_high_threshold": False}
RATIO_STATS = ("ratio", "kl_sample_train")


def policy_ratio(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return r = p / q per target, and the statistics that every off-policy loss reports.

    `kl_sample_train` is the unbiased, never negative estimate r - 1 - log r of KL(q || p), with expm1: between float32
    models log r is about 1e-6, and r - 1 would round the whole estimate away.
    Source: Schulman, "Approximating KL divergence" (the k3 estimator).
    """
    log_ratio = logprobs - inputs["logprobs"]
    ratio = jnp.exp(log_ratio)
    return ratio, {"ratio": ratio, "kl_sample_train": jnp.expm1(log_ratio) - log_ratio}


def clip_bounds(inputs: Arrays) -> tuple[jax.Array, jax.Array]:
    """Return the ratio's lower and upper bound per target."""
    return inputs["clip_low_threshold"], inputs["clip_high_threshold"]


def clipped_surrogate(
    ratio: jax.Array, advantages: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return -min(r A, clip(r, low, high) A), and 1 where the clipped one is the smaller.

    Source: arXiv 1707.06347, equation 7; the bounds are absolute values of the ratio.
    """
    plain, clipped = ratio * advantages, jnp.clip(ratio, low, high) * advantages
    return -jnp.minimum(plain, clipped), (clipped < plain).astype(jnp.float32)
