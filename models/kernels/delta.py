"""How does the gated delta rule run over a row of tokens? In chunks, whose inner work is matrix products.

A head has a state S (X, Y), a memory from keys to values. Each token decays it, corrects what it says of the token's
key, and asks it:

    S <- exp(g) S;    S <- S + k (beta (v - S^T k))^T;    o = S^T q

Within a chunk the corrections depend on each other: they solve a triangular system, one for all values and for all
keys, whose inverse is made block by block. So only three products per chunk wait for the state of the chunk before. A
segment of a row begins with an empty state, also within a chunk: decays between segments are zero, and these are masked
before `exp`, of which the masked part could overflow.

Letters as in `models.config`, and n chunks, c tokens of a chunk. All is computed in the type of the arguments, float32
outside of tests, at full precision: the inverse as a product of powers would lose everything where a key repeats.

Source: gated delta networks, arXiv 2412.06464; the chunked form, arXiv 2406.06484.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
HIGHEST = jax.lax.Precision.HIGHEST


class Tokens(NamedTuple):
    """What the rule reads of each token.

    Attributes:
        q_BTPX, k_BTPX: queries and keys of every head, as they are multiplied with the state.
        v_BTPY: values.
        g_BTP: logarithm of the decay, at most 0.
        beta_BTP: share of a correction, in [0, 1]. With g and beta 0 a token leaves the state alone.
    """

    q_BTPX: jax.Array
    k_BTPX: jax.Array
    v_BTPY: jax.Array
    g_BTP: jax.Array
    beta_BTP: jax.Array


class _Chunks(NamedTuple):
    """What a chunk has that does not depend on the state before it; (n, B, P, ...) each.

    Attributes:
        q, k, v, beta: of the tokens, (c, X), (c, X), (c, Y), (c,).
        within: E (c, c), the decay from token j to token i of a segment.
        before, after, across: of what was there before the chunk until each token (c,), of each token until the chunk's
            end (c,), and of the chunk as a whole ().
        system: A (c, c), strictly lower.
        inverse: T (c, c), of I + A.
        values, keys: U = T (beta V) (c, Y) and W (c, X): the corrections are U - W S.
        scores: (Q K^T) * E (c, c).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    within: jax.Array
    before: jax.Array
    after: jax.Array
    across: jax.Array
    system: jax.Array
    inverse: jax.Array
    values: jax.Array
    keys: jax.Array
    scores: jax.Array


