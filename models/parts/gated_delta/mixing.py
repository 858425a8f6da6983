"""How does a layer with a gated delta rule mix the tokens of a row? A short convolution, then the rule itself.

    q, k, v = silu(conv(q)), silu(conv(k)), silu(conv(v))         per channel, over the last few tokens
    q, k    = q / |q| / sqrt(X), k / |k|                          of each key head
    g       = -exp(A_log) softplus(a + dt_bias)                   of each value head, as are beta and the state
    beta    = sigmoid(b)
    o       = the gated delta rule of q, k, v, g and beta         see `kernels.delta`

Queries and keys of a key head serve successive value heads. Between two passes over a row stands its `Memory`. All is
computed in float32.

Source: gated delta networks, arXiv 2412.06464; its form in Qwen3-Next, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_client.models.config import GatedDelta
from jax_client.models.kernels.convolution import conv_backward, conv_forward, last_inputs
from jax_client.models.kernels.delta import Tokens, delta_backward, delta_forward, delta_step, delta_tiles
from jax_client.models.parts.kind import Context, Weights
from jax_client.sharding import ROWS

Array = jax.Array
# The weights of the mixing by leaf: the convolutions' (z, O), A_log and dt_bias (P,), all float32.
CONVOLUTIONS = ("conv_q_LzO", "conv_k_LzO", "conv_v_LzO")
GATES = ("A_log_LP", "dt_bias_LP")
NORM_EPS = 1e-6  # beside the sum of squares of a query or key, whatever the config says of norms


class Inputs(NamedTuple):
    """What the mixing reads of each token, as products of the layer's input.

    Attributes:
        q_BTO, k_BTO, v_BTO: of all heads, (B, T, heads x width) each.
        a_BTP, b_BTP: of which decay and share of a correction are made, float32.
    """

    q_BTO: Array
    k_BTO: Array
    v_BTO: Array
    a_BTP: Array
    b_BTP: Array


# How a mesh splits tokens and heads, of arrays (B, T, ...).
_BY_TOKEN = PartitionSpec(ROWS, None, "tensor")
_SPLIT_INPUTS = cast(Any, Inputs)(*(_BY_TOKEN,) * len(Inputs._fields))  # of specs in place of arrays


class Memory(NamedTuple):
    """What is left of a row's tokens for those that follow.

    Attributes:
        state_BPXY: of the rule, float32.
        inputs_BzU: (B, taps - 1, U), the last q, k and v before the convolution, side by side.
    """

    state_BPXY: Array
    inputs_BzU: Array


class Marks(NamedTuple):
    """Which rows are kept at another place, too.

    Attributes:
        count: int32 scalar, how many.
        rows_B: int32, all rows; the first `count` are these.
        places_B: int32, of each row.
    """

    count: Array
    rows_B: Array
    places_B: Array


def delta_of(c: Context) -> GatedDelta:
    """Return the sizes of the rule of a model that has it."""
    if c.config.delta is None:
        raise ValueError("a model without a gated delta rule has no sizes of it")
    return c.config.delta


def mix_rows(inputs: Inputs, w: Weights, segments_BT: Array, c: Context) -> Array:
    """Return o (B, T, P, Y), float32, of rows whose segments each begin with nothing before them."""
    delta = delta_of(c)

    def run(inputs: Inputs, weights: tuple[Array, ...], segments: Array) -> Array:
        mixed = _convolved(inputs, weights, segments, None)
        return delta_forward(_tokens(mixed, inputs.a_BTP, inputs.b_BTP, weights, delta), segments)[0]

    return _on_devices(run, c, _BY_TOKEN)(inputs, _weights(w), segments_BT)


def mix_rows_backward(inputs: Inputs, w: Weights, segments_BT: Array, do_BTPY: Array, c: Context) -> Inputs:
    """Return the cotangents of what `mix_rows` read, float32, for that of its output; the weights are frozen."""
    delta = delta_of(c)

    def run(inputs: Inputs, weights: tuple[Array, ...], segments: Array, do: Array) -> Inputs:
        mixed = _convolved(inputs, weights, segments, None)

        def made_of(mixed: tuple[Array, ...], a_BTP: Array, b_BTP: Array) -> Tokens:
            return _tokens(mixed, a_BTP, b_BTP, weights, delta)

        # No matmul is in it, so that nothing is gained by hand.
        tokens, pull = jax.vjp(made_of, mixed, inputs.a_BTP, inputs.b_BTP)
        dmixed, da, db = pull(delta_backward(tokens, segments, do))
        dq, dk, dv = (conv_backward(d, w_zO, segments) for d, w_zO in zip(dmixed, weights[:3], strict=True))
        return Inputs(dq, dk, dv, da, db)

    return _on_devices(run, c, _SPLIT_INPUTS)(inputs, _weights(w), segments_BT, do_BTPY)


def mix_tiles(
    inputs: Inputs, w: Weights, count_t: Array, places_t3: Array, memory: Memory, c: Context
) -> tuple[Array, Memory]:
    """Return o of tiles (t, T, P, Y), float32, each of which continues some row, and what is left of all rows.

    Args:
        inputs: of the tiles, which run in order.
        w: the layer's weights.
        count_t: int32, the tokens of each tile that count; behind them is padding, which leaves the memory alone.
        places_t3: int32, where in `memory` each tile's row begins, 0 for a row without tokens; and the two places where
            its end is left, 0 for nowhere. A tile of less than T tokens is its row's last one.
        memory: of all rows, with a leading axis of places.
        c: the pass.
    """
    delta, weights = delta_of(c), _weights(w)
    t, T = inputs.a_BTP.shape[:2]
    ones_tT, real_tT1 = jnp.ones((t, T), jnp.int32), (jnp.arange(T) < count_t[:, None])[..., None]
    source_t, targets_t2 = places_t3[:, 0], places_t3[:, 1:]
    new_tTU = jnp.concatenate([inputs.q_BTO, inputs.k_BTO, inputs.v_BTO], -1).astype(memory.inputs_BzU.dtype)
    before_tzU = jnp.where((source_t > 0)[:, None, None], memory.inputs_BzU[source_t], 0)
    # Of a tile whose row another of these has left there, the last inputs are that one's own.
    earlier_tt = (targets_t2[None] == source_t[:, None, None]).any(-1) & (source_t > 0)[:, None]
    earlier_tt &= jnp.arange(t)[None] < jnp.arange(t)[:, None]
    which_t = jnp.max(jnp.where(earlier_tt, jnp.arange(t), -1), axis=1)
    tail_tzU = new_tTU[:, T - before_tzU.shape[1] :]
    before_tzU = jnp.where((which_t >= 0)[:, None, None], tail_tzU[which_t], before_tzU)
    mixed = _convolved(inputs, weights, ones_tT, before_tzU)
    tokens = _tokens(mixed, inputs.a_BTP, inputs.b_BTP, weights, delta)
    g_BTP, beta_BTP = (jnp.where(real_tT1, x, 0) for x in (tokens.g_BTP, tokens.beta_BTP))
    tokens = tokens._replace(g_BTP=g_BTP, beta_BTP=beta_BTP)
    o_tTPY, states = delta_tiles(tokens, memory.state_BPXY, source_t, targets_t2)
    left_tzU, later_tt = last_inputs(new_tTU, before_tzU, count_t), jnp.arange(t)[None] > jnp.arange(t)[:, None]
    found = memory.inputs_BzU
    for target_t in targets_t2.T:
        # Of several tiles that leave a row at one place the last one does.
        again_t = ((targets_t2[None] == target_t[:, None, None]).any(-1) & later_tt).any(-1)
        found = found.at[jnp.where(again_t, 0, target_t)].set(left_tzU)
    return o_tTPY, Memory(states, found)


def mix_token(
    inputs: Inputs, w: Weights, place_B: Array, begins_B: Array, marks: Marks, memory: Memory, c: Context
) -> tuple[Array, Memory]:
    """Return o (B, 1, P, Y) of one token that continues each row, float32, and what is left of all rows.

    Args:
        inputs: of the tokens.
        w: the layer's weights.
        place_B: int32, where in `memory` each row is; 0 for a row that has ended.
        begins_B: bool, whether no token of a row came before.
        marks: the rows of which what is left is kept at another place, too.
        memory: of all rows, with a leading axis of places.
        c: the pass.
    """
    weights, ones_B1 = _weights(w), jnp.ones(inputs.a_BTP.shape[:2], jnp.int32)
    nothing = lambda a: jnp.where(begins_B.reshape(-1, *(1,) * (a.ndim - 1)), 0, a)  # noqa: E731
    before = Memory(*(nothing(every[place_B]) for every in memory))
    mixed = _convolved(inputs, weights, ones_B1, before.inputs_BzU)
    tokens = _tokens(mixed, inputs.a_BTP, inputs.b_BTP, weights, delta_of(c))
    o_B1PY, state = delta_step(tokens, before.state_BPXY)
    new_B1U = jnp.concatenate([inputs.q_BTO, inputs.k_BTO, inputs.v_BTO], -1).astype(before.inputs_BzU.dtype)
    left = Memory(state, jnp.concatenate([before.inputs_BzU[:, 1:], new_B1U], 1))
    memory = Memory(*(every.at[place_B].set(own) for every, own in zip(memory, left, strict=True)))

    def keep(i: Array, every: Memory) -> Memory:
        row = marks.rows_B[i]
        put = lambda a, own: jax.lax.dynamic_update_index_in_dim(a, own[row], marks.places_B[row], 0)  # noqa: E731
        return Memory(*map(put, every, left))

    return o_B1PY, jax.lax.fori_loop(0, marks.count, keep, memory)


def _weights(w: Weights) -> tuple[Array, ...]:
    return tuple(w[name] for name in (*CONVOLUTIONS, *GATES))


def _convolved(
    inputs: Inputs, weights: tuple[Array, ...], segments: Array, before_BzU: Array | None
) -> tuple[Array, ...]:
    xs = [x.astype(jnp.float32) for x in inputs[:3]]
    ends = [xs[0].shape[-1], xs[0].shape[-1] + xs[1].shape[-1]]
    befores = [None] * 3 if before_BzU is None else jnp.split(before_BzU.astype(jnp.float32), ends, axis=-1)
    return tuple(
        conv_forward(x, w_zO, segments, before) for x, w_zO, before in zip(xs, weights[:3], befores, strict=True)
    )


def _tokens(
    mixed: tuple[Array, ...], a_BTP: Array, b_BTP: Array, weights: tuple[Array, ...], delta: GatedDelta
) -> Tokens:
    q, k, v = (
        jax.nn.silu(x).reshape(*x.shape[:2], -1, width)
        for x, width in zip(mixed, (delta.key_dim, delta.key_dim, delta.value_dim), strict=True)
    )
    q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + NORM_EPS) for x in (q, k))
    shared = delta.value_heads // delta.key_heads
    q, k = (jnp.repeat(x, shared, axis=2) for x in (q * delta.key_dim**-0.5, k))
    *_, A_log_P, dt_bias_P = weights
    return Tokens(q, k, v, -jnp.exp(A_log_P) * jax.nn.softplus(a_BTP + dt_bias_P), jax.nn.sigmoid(b_BTP))


def _on_devices(function: Callable[..., Any], c: Context, out: Any) -> Callable[..., Any]:
    """Return a function of inputs, weights and arrays (B, T, ...) that each device runs for its rows and heads.

    Left to itself, XLA would gather what it solves.
    """
    if c.mesh is None or c.on_device:
        return function
    weights = (*(PartitionSpec(None, "tensor"),) * len(CONVOLUTIONS), *(PartitionSpec("tensor"),) * len(GATES))

    def on_mesh(of: Inputs, w: tuple[Array, ...], segments: Array, *others: Array) -> Any:
        specs = _SPLIT_INPUTS, weights, PartitionSpec(ROWS), *(_BY_TOKEN,) * len(others)
        return jax.shard_map(function, mesh=c.mesh, in_specs=specs, out_specs=out, check_vma=False)(
            of, w, segments, *others
        )

    return on_mesh
