"""How does a token mix with the few before it? A causal convolution per channel, which begins anew with each segment.

    y_t = sum_j w_j x_(t - j)          over the tokens of the segment, j from 0 to taps - 1

The weights are frozen. Letters as in `models.config`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def conv_forward(
    x_BTU: jax.Array, w_zU: jax.Array, segments_BT: jax.Array, before_BzU: jax.Array | None = None
) -> jax.Array:
    """Return y (B, T, U), in the type of the arguments.

    Args:
        x_BTU: inputs.
        w_zU: w_j of each channel in row taps - 1 - j: the last row is that of the token itself.
        segments_BT: int32.
        before_BzU: (B, taps - 1, U), the last inputs before these, which the first segment of a row continues; None
            where it begins.
    """
    earlier = len(w_zU) - 1
    if before_BzU is None:
        whole = jnp.pad(x_BTU, ((0, 0), (earlier, 0), (0, 0)))
        segments = jnp.pad(segments_BT, ((0, 0), (earlier, 0)), constant_values=-1)
    else:
        whole = jnp.concatenate([before_BzU, x_BTU], 1)
        segments = jnp.pad(segments_BT, ((0, 0), (earlier, 0)), mode="edge")
    T, y_BTU = x_BTU.shape[1], x_BTU * w_zU[-1]
    for j in range(1, earlier + 1):
        at = slice(earlier - j, earlier - j + T)
        y_BTU += jnp.where((segments[:, at] == segments_BT)[..., None], whole[:, at], 0) * w_zU[-1 - j]
    return y_BTU


def conv_backward(dy_BTU: jax.Array, w_zU: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Return the cotangent of x (B, T, U) for that of y, of rows that began with a segment."""
    # The same convolution, with time reversed.
    return jnp.flip(conv_forward(jnp.flip(dy_BTU, 1), w_zU, jnp.flip(segments_BT, 1)), 1)


def last_inputs(x_BTU: jax.Array, before_BzU: jax.Array, count_B: jax.Array) -> jax.Array:
    """Return the last inputs (B, taps - 1, U) once the first `count_B` of x have followed those `before` them."""
    whole = jnp.concatenate([before_BzU, x_BTU], 1)
    place_Bz = count_B[:, None] + jnp.arange(before_BzU.shape[1])
    return jnp.take_along_axis(whole, place_Bz[..., None], axis=1)
