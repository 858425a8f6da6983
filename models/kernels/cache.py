"""Which attention reads the paged cache of a sampler, and in which layout does that cache lie?

A `PagedAttention` is one function, which stores new tokens and attends to all that a row has, and the layout of a token
in the pool. There are two in plain JAX, for a CPU and for the others, and a kernel for each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.kernels import ragged
from jax_client.models.kernels.paged import BLOCK, paged_attention, write_pages, write_tokens
from jax_client.sharding import LANES

# Arrays (N, S, ...) by name: N pages of S tokens each.
Pool = dict[str, jax.Array]
# Keys of a wide turn: of a row, and of all rows together, whose keys and values exist as copies then.
ROW_KEYS = 512
ALL_KEYS = 2**15
# Longest context for which the number of turns is known to the compiler. Beyond, a turn takes a GPU so long that it
# need not be: a loop without such a number waits for the host after each turn.
LONGEST_COUNTED = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedAttention:
    """Causal attention over a paged cache.

    Attributes:
        name: for `describe()` and the log.
        token_shapes: `f(K, H) -> {name: shape}`, the arrays of a pool and the shape that a token has in each. The first
            axis goes by heads, so that a part of it belongs to a part of the heads.
        attend: `f(q_RTKGH, k_RTKH, v_RTKH, pool, table_Rn, page_R, position_RT, dtype) -> (o_RTKGH, pool)`. It stores
            the new tokens of each row in the page `page_R`, T of them from the page's start on, or one at its place,
            and attends to what the pages of `table_Rn` hold up to each query. Queries and results are float32, new keys
            and values of the matmul type, which is also that of the products' operands. A position of -1 sees nothing
            and gets an undefined, finite result. Its keywords are `window`, `sinks` and `scale`, as for
            `paged_attention`; None, the default of each, is for attention without it.
        lacks: those of the keywords that it does not take.
    """

    name: str
    token_shapes: Callable[[int, int], Mapping[str, tuple[int, ...]]]
    attend: Callable[..., tuple[jax.Array, Pool]]
    lacks: frozenset[str] = frozenset()


def _heads(K: int, H: int) -> dict[str, tuple[int, ...]]:
    return {"k": (K, H), "v": (K, H)}


def _on_tpu(K: int, H: int) -> dict[str, tuple[int, ...]]:
    """Return `_heads`, with a token's heads in one axis where they are narrower than a tile.

    A TPU would fill such heads up to 128 values: it copies the pool into that layout, twice its size, for a program.
    """
    return _heads(K, H) if H % LANES == 0 else {"k": (K * H,), "v": (K * H,)}


def _write(
    k_RTKH: jax.Array, v_RTKH: jax.Array, pool: Pool, page_R: jax.Array, position_RT: jax.Array, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the pool of keys, and that of values, with new tokens."""
    if k_RTKH.shape[1] > 1:
        return write_pages(pool["k"], pool["v"], k_RTKH, v_RTKH, page_R, one_by_one=one_by_one)
    place_R = position_RT[:, 0] % pool["k"].shape[1]
    return write_tokens(pool["k"], pool["v"], k_RTKH[:, 0], v_RTKH[:, 0], page_R, place_R)


def _two_arrays(name: str, read: Callable[..., jax.Array], *, on_tpu: bool = False) -> PagedAttention:
    """Return an attention over a pool of keys and one of values.

    Args:
        name: of it.
        read: `f(q_RTKGH, k_NSKH, v_NSKH, table_Rn, position_RT, dtype) -> o_RTKGH`, with the keywords of `attend`, once
            the new tokens are stored.
        on_tpu: store whole pages one after the other, in the layout of `_on_tpu`.
    """

    def attend(
        q_RTKGH: jax.Array,
        k_RTKH: jax.Array,
        v_RTKH: jax.Array,
        pool: Pool,
        table_Rn: jax.Array,
        page_R: jax.Array,
        position_RT: jax.Array,
        dtype: jnp.dtype,
        **more: Any,
    ) -> tuple[jax.Array, Pool]:
        k_NSKH, v_NSKH = _write(k_RTKH, v_RTKH, pool, page_R, position_RT, one_by_one=on_tpu)
        o_RTKGH = read(q_RTKGH, k_NSKH, v_NSKH, table_Rn, position_RT, dtype, **more)
        return o_RTKGH, {"k": k_NSKH, "v": v_NSKH}

    return PagedAttention(name=name, token_shapes=_on_tpu if on_tpu else _heads, attend=attend)


