"""Do windows, sinks and scales of attention give what a masked softmax gives, packed, paged, and backwards?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.kernels import blockwise, cache, paged, ragged, splash
from jax_client.models.kernels.blockwise import blockwise_backward, blockwise_forward
from jax_client.models.kernels.cache import PagedAttention
from jax_client.models.parts import attention
from jax_client.sharding import make_mesh

F32 = jnp.dtype("float32")
K, G, H = 2, 3, 16
SINKS = {"none": None, "small": -20.0, "middling": 0.5, "large": 9.0, "huge": 1e4}


def sinks_of(size: float | None) -> Any:
    return None if size is None else jnp.asarray(size + np.arange(K * G).reshape(K, G) / 7, F32)


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, visible_BTS: Any, window: int | None, sinks: Any, scale: float | None
) -> jax.Array:
    """Return the masked softmax over all pairs; row b's queries and keys are those of the last places of the mask."""
    T, S = visible_BTS.shape[1:]
    place_T1 = np.arange(S)[-T:, None]
    if window is not None:
        visible_BTS = visible_BTS & (np.arange(S) > place_T1 - window)
    s = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision="highest") * (H**-0.5 if scale is None else scale)
    s = jnp.where(visible_BTS[:, None, None], s, -jnp.inf)
    if sinks is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, :, None, None], (*s.shape[:-1], 1))], axis=-1)
    p = jax.nn.softmax(s, axis=-1)[..., :S]
    return jnp.einsum("BKGTS,BSKH->BTKGH", p, v, precision="highest")


def packed(*rows: list[tuple[int, int]]) -> np.ndarray:
    """Return segments_BT of rows of (segment id, tokens)."""
    return np.stack([np.concatenate([np.full(n, i, np.int32) for i, n in row]) for row in rows])


# Rows of 60: no multiple of the blocks that the tests ask for, which become 6 (one CPU) and 10.
SEGMENTS_BT = packed([(1, 7), (2, 41), (3, 6), (0, 6)], [(1, 60)])


def drawn(segments_BT: np.ndarray) -> tuple[Any, ...]:
    """Return q, k, v and the output's cotangent."""
    shape, draw = segments_BT.shape, np.random.default_rng(0).standard_normal
    shapes = (*shape, K, G, H), (*shape, K, H), (*shape, K, H), (*shape, K, G, H)
    return tuple(jnp.asarray(draw(s) * 1.5, F32) for s in shapes)


def expected(segments_BT: np.ndarray, operands: Any, **more: Any) -> Any:
    *qkv, do = operands
    T = segments_BT.shape[1]
    visible = (segments_BT[:, :, None] == segments_BT[:, None]) & np.tri(T, dtype=bool)
    window, sinks, scale = (more.get(name) for name in ("window", "sinks", "scale"))

    @jax.jit
    def run(*qkv: jax.Array) -> Any:
        o, pull = jax.vjp(lambda q, k, v: reference(q, k, v, visible, window, sinks, scale), *qkv)
        return o, *pull(do)

    return run(*qkv)


