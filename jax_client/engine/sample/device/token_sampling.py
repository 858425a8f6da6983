"""How is the next token drawn? Temperature, then top-k, then top-p, then one uniform number per row.

No sort: the logit at which top-k or top-p cuts is found by bisection over the ordered bit patterns of float32, exact in
32 counting passes, and the draw inverts the cumulative distribution in two levels. (key, index of the token in its row)
alone decide the uniform number, so batch mates do not.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

GROUP = 256  # tokens of the first level, of a cumulative sum or of a maximum
# Below it, two logits that differ give the weights 1 and 0, and the larger one divided by it may overflow.
GREEDY = 1e-20


def make_keys(number_N4: jax.Array) -> jax.Array:
    """Return raw keys, uint32 (N, 2), from a request's seed and a row's number, each as two uint32, the lower first."""

    def make(number_4: jax.Array) -> jax.Array:
        seed_low, seed_high, low, high = number_4
        key = jax.random.wrap_key_data(jnp.stack([seed_high, seed_low]))
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, high), low))

    return jax.vmap(make)(number_N4)


def draw_tokens(
    logits_BV: jax.Array,
    key_B2: jax.Array,
    index_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
) -> jax.Array:
    """Return one token id per row, int32 (B,).

    Args:
        logits_BV: float32.
        key_B2: uint32 raw keys, one per row.
        index_B: int32, how many tokens the row has drawn.
        temperature_B: below `GREEDY` takes the likeliest token.
        top_k_B: keep the k largest logits, and ties with the k-th; -1 keeps all.
        top_p_B: keep the smallest set of likeliest tokens with at least this probability, and ties with its last; 1
            keeps all, 0 the likeliest token.
    """
    greedy_B = temperature_B < GREEDY
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    filtered = jnp.any(((top_k_B > 0) | (top_p_B < 1)) & ~greedy_B)
    kept_BV = jax.lax.cond(filtered, _truncate, lambda s, k, p: s, scaled_BV, top_k_B, top_p_B)
    nothing = lambda *_: jnp.zeros_like(index_B)  # noqa: E731
    drawn_B = jax.lax.cond(jnp.all(greedy_B), nothing, _invert, kept_BV, key_B2, index_B)
    return jnp.where(greedy_B, _likeliest(logits_BV), drawn_B).astype(jnp.int32)


def _likeliest(logits_BV: jax.Array) -> jax.Array:
    """Return the first of the largest: `argmax` in two levels, ten times as fast on a CPU."""
    logits_BgG = _groups(logits_BV, -jnp.inf)
    group_B1 = jnp.argmax(jnp.max(logits_BgG, axis=-1), axis=-1, keepdims=True)
    logits_BG = jnp.take_along_axis(logits_BgG, group_B1[..., None], axis=1)[:, 0]
    return group_B1[:, 0] * GROUP + jnp.argmax(logits_BG, axis=-1)


def _groups(x_BV: jax.Array, fill: float) -> jax.Array:
    """Return x in groups of `GROUP` (B, g, G), the last one filled up."""
    B, V = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -V % GROUP)), constant_values=fill).reshape(B, -1, GROUP)


def _truncate(scaled_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    V = scaled_BV.shape[-1]
    order_BV = _order(scaled_BV)
    k_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
    cut_B = _largest_cut(lambda cut: jnp.sum(order_BV >= cut[:, None], axis=-1) >= k_B, k_B.shape)
    kept_BV = jnp.where(order_BV >= cut_B[:, None], scaled_BV, -jnp.inf)
    p_BV = jax.nn.softmax(kept_BV, axis=-1)
    # Devices take a subnormal number for 0, a mass that no token at all has too.
    enough_B = jnp.clip(top_p_B, jnp.finfo(jnp.float32).tiny, 1.0)
    mass = lambda cut: jnp.sum(jnp.where(order_BV >= cut[:, None], p_BV, 0.0), axis=-1)  # noqa: E731
    cut_B = _largest_cut(lambda cut: mass(cut) >= enough_B, k_B.shape)
    return jnp.where((order_BV >= cut_B[:, None]) | (top_p_B >= 1)[:, None], kept_BV, -jnp.inf)


def _order(x: jax.Array) -> jax.Array:
    """Map float32 to int32 with the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest_cut(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Return the largest int32 for which `holds` (true below some point, false above it) is true, else the smallest."""
    least = jnp.full(shape, jnp.iinfo(jnp.int32).min)
    cut = jnp.where(holds(jnp.zeros(shape, jnp.int32)), 0, least)  # the sign first: 2**31 does not fit

    def step(i: jax.Array, cut: jax.Array) -> jax.Array:
        higher = cut + (1 << (30 - i))
        return jnp.where(holds(higher), higher, cut)

    return jax.lax.fori_loop(0, 31, step, cut)


def _invert(kept_BV: jax.Array, key_B2: jax.Array, index_B: jax.Array) -> jax.Array:
    """Return the first token whose cumulative weight, exp(kept), exceeds u x total, u uniform in [0, 1)."""
    keys = jax.vmap(lambda k, i: jax.random.fold_in(jax.random.wrap_key_data(k), i))(key_B2, index_B)
    u_B = jax.vmap(jax.random.uniform)(keys)
    p_BgG = _groups(jnp.exp(kept_BV - jnp.max(kept_BV, axis=-1, keepdims=True)), 0.0)
    upto_Bg = jnp.cumsum(jnp.sum(p_BgG, axis=-1), axis=-1)
    goal_B = u_B * upto_Bg[:, -1]
    group_B = jnp.sum(upto_Bg <= goal_B[:, None], axis=-1)
    before_B = jnp.where(group_B > 0, jnp.take_along_axis(upto_Bg, jnp.maximum(group_B - 1, 0)[:, None], 1)[:, 0], 0.0)
    p_BG = jnp.take_along_axis(p_BgG, group_B[:, None, None], axis=1)[:, 0]
    within_B = jnp.sum(jnp.cumsum(p_BG, axis=-1) <= (goal_B - before_B)[:, None], axis=-1)
    last_B = GROUP - 1 - jnp.argmax(p_BG[:, ::-1] > 0, axis=-1)  # rounding may run past the group's last weight
    return group_B * GROUP + jnp.minimum(within_B, last_B)