def small_turns() -> PagedAttention:
    """Return the attention of a CPU: `BLOCK` pages a turn, as many turns as the longest row needs."""
    return _two_arrays("paged", paged_attention)


def wide_turns(platform: str) -> PagedAttention:
    """Return the attention of a GPU or TPU without its kernel: wide turns, their number known to the compiler.

    There is a loop for each of a few lengths, and the shortest runs that holds the longest row. With a window these are
    the lengths up to it, and one loop over the window for rows that are longer.
    A TPU stores a prompt's pages one after the other, for the reason that `store_one_by_one` gives.
    """

    def read(
        q_RTKGH: jax.Array,
        k_NSKH: jax.Array,
        v_NSKH: jax.Array,
        table_Rn: jax.Array,
        position_RT: jax.Array,
        dtype: jnp.dtype,
        *,
        window: int | None = None,
        **more: Any,
    ) -> jax.Array:
        (R, n), page = table_Rn.shape, k_NSKH.shape[1]
        keys, lengths = min(ROW_KEYS, ALL_KEYS // R), _lengths(n, page)
        if window is not None:
            # A turn no longer than the window: a row's window lies in two, or few.
            keys, lengths = min(keys, window), (*(pages for pages in lengths[:-1] if pages * page <= window), n)
        block = max(BLOCK, keys // page)

        def run(pages: int) -> jax.Array:
            cut_Rn = jnp.pad(table_Rn[:, :pages], ((0, 0), (0, -pages % block)))
            counted = min(pages * page, window or pages * page) <= LONGEST_COUNTED
            return paged_attention(
                q_RTKGH,
                k_NSKH,
                v_NSKH,
                cut_Rn,
                position_RT,
                dtype,
                block=block,
                whole_table=counted,
                window=window,
                **more,
            )

        last = jnp.max(position_RT) // page
        which = sum((last >= pages).astype(jnp.int32) for pages in lengths[:-1])
        # The condition reads the pool and does not return it: of one that goes through XLA makes a copy on a GPU.
        return jax.lax.switch(jnp.asarray(which), [partial(run, pages) for pages in lengths])

    return _two_arrays("paged in wide turns", read, on_tpu=platform == "tpu")


def _lengths(pages: int, page: int) -> tuple[int, ...]:
    """Return for how many pages of a table there is a loop each, with all of them as the last."""
    counts, count = [], ROW_KEYS // page
    while count < pages and count * page <= LONGEST_COUNTED:
        counts.append(count)
        count *= 2
    return *counts, pages


def triton_pages(*, interpret: bool = False) -> PagedAttention:
    """Return the attention of an NVIDIA GPU, for bfloat16; `interpret` emulates it, for tests."""
    # Here: Pallas is large, and only a GPU needs this part of it.
    from jax_client.models.kernels.triton import triton_attention

    return _two_arrays("triton", partial(triton_attention, interpret=interpret))


def ragged_pages(kernel: ragged.Kernel = ragged.tpu_kernel) -> PagedAttention:
    """Return the attention of a TPU, for bfloat16; see `ragged.unsupported`."""

    def attend(
        q_RTKGH: jax.Array,
        k_RTKH: jax.Array,
        v_RTKH: jax.Array,
        pool: Pool,
        table_Rn: jax.Array,
        page_R: jax.Array,
        position_RT: jax.Array,
        dtype: jnp.dtype,
        *,
        window: int | None = None,
        sinks: jax.Array | None = None,
        scale: float | None = None,
    ) -> tuple[jax.Array, Pool]:
        if sinks is not None:
            raise NotImplementedError(
                "the ragged kernel takes no sinks; use an attention whose `lacks` has none of what layers need"
            )
        place_R = position_RT[:, 0] % pool["kv"].shape[1] if k_RTKH.shape[1] == 1 else None
        kv_NSCH = ragged.write(pool["kv"], k_RTKH, v_RTKH, page_R, place_R)
        more: Any = {"window": window, "scale": scale}
        o_RTKGH = ragged.ragged_attention(q_RTKGH, kv_NSCH, table_Rn, position_RT, dtype, kernel, **more)
        return o_RTKGH, {"kv": kv_NSCH}

    shapes = lambda K, H: {"kv": ragged.token_shape(K, H)}  # noqa: E731
    return PagedAttention(name="ragged", token_shapes=shapes, attend=attend, lacks=frozenset({"sinks"}))