@pytest.mark.parametrize("one_cpu", [True, False], ids=["one-cpu", "mesh"])
@pytest.mark.parametrize(
    ("window", "sink", "scale"),
    [
        (1, "middling", None),
        (4, "none", None),
        (6, "large", 0.4),
        (13, "small", None),
        (30, "middling", None),
        (60, "none", 0.1),
        (1000, "huge", None),
        (None, "large", None),
        (None, "none", 0.2),
    ],
)
def test_packed_rows(
    window: int | None, sink: str, scale: float | None, one_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "SMALL_BLOCK", 8)
    monkeypatch.setattr(blockwise, "LARGE_BLOCK", 11)
    more: Any = {"window": window, "sinks": sinks_of(SINKS[sink]), "scale": scale}
    plain, operands, segments = attention.blockwise(one_cpu), drawn(SEGMENTS_BT), jnp.asarray(SEGMENTS_BT)

    @jax.jit
    def ours(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, lse = plain.forward(q, k, v, segments, F32, **more)
        return o, *plain.backward(q, k, v, segments, o, lse, do, F32, **more)

    for mine, right in zip(ours(*operands), expected(SEGMENTS_BT, operands, **more), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("one_cpu", [True, False], ids=["one-cpu", "mesh"])
def test_blocks_outside_the_window_are_not_visited(one_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "SMALL_BLOCK", 10)
    monkeypatch.setattr(blockwise, "LARGE_BLOCK", 10)
    segments = jnp.ones((1, 60), jnp.int32)
    q, k, v, do = drawn(np.ones((1, 60), np.int32))
    # A masked score hides a NaN of the keys, a product with probability 0 does not hide one of the values.
    v = v.at[:, :20].set(jnp.nan)
    o, lse = blockwise_forward(q, k, v, segments, F32, one_cpu=one_cpu, window=11)
    finite = np.isfinite(np.asarray(o)).all(axis=(0, 2, 3, 4))
    assert finite[30:].all() and not finite[:30].any()
    dq, *_ = blockwise_backward(q, k, v, segments, o, lse, do, F32, one_cpu=one_cpu, window=11)
    assert np.isfinite(np.asarray(dq)[:, 30:]).all()


@pytest.mark.parametrize(
    ("window", "sink", "scale", "partial_dq"),
    [(100, "middling", None, 8), (300, "large", 0.3, 1), (None, "small", None, 8), (7, "none", None, 1)],
)
def test_splash(
    window: int | None, sink: str, scale: float | None, partial_dq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of two blocks, blocks of two steps.
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "STEP", 128)
    monkeypatch.setattr(splash, "BLOCK_BYTES", 128 * 128 * 4)
    monkeypatch.setattr(splash, "MOST_PARTIAL_DQ", partial_dq)
    segments_BT = packed([(1, 100), (2, 140), (0, 16)])
    more: Any = {"window": window, "sinks": sinks_of(SINKS[sink]), "scale": scale}
    kernel, operands = attention.splash(make_mesh({}, jax.devices()[:1]), interpret=True), drawn(segments_BT)
    segments = jnp.asarray(segments_BT)

    @jax.jit
    def ours(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, lse = kernel.forward(q, k, v, segments, F32, **more)
        assert lse.shape == (1, K * G, 256), "not the kernel ran, but blockwise"
        return o, *kernel.backward(q, k, v, segments, o, lse, do, F32, **more)

    for mine, right in zip(ours(*operands), expected(segments_BT, operands, **more), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=2e-5)


def test_splash_with_a_window_and_sinks_lowers_for_tpu() -> None:
    segments, operands = jnp.ones((1, 256), jnp.int32), drawn(np.ones((1, 256), np.int32))
    kernel = attention.splash(make_mesh({}, jax.devices()[:1]))
    more: Any = {"window": 128, "sinks": sinks_of(1.0)}

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, lse = kernel.forward(q, k, v, segments, jnp.dtype(jnp.bfloat16), **more)
        return kernel.backward(q, k, v, segments, o, lse, do, jnp.dtype(jnp.bfloat16), **more)

    text = jax.jit(ours).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_cudnn_leaves_windows_and_sinks_to_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = attention.cudnn(make_mesh({}, jax.devices()[:1]), described=True)
    monkeypatch.setattr("jax_client.models.kernels.cudnn.cudnn_attention", lambda *_, **__: pytest.fail("cuDNN ran"))
    segments, (q, k, v, do) = jnp.ones((1, 128), jnp.int32), drawn(np.ones((1, 128), np.int32))
    for more in ({"window": 5}, {"sinks": sinks_of(0.5), "scale": 0.3}):
        options: Any = more
        o, residual = kernel.forward(q, k, v, segments, F32, **options)
        dq, dk, dv = kernel.backward(q, k, v, segments, o, residual, do, F32, **options)
        for mine, right in zip((o, dq, dk, dv), expected(np.asarray(segments), (q, k, v, do), **options), strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-5, atol=2e-5)
    assert kernel.lacks == {"window", "sinks"}


# Pages of 8 tokens, 16 a row; decoding rows of several lengths, one of which is no row.
S, PAGES = 8, 16
LENGTHS = (1, 16, 17, 90, 128)


def paged_operands(K: int, H: int, T: int) -> tuple[Any, ...]:
    """Return q, each row's keys and values, its page table and the positions of its queries, the last T of the row."""
    R, rng = len(LENGTHS) + 1, np.random.default_rng(1)
    q, kv = rng.normal(size=(R, T, K, G, H)), rng.normal(size=(2, R, PAGES * S, K, H))
    table = rng.permutation(np.arange(1, R * PAGES + 1)).reshape(R, PAGES)
    last = np.array([*(max(length, T) for length in LENGTHS), 0]) // T * T - 1
    position = np.where(last[:, None] < 0, -1, last[:, None] - np.arange(T)[::-1])
    return *(jnp.asarray(x, F32) for x in (q, *kv)), jnp.asarray(table, jnp.int32), jnp.asarray(position, jnp.int32)


def attended(kernel: PagedAttention, operands: tuple[Any, ...], **more: Any) -> jax.Array:
    """Return what a kernel gives once the rows' pages are in its pool."""
    q, k, v, table, position = operands
    (R, _, K, H), T = k.shape, q.shape[1]
    pages, index = (x.reshape(R * PAGES, S, K, H) for x in (k, v)), table.reshape(-1)
    shapes = {name: jnp.zeros((R * PAGES + 1, S, *shape)) for name, shape in kernel.token_shapes(K, H).items()}
    if "kv" in shapes:
        pool = {"kv": ragged.write(shapes["kv"], *pages, index, None)}
    else:
        pool = dict(zip("kv", paged.write_pages(shapes["k"], shapes["v"], *pages, index), strict=True))
    place = jnp.maximum(position, 0)
    new_k, new_v = (jnp.take_along_axis(x, place[..., None, None], axis=1) for x in (k, v))
    # A row that is none writes to page 0, as in the sampler.
    page = jnp.where(position[:, 0] < 0, 0, jnp.take_along_axis(table, place[:, :1] // S, axis=1)[:, 0])
    assert T in (1, S)
    return jax.jit(lambda q, pool: kernel.attend(q, new_k, new_v, pool, table, page, position, F32, **more)[0])(q, pool)


PAGED = {
    "small": (cache.small_turns(), (2, 16)),
    "wide": (cache.wide_turns("gpu"), (2, 16)),
    "wide, in one axis": (cache.wide_turns("tpu"), (2, 16)),
    "triton": (cache.triton_pages(interpret=True), (2, 16)),
    "ragged": (cache.ragged_pages(ragged.plain_kernel), (2, 64)),
}


@pytest.mark.parametrize("T", [1, S], ids=["decode", "tile"])
@pytest.mark.parametrize(
    ("window", "sink", "scale"),
    [(1, "middling", None), (5, "none", None), (16, "large", 0.3), (37, "small", None), (500, "none", None),
     (None, "huge", None), (None, "none", 0.2)],
)  # fmt: skip
@pytest.mark.parametrize("name", PAGED)
def test_paged_rows(
    name: str, window: int | None, sink: str, scale: float | None, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROW_KEYS", 32)
    kernel, (K, H) = PAGED[name]
    sinks = sinks_of(SINKS[sink])
    more: Any = {"window": window, "sinks": sinks, "scale": scale}
    operands = paged_operands(K, H, T)
    if sinks is not None and "sinks" in kernel.lacks:
        with pytest.raises(NotImplementedError, match="no sinks"):
            attended(kernel, operands, **more)
        return
    o = attended(kernel, operands, **more)
    q, k, v, _, position = operands
    for r, last in enumerate(np.asarray(position)[:-1, -1]):
        n = int(last) + 1
        visible = np.tri(n, dtype=bool)[None, -T:]
        right = reference(q[r : r + 1], k[r : r + 1, :n], v[r : r + 1, :n], visible, window, sinks, scale or H**-0.5)
        np.testing.assert_allclose(o[r], right[0], rtol=1e-5, atol=1e-5)
    assert np.isfinite(np.asarray(o)).all()


@pytest.mark.parametrize("name", ["small", "wide", "triton"])
def test_a_window_reads_no_page_before_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row beside short ones reads as few turns as they, and one page outside the window per turn at most."""
    monkeypatch.setattr(cache, "ROW_KEYS", 32)
    q, k, v, table, position = paged_operands(2, 16, 1)
    pools = dict(zip("kv", paged.write_pages(*[jnp.zeros((len(q) * PAGES + 1, S, 2, 16))] * 2,
                                             *(x.reshape(-1, S, 2, 16) for x in (k, v)), table.reshape(-1)),
                     strict=True))  # fmt: skip
    # Row 3 has 90 tokens, and 0 times inf would be seen.
    pools["v"] = pools["v"].at[table[3, : 64 // S]].set(jnp.inf)
    new = jnp.take_along_axis(k, jnp.maximum(position, 0)[..., None, None], axis=1)
    page = jnp.take_along_axis(table, jnp.maximum(position, 0) // S, axis=1)[:, 0]
    kernel = PAGED[name][0]
    o, _ = kernel.attend(q, new, new, pools, table, page, position, F32, window=10)
    assert np.isfinite(np.asarray(o)[3]).all()
    o, _ = kernel.attend(q, new, new, pools, table, page, position, F32)
    assert not np.isfinite(np.asarray(o)[3]).all()