def delta_forward(
    tokens: Tokens, segments_BT: jax.Array, state_BPXY: jax.Array | None = None, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of all tokens, and the state behind the last one.

    Args:
        tokens: of all rows.
        segments_BT: int32; tokens of a segment stand behind each other. Padding at the end of a row may have a segment
            of its own.
        state_BPXY: in which the first segment of each row begins; None for an empty one.
        chunk: tokens that are solved together, a power of 2.

    Returns:
        o_BTPY and the state (B, P, X, Y), in the type of the tokens.
    """
    T = segments_BT.shape[1]
    chunks = _chunks(tokens, segments_BT, state_BPXY is not None, chunk)
    corrections, states, last_BPXY = _run(chunks, _first_state(chunks, state_BPXY))
    return _by_row(_outputs(chunks, states, corrections))[:, :T], last_BPXY


def delta_backward(tokens: Tokens, segments_BT: jax.Array, do_BTPY: jax.Array, chunk: int = CHUNK) -> Tokens:
    """Return the cotangents of tokens of rows that began with an empty state, for those of the outputs.

    The states between chunks are computed once more: those of one layer exist at a time.

    Args:
        tokens, segments_BT, chunk: as for `delta_forward`.
        do_BTPY: of the outputs.
    """
    T = segments_BT.shape[1]
    x = _chunks(tokens, segments_BT, False, chunk)
    corrections, states, _ = _run(x, _first_state(x, None))
    do = _in_chunks(do_BTPY, chunk)
    seen = _product("nBPcd,nBPcY->nBPdY", x.scores, do)  # by the tokens' own chunk

    def back(dstate: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, before, after, across, keys, do, seen = of
        dcorrections = seen + _product("BPcX,BPXY->BPcY", k * after[..., None], dstate)
        dbefore = across[..., None, None] * dstate + _product("BPcX,BPcY->BPXY", q * before[..., None], do)
        return dbefore - _product("BPcX,BPcY->BPXY", keys, dcorrections), (dcorrections, dstate)

    scanned = x.q, x.k, x.before, x.after, x.across, x.keys, do, seen
    _, (dcorrections, dstates) = jax.lax.scan(back, jnp.zeros_like(states[0]), scanned, reverse=True)

    dkeys = -_product("nBPcY,nBPXY->nBPcX", dcorrections, states)
    for_values = _product("nBPdc,nBPdY->nBPcY", x.inverse, dcorrections)
    for_keys = _product("nBPdc,nBPdX->nBPcX", x.inverse, dkeys)
    against = _product("nBPcY,nBPdY->nBPcd", for_values, x.values) + _product("nBPcX,nBPdX->nBPcd", for_keys, x.keys)
    dsystem = -jnp.tril(against, -1)
    between = _product("nBPcY,nBPdY->nBPcd", do, corrections)
    dscores, of_pairs = between * x.within, dsystem * x.within
    of_state = _product("nBPcY,nBPXY->nBPcX", do, states)
    into_state = _product("nBPcY,nBPXY->nBPcX", corrections, dstates)
    paired = _product("nBPcd,nBPdX->nBPcX", of_pairs, x.k)
    beta, before, after = x.beta[..., None], x.before[..., None], x.after[..., None]

    dq = _product("nBPcd,nBPdX->nBPcX", dscores, x.k) + before * of_state
    dk = _product("nBPcd,nBPcX->nBPdX", dscores, x.q) + after * into_state + beta * before * for_keys + beta * paired
    dk += _product("nBPcd,nBPcX->nBPdX", of_pairs, beta * x.k)
    by_key = jnp.sum(for_keys * x.k, -1)
    dbeta = jnp.sum(for_values * x.v, -1) + x.before * by_key + jnp.sum(paired * x.k, -1)
    # Of the sums of g up to each token, which the decays are made of.
    decays = dsystem * x.system + between * x.scores
    stored = x.after * jnp.sum(x.k * into_state, -1)
    dsum = jnp.sum(decays, -1) - jnp.sum(decays, -2) + x.beta * x.before * by_key - stored
    dsum += x.before * jnp.sum(x.q * of_state, -1)
    dsum = dsum.at[..., -1].add(jnp.sum(stored, -1) + x.across * jnp.sum(states * dstates, (-1, -2)))
    dg = jnp.flip(jnp.cumsum(jnp.flip(dsum, -1), -1), -1)
    return Tokens(*(_by_row(d)[:, :T] for d in (dq, dk, beta * for_values, dg, dbeta)))


def delta_tiles(
    tokens: Tokens, states_NPXY: jax.Array, source_t: jax.Array, targets_t2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of t tiles, each a chunk of some row, and all states with those behind the tiles.

    The tiles run in order, so that one can begin where one before it ended.

    Args:
        tokens: (t, T, ...), T a power of 2.
        states_NPXY: of rows; the first is that of none.
        source_t: int32, in which each tile begins; 0 for an empty one.
        targets_t2: int32, the two places where it is left; 0 for nowhere.
    """
    t, T = tokens.g_BTP.shape[:2]
    x = jax.tree.map(lambda a: a[0], _chunks(tokens, jnp.ones((t, T), jnp.int32), True, T))

    def step(states: jax.Array, of: tuple[Any, jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        chunk, source, targets = of
        state = jnp.where(source > 0, jax.lax.dynamic_index_in_dim(states, source, keepdims=False), 0)
        new, corrections = _through(state, chunk)
        for target in targets:
            states = jax.lax.dynamic_update_index_in_dim(states, new, target, 0)
        return states, (corrections, state)

    scanned = _of_states(x), source_t, targets_t2
    states_NPXY, (corrections, states_tPXY) = jax.lax.scan(step, states_NPXY, scanned)
    return jnp.swapaxes(_outputs(x, states_tPXY, corrections), 1, 2), states_NPXY


def delta_step(token: Tokens, state_BPXY: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the output of one token of each row, and the state behind it: the rule as it is written above.

    Args:
        token: with T = 1.
        state_BPXY: before it.

    Returns:
        o_B1PY and the state.
    """
    q, k, v, g, beta = (a[:, 0] for a in token)
    state = jnp.exp(g)[..., None, None] * state_BPXY
    wrong = v - _product("BPX,BPXY->BPY", k, state)
    state += _product("BPX,BPY->BPXY", k, beta[..., None] * wrong)
    return _product("BPX,BPXY->BPY", q, state)[:, None], state


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, precision=HIGHEST)


def _in_chunks(x_BTP: jax.Array, chunk: int) -> jax.Array:
    """Return (B, T, P, ...) as (n, B, P, c, ...), with zeros behind the last token."""
    padding = [(0, 0), (0, -x_BTP.shape[1] % chunk)] + [(0, 0)] * (x_BTP.ndim - 2)
    whole = jnp.pad(x_BTP, padding)
    apart = whole.reshape(len(whole), -1, chunk, *whole.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(apart, 1, 0), 3, 2)


def _by_row(x_nBPc: jax.Array) -> jax.Array:
    """Undo `_in_chunks`, but for the zeros."""
    apart = jnp.moveaxis(jnp.moveaxis(x_nBPc, 2, 3), 0, 1)
    return apart.reshape(len(apart), -1, *apart.shape[3:])


def _chunks(tokens: Tokens, segments_BT: jax.Array, continued: bool, chunk: int) -> _Chunks:
    q, k, v, g, beta = (_in_chunks(a, chunk) for a in tokens)
    B, T = segments_BT.shape
    # Behind a row's end stands its last segment, with g and beta 0: the state stays as it is.
    whole = jnp.pad(segments_BT, ((0, 0), (0, -T % chunk)), mode="edge").reshape(B, -1, chunk)
    segment_nBc = jnp.moveaxis(whole, 1, 0)
    first_B = segment_nBc[0, :, 0] if continued else jnp.full(B, -1, segment_nBc.dtype)
    earlier_nB = jnp.concatenate([first_B[None], segment_nBc[:-1, :, -1]])
    sum_nBPc, last_nB1 = jnp.cumsum(g, axis=-1), segment_nBc[..., -1:]
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    same_nB1cc = ((segment_nBc[..., :, None] == segment_nBc[..., None, :]) & lower)[:, :, None]

    def decay(exponent: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.exp(jnp.where(seen, exponent, -jnp.inf))

    within = decay(sum_nBPc[..., :, None] - sum_nBPc[..., None, :], same_nB1cc)
    before = decay(sum_nBPc, (segment_nBc == earlier_nB[..., None])[:, :, None])
    after = decay(sum_nBPc[..., -1:] - sum_nBPc, (segment_nBc == last_nB1)[:, :, None])
    across = decay(sum_nBPc[..., -1], last_nB1 == earlier_nB[..., None])
    system = jnp.tril(beta[..., None] * _product("nBPcX,nBPdX->nBPcd", k, k) * within, -1)
    inverse = _inverse(system)
    values = _product("nBPcd,nBPdY->nBPcY", inverse, beta[..., None] * v)
    keys = _product("nBPcd,nBPdX->nBPcX", inverse, (beta * before)[..., None] * k)
    scores = _product("nBPcX,nBPdX->nBPcd", q, k) * within
    return _Chunks(q, k, v, beta, within, before, after, across, system, inverse, values, keys, scores)


def _inverse(system: jax.Array) -> jax.Array:
    """Return the inverse of I + A, for a strictly lower A (..., c, c).

    Two blocks on the diagonal, T1 and T2, have -T2 A T1 between them: blocks grow from one token to the chunk. Each is
    an inverse itself, and so no larger than the result. XLA's own solver has a task of the CPU's pool wait for others
    there, and hangs where two programs run side by side.
    """
    c, outer = system.shape[-1], system.shape[:-2]
    inverse = jnp.ones((*outer, c, 1, 1), system.dtype)
    while (size := inverse.shape[-1]) < c:
        pairs = c // (2 * size)
        below = system.reshape(*outer, pairs, 2 * size, pairs, 2 * size)[..., size:, :, :size]
        # A pair's own block, without a gather: all others are zeros in the sum.
        below = jnp.sum(jnp.where(jnp.eye(pairs, dtype=bool)[:, None, :, None], below, 0), axis=-2)
        first, second = jnp.moveaxis(inverse.reshape(*outer, pairs, 2, size, size), -3, 0)
        between = -_small_product(second, _small_product(below, first))
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        inverse = jnp.concatenate([upper, jnp.concatenate([between, second], -1)], -2)
    return inverse[..., 0, :, :]


def _small_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return x y of many small matrices, as sums: a TPU's compiler takes half a minute over a product of each size."""
    return jnp.sum(x[..., :, :, None] * y[..., None, :, :], axis=-2)


def _first_state(x: _Chunks, state_BPXY: jax.Array | None) -> jax.Array:
    return jnp.zeros((*x.k.shape[1:3], x.k.shape[-1], x.v.shape[-1]), x.k.dtype) if state_BPXY is None else state_BPXY


def _run(x: _Chunks, state_BPXY: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the corrections (n, B, P, c, Y) and the state before each chunk (n, B, P, X, Y), and the last state."""

    def step(state: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        new, corrections = _through(state, of)
        return new, (corrections, state)

    last, (corrections, states) = jax.lax.scan(step, state_BPXY, _of_states(x))
    return corrections, states, last


def _of_states(x: _Chunks) -> tuple[jax.Array, ...]:
    """Return what `_through` reads of chunks."""
    return x.k, x.after, x.across, x.values, x.keys


def _through(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the state (..., X, Y) behind a chunk that it stood before, and the chunk's corrections (..., c, Y)."""
    k, after, across, values, keys = chunk
    corrections = values - _product("...cX,...XY->...cY", keys, state)
    learnt = _product("...cX,...cY->...XY", k * after[..., None], corrections)
    return across[..., None, None] * state + learnt, corrections


def _outputs(x: _Chunks, states: jax.Array, corrections: jax.Array) -> jax.Array:
    """Return o (..., c, Y) of chunks, for the state before each and its corrections."""
    asked = _product("...cX,...XY->...cY", x.q * x.before[..., None], states)
    return asked + _product("...cd,...dY->...cY", x.scores, corrections)
