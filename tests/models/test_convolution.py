"""Is the short convolution that of its definition, with segments, from a state, and backwards?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.models.kernels.convolution import conv_backward, conv_forward, last_inputs

SEGMENTS = np.array([[1] * 2 + [2] * 5 + [3] + [4] * 4 + [0] * 2, [1] * 14])


def by_definition(x: np.ndarray, w: np.ndarray, segments: np.ndarray) -> np.ndarray:
    y = np.zeros_like(x)
    for b, t in np.ndindex(segments.shape):
        for j in range(min(len(w), t + 1)):
            y[b, t] += w[-1 - j] * x[b, t - j] * (segments[b, t - j] == segments[b, t])
    return y


def test_segments_and_backward() -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 2, 14, 3)).astype(np.float32)
    w, segments = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), jnp.asarray(SEGMENTS)
    y, pullback = jax.vjp(lambda x: conv_forward(x, w, segments), jnp.asarray(x))
    np.testing.assert_allclose(y, by_definition(x, np.asarray(w), SEGMENTS), atol=1e-5)
    np.testing.assert_allclose(conv_backward(jnp.asarray(dy), w, segments), pullback(jnp.asarray(dy))[0], atol=1e-5)


def test_tiles_go_on_from_the_last_inputs() -> None:
    """The last tile of a row is padded: its state is of the inputs that are there."""
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(2, 14, 3)), jnp.float32), jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    ones, before, found = jnp.ones((2, 5), jnp.int32), jnp.zeros((2, 3, 3)), []
    whole = conv_forward(x, w, jnp.ones((2, 14), jnp.int32))
    for first in range(0, 14, 5):
        tile = jnp.pad(x[:, first : first + 5], ((0, 0), (0, max(0, first + 5 - 14)), (0, 0)))
        found.append(conv_forward(tile, w, ones, before))
        before = last_inputs(tile, before, jnp.full(2, min(5, 14 - first)))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1)[:, :14], whole, atol=1e-6)
    np.testing.assert_array_equal(before, x[:, -3:])
    np.testing.assert_array_equal(last_inputs(x[:, :1], before, jnp.full(2, 1))[:, -1], x[:, 0])
