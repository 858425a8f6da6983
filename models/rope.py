"""How do queries and keys learn their positions?

They are rotated: pair (i, i + d/2) of the first d values of a head turns by its frequency times the position.
`rope_table` gives the cosines and sines, `rotate` applies them. Frequencies may be scaled for longer contexts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_client.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope, YarnScaling


@jax.named_scope("rope")
def rope_table(positions_BT: jax.Array, config: ModelConfig, rope: Rope | None = None) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin (B, T, d/2) float32 of the rotary angles, d the values of a head that rotate.

    Args:
        positions_BT: int32.
        config: of the model.
        rope: of a layer whose rotation is not that of `config`.

    Source: RoFormer, arXiv 2104.09864.
    """
    rope = config.rope if rope is None else rope
    freq_h = frequencies(rope, config.head_dim)
    angle_BTh = positions_BT[..., None].astype(jnp.float32) * freq_h
    cos_BTh, sin_BTh = jnp.cos(angle_BTh), jnp.sin(angle_BTh)
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.attention_factor != 1:
        return cos_BTh * rope.scaling.attention_factor, sin_BTh * rope.scaling.attention_factor
    return cos_BTh, sin_BTh


def frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Return the angle per position (d/2,) float32 of each pair.

    Source: the scaling as published with Llama 3.1; YaRN, arXiv 2309.00071; linear, arXiv 2306.15595.
    """
    dim = head_dim if rope.dim is None else rope.dim
    half = dim // 2
    freq_h = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    match rope.scaling:
        case None:
            return freq_h
        case Llama3Scaling() as scaling:
            turns_h = scaling.original_context * freq_h / (2 * jnp.pi)
            smooth_h = (turns_h - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            smooth_h = jnp.clip(smooth_h, 0.0, 1.0)
            return freq_h * (smooth_h + (1 - smooth_h) / scaling.factor)
        case LinearScaling() as scaling:
            return freq_h / scaling.factor
        case YarnScaling() as scaling:
            low, high = _blended_pairs(scaling, rope.theta, dim)
            divided_h = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
            return freq_h * (1 - divided_h) + freq_h / scaling.factor * divided_h


def _blended_pairs(scaling: YarnScaling, theta: float, dim: int) -> tuple[float, float]:
    """Return the last pair whose frequency YaRN keeps, and the first whose frequency it divides."""

    def pair(turns: float) -> float:
        """Return which pair makes that number of turns in the original context."""
        return dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def rotate(x_BTH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + d/2) of the first d values of the last axis by the table's angles, and keep the rest.

    With -sin it is its own transpose. Axes between T and H (heads) broadcast.
    """
    middle = (1,) * (x_BTH.ndim - 3)
    cos = cos_BTh.reshape(*cos_BTh.shape[:2], *middle, -1)
    sin = sin_BTh.reshape(*sin_BTh.shape[:2], *middle, -1)
    d = 2 * cos.shape[-1]
    left, right = jnp.split(x_BTH if d == x_BTH.shape[-1] else x_BTH[..., :d], 2, axis=-1)
    rotated = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(rotated if d == x_BTH.shape[-1] else [*rotated, x_BTH[..., d:]], axis=-1)
