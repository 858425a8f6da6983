"""Are the chunks of the gated delta rule, and their backward pass, what the rule and autodiff say token by token?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.kernels.delta import Tokens, delta_backward, delta_forward
from support.models.recurrence import by_token

# Segments that begin and end within chunks, fill one, and leave padding; then one segment of the row, and none.
SEGMENTS = np.array([[1] * 3 + [2] * 11 + [3] + [4] * 8 + [0] * 4, [1] * 27, [0] * 27])


def drawn(dtype: Any, kind: str = "ordinary", shape: tuple[int, int] = SEGMENTS.shape) -> Tokens:
    """Return tokens as a layer makes them: unit keys, scaled queries, decays from 1 down, no decay or a full one."""
    (B, T), P, X, Y, rng = shape, 2, 5, 3, np.random.default_rng(0)
    q, k = rng.normal(size=(2, B, T, P, X))
    k, q = k / np.linalg.norm(k, axis=-1, keepdims=True), q / np.linalg.norm(q, axis=-1, keepdims=True) * X**-0.5
    v, beta, g = rng.normal(size=(B, T, P, Y)), rng.uniform(size=(B, T, P)), -rng.exponential(size=(B, T, P))
    if kind == "one key":
        k, beta, g = np.broadcast_to(k[:, :1], k.shape), np.full_like(beta, 0.99), np.zeros_like(g)
    if kind == "extreme gates":
        g, beta = np.where(rng.random(g.shape) < 0.5, 0.0, -200.0), np.where(rng.random(beta.shape) < 0.5, 0.0, 1.0)
    return Tokens(*(jnp.asarray(a, dtype) for a in (q, k, v, g, beta)))


@pytest.mark.parametrize("chunk", [4, 8, 64])
@pytest.mark.parametrize("kind", ["ordinary", "one key", "extreme gates"])
def test_chunks_in_float64(kind: str, chunk: int) -> None:
    with jax.enable_x64(True):
        segments, tokens = jnp.asarray(SEGMENTS), drawn(np.float64, kind)
        do = jnp.asarray(np.random.default_rng(1).normal(size=tokens.v_BTPY.shape))
        expected, pullback = jax.vjp(lambda t: by_token(t, segments)[0], tokens)
        mine = jax.jit(lambda t: (delta_forward(t, segments, chunk=chunk), delta_backward(t, segments, do, chunk)))
        (o, state), gradients = mine(tokens)
        np.testing.assert_allclose(o, expected, atol=1e-12)
        # Behind a row's padding, which is a segment of its own where there is any.
        np.testing.assert_allclose(state, by_token(tokens, segments)[1], atol=1e-12)
        for name, gradient, right in zip(Tokens._fields, gradients, pullback(do)[0], strict=True):
            np.testing.assert_allclose(gradient, right, atol=1e-9 * float(jnp.abs(right).max()), err_msg=name)


@pytest.mark.parametrize("kind", ["ordinary", "one key", "extreme gates"])
def test_chunks_in_float32(kind: str) -> None:
    """A key that repeats through a whole chunk without decay is where inverting by squaring loses everything."""
    segments, tokens = jnp.ones((1, 150), jnp.int32), drawn(np.float32, kind, (1, 150))
    do = jnp.asarray(np.random.default_rng(1).normal(size=tokens.v_BTPY.shape), np.float32)
    expected, pullback = jax.vjp(lambda t: by_token(t, segments)[0], tokens)
    np.testing.assert_allclose(delta_forward(tokens, segments)[0], expected, atol=1e-5)
    mine, right = delta_backward(tokens, segments, do), pullback(do)[0]
    # With one key and no decay the gradient of g is what is left of far larger sums.
    largest = max(float(jnp.linalg.norm(a)) for a in right)
    for name, a, b in zip(Tokens._fields, mine, right, strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-6 * largest, name


def test_tiles_equal_one_pass() -> None:
    """As prefill runs: a row in tiles, each from the state of the one before; padding leaves the state alone."""
    tokens, ones = drawn(np.float32, shape=(2, 27)), jnp.ones((2, 27), jnp.int32)
    whole, last = delta_forward(tokens, ones, chunk=8)
    state, outputs = jnp.zeros_like(last), []
    for first in range(0, 27, 8):
        tile = Tokens(*(a[:, first : first + 8] for a in tokens))
        o, state = delta_forward(tile, ones[:, first : first + 8], state, chunk=8)
        outputs.append(o)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(state, last, atol=1e-6)
    still = tokens._replace(g_BTP=jnp.zeros_like(tokens.g_BTP), beta_BTP=jnp.zeros_like(tokens.beta_BTP))
    np.testing.assert_array_equal(delta_forward(still, ones, last, chunk=8)[1], last)
