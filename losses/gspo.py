"""GSPO: PPO's clipped surrogate with one ratio per sequence, s = exp(mean over its masked tokens of log p - log q).

A token's ratio is exp(log sg(s) + log p - sg(log p)): its value is s, its gradient s times that of log p. So either
every token of a sequence is clipped or none is, and advantages may still differ by token.

Source: arXiv 2507.18071, section 4.3 (GSPO-token). No default bounds are documented for the hosted service; these are
PPO's. The paper's own bounds are much narrower, about 1 - 3e-4 and 1 + 4e-4, because s is close to 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.losses.loss import Arrays, Loss
from jax_client.losses.policy_ratio import (
    CLIPPED_INPUTS,
    RATIO_STATS,
    clip_bounds,
    clipped_surrogate,
    policy_ratio,
)


def loss(logprobs: jax.Array, inputs: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the clipped surrogate per target; `ratio` is the sequence's.

    Args:
        logprobs: (B, T, C) float32; C is 1, since a sequence's probability has one factor per position.
        inputs: as (B, T, C), and `segments_BT`, int32: tokens of one datum lie side by side and share a number.
    """
    log_ratio = jax.lax.stop_gradient(logprobs) - inputs["logprobs"]
    counts = (inputs["sequence_ratio_mask"] != 0).astype(jnp.float32)
    sums_BT2 = jnp.stack([jnp.sum(counts * log_ratio, axis=-1), jnp.sum(counts, axis=-1)], axis=-1)
    totals_BT2 = segment_totals(sums_BT2, inputs["segments_BT"])
    # A sequence of which nothing counts has the ratio 1.
    log_s_BT1 = totals_BT2[..., :1] / jnp.maximum(totals_BT2[..., 1:], 1.0)
    ratio = jnp.exp(log_s_BT1 + logprobs - jax.lax.stop_gradient(logprobs))
    value, clip_fraction = clipped_surrogate(ratio, inputs["advantages"], *clip_bounds(inputs))
    return value, policy_ratio(logprobs, inputs)[1] | {"ratio": ratio, "clip_fraction": clip_fraction}


def segment_totals(x_BTC: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Return, at each position, the sum over the positions of its row that have its segment's number.

    The positions of a segment are adjacent. Sums grow by doubling, in an order that depends only on the row's length:
    a scatter would add in the nondeterministic order of a GPU's threads, and differences of a running sum would lose
    the digits of short segments behind long ones.
    """
    T = segments_BT.shape[1]
    place_T = jnp.arange(T)

    def doubled(i: jax.Array, x_BTC: jax.Array) -> jax.Array:
        step = jnp.left_shift(1, i)
        same_BT = (jnp.roll(segments_BT, step, axis=1) == segments_BT) & (place_T >= step)
        return x_BTC + jnp.where(same_BT[..., None], jnp.roll(x_BTC, step, axis=1), 0.0)

    up_to_BTC = jax.lax.fori_loop(0, (T - 1).bit_length(), doubled, x_BTC)
    ends_BT = jnp.concatenate([segments_BT[:, 1:] != segments_BT[:, :-1], jnp.ones_like(segments_BT[:, :1], bool)], 1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, place_T, T - 1), axis=1, reverse=True)
    return jnp.take_along_axis(up_to_BTC, last_BT[..., None], axis=1)


GSPO = Loss(
    name="gspo",
    fn=loss,
    inputs={**CLIPPED_INPUTS, "sequence_ratio_mask": False},
    copies={"sequence_ratio_mask": "advantages"},  # whose nonzero entries are then the tokens of the ratio
    stats=(*RATIO_STATS, "clip_fraction"),
    mask="advantages",
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    one_target=True,
)
