"""Do the attention kernels for TPU and GPU compute what a masked softmax does, packed segments and padding included?

Splash runs emulated. cuDNN cannot run here at all: its program is lowered for CUDA, and what the call promises of it is
tested against a stand-in that keeps to the description in `models/kernels/cudnn.py`, garbage at padding included.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_client.models.kernels import cudnn, splash
from jax_client.sharding import make_mesh
from support.children import STRICT
from support.meshes.devices import with_devices

B, K, G, H = 2, 2, 2, 16
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def packed(*rows: list[tuple[int, int]]) -> np.ndarray:
    """Return segments_BT of rows of (segment id, tokens)."""
    return np.stack([np.concatenate([np.full(n, i, np.int32) for i, n in row]) for row in rows])


LONG_BT = packed([(1, 100), (2, 230), (7, 150), (0, 32)], [(3, 511), (4, 1)])
SHORT_BT = packed([(1, 5), (2, 9), (7, 4), (0, 2)], [(3, 19), (4, 1)])


def operands(segments_BT: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return q, k, v and the output's cotangent."""
    shapes = [(*segments_BT.shape, K, G, H), *2 * [(*segments_BT.shape, K, H)], (*segments_BT.shape, K, G, H)]
    draw = np.random.default_rng(0).standard_normal
    return tuple(draw(shape).astype(np.float32) for shape in shapes)


def reference(segments_BT: np.ndarray) -> Attention:
    T = segments_BT.shape[1]
    visible_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & np.tri(T, dtype=bool)

    def attend(q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH) / np.sqrt(H)
        p_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], s_BKGTS, -jnp.inf))
        return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BTKH)

    return attend


def both_ways(attend: Attention) -> Any:
    """Return a compiled function from q, k, v and do to the output and the cotangents of q, k and v, by `jax.vjp`."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    return jax.jit(run)


def splashed(dtype: Any, interpret: bool = True) -> Any:
    """Return splash as `both_ways` returns what has a derivative of its own."""
    more: Any = {"dtype": dtype, "mesh": one_device(), "interpret": interpret}
    segments = jnp.asarray(LONG_BT)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        o, lse = splash.splash_forward(q, k, v, segments, **more)
        return o, *splash.splash_backward(q, k, v, segments, o, lse, do, **more)

    return jax.jit(run)


def one_device() -> Mesh:
    return make_mesh({}, jax.devices()[:1])


@pytest.mark.parametrize(
    ("dtype", "partial_dq", "atol"),
    [(jnp.float32, 8, 1e-5), (jnp.float32, 1, 1e-5), (jnp.bfloat16, 8, 5e-2)],
    ids=["float32-fused", "float32-separate-dq", "bfloat16-fused"],
)
def test_splash_equals_the_reference(dtype: Any, partial_dq: int, atol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows of two blocks, blocks of two steps.
    monkeypatch.setattr(splash, "BLOCK", 256)
    monkeypatch.setattr(splash, "STEP", 128)
    monkeypatch.setattr(splash, "BLOCK_BYTES", 256 * 128 * jnp.dtype(dtype).itemsize)
    monkeypatch.setattr(splash, "MOST_PARTIAL_DQ", partial_dq)
    blocks = splash._block_sizes(LONG_BT.shape[1], H, dtype)
    assert (blocks.block_q, blocks.block_kv_dkv, blocks.block_kv_dkv_compute) == (256, 256, 128)
    assert blocks.use_fused_bwd_kernel == (partial_dq == 8)

    ours = splashed(dtype)(*operands(LONG_BT))
    theirs = both_ways(reference(LONG_BT))(*operands(LONG_BT))
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, right, atol=atol)


def test_splash_keeps_documents_apart() -> None:
    *qkv, do = operands(LONG_BT)
    first, run = LONG_BT == 1, splashed(jnp.bfloat16)
    do[LONG_BT != 2] = 0
    before = [np.asarray(x) for x in run(*qkv, do)]
    for x in qkv:
        x[first] += 1
    after = [np.asarray(x) for x in run(*qkv, do)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[~first], new[~first])
    assert (before[0][first] != after[0][first]).any()
    assert all(dx[LONG_BT == 2].any() and not dx[LONG_BT != 2].any() for dx in before[1:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_splash_lowers_for_tpu(dtype: Any) -> None:
    run = splashed(dtype, interpret=False)
    text = run.trace(*operands(LONG_BT)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_splash_in_float32_asks_for_full_precision() -> None:
    jaxpr = str(jax.make_jaxpr(splashed(jnp.float32))(*operands(LONG_BT)))
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST") >= 7


@pytest.mark.parametrize("H", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_splash_blocks_fit(H: int, dtype: Any) -> None:
    for T in (128, 256, 384, 640, 1024, 1536, 4096, 6144, 8192, 16384, 32768, 131072):
        blocks = splash._block_sizes(T, H, dtype)
        largest = max(blocks.block_q, blocks.block_kv, blocks.block_kv_dkv or 0)
        assert largest * max(H, 128) * jnp.dtype(dtype).itemsize <= splash.BLOCK_BYTES
        for block in (blocks.block_q, blocks.block_kv, blocks.block_kv_dkv, blocks.block_kv_dq or T):
            assert block and T % block == block % 128 == 0
        assert not blocks.use_fused_bwd_kernel or T // (blocks.block_kv_dkv or 1) <= splash.MOST_PARTIAL_DQ


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_client.models.kernels.splash import splash_backward, splash_forward
from jax_client.sharding import make_mesh

B, T, K, G, H = 4, 128, 2, 2, 16
draw, kv = np.random.default_rng(0).standard_normal, (B, T, K, H)
q, k, v, do = draw((B, T, K, G, H)), draw(kv), draw(kv), draw((B, T, K, G, H))
args = [x.astype(np.float32) for x in (q, k, v, do)]
segments = np.arange(T, dtype=np.int32) // np.array([[30], [50], [70], [90]], np.int32)

def both_ways(mesh, segments, q, k, v, do):
    more = {"dtype": jnp.float32, "mesh": mesh, "interpret": True}
    o, lse = splash_forward(q, k, v, segments, **more)
    return o, *splash_backward(q, k, v, segments, o, lse, do, **more)

results = []
for mesh in (make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), make_mesh({}, jax.devices()[:1])):
    place = lambda x, *rest: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), *rest)))
    placed = [place(segments), *(place(x, None, "tensor") for x in args)]
    compiled = jax.jit(lambda *a: both_ways(mesh, *a)).lower(*placed).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    results.append(compiled(*placed))
for eight, one in zip(*results, strict=True):
    assert eight.addressable_shards[0].data.shape[:3] == (1, T, 1)
    np.testing.assert_allclose(eight, one, atol=1e-6)
"""


def test_splash_on_eight_devices_equals_one() -> None:
    done = subprocess.run([*STRICT, "-c", ON_A_MESH], env=with_devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def places_by_loops(segments_BT: np.ndarray, M: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths, offsets = np.full((len(segments_BT), M), -1), np.full((len(segments_BT), M + 1), -1)
    numbers = np.full(segments_BT.shape, -1)
    for b, row in enumerate(segments_BT):
        m, last = -1, 0
        for t, segment in enumerate(row):
            begins, last = segment != last, segment
            if segment == 0:
                continue
            m += begins
            numbers[b, t] = m
            if m < M:
                if begins:
                    lengths[b, m], offsets[b, m] = 0, t
                lengths[b, m] += 1
    return lengths, offsets, numbers


def test_cudnn_segment_places_equal_a_loop() -> None:
    rng, T = np.random.default_rng(0), 24
    rows = [np.zeros(T), np.ones(T), np.arange(T), np.repeat([0, 3, 0, 3, 9, 0, 1, 0], 3), np.repeat([5, 2, 7, 0], 6)]
    rows += [np.sort(rng.integers(0, 5, T))[::sign] for sign in (1, -1)]
    segments_BT = np.stack(rows).astype(np.int32)
    ours = cudnn._segment_places(jnp.asarray(segments_BT), 4)
    for mine, right in zip(ours, places_by_loops(segments_BT, 4), strict=True):
        assert mine.dtype == jnp.int32
        np.testing.assert_array_equal(mine, right)


def test_cudnn_knows_which_jax_counts_key_offsets_right() -> None:
    q, k, *_ = operands(SHORT_BT)
    q_BTNH = jnp.reshape(q, (*k.shape[:2], K * G, H))
    lengths, offsets, _ = cudnn._segment_places(jnp.asarray(SHORT_BT), 3)
    *_, k_offsets = cudnn.fused._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q_BTNH, jnp.asarray(k))
    right = np.array([0, 5, 14, 20, 39, 40, 40, 40]) * K * H  # what is unused points behind the last token
    assert np.array_equal(np.ravel(k_offsets), right) == (jax.__version_info__ >= cudnn.GQA_FIXED)


def stand_in(q: jax.Array, k: jax.Array, v: jax.Array, **call: Any) -> jax.Array:
    """Do what cuDNN does with the lists that jax makes of its arguments: causal within a segment, NaN elsewhere."""
    assert call["mask_type"] == cudnn.fused.MaskType.PADDING_CAUSAL
    lists = (call[name] for name in ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"))
    fixed: Any = cudnn.fused._fix_seqlen_offsets(*lists, query=q, key=k)
    X, N, M = q.shape[0] * q.shape[1], q.shape[2], call["q_seqlen"].size  # tokens and segments of all rows; heads
    length_M11, _, q_start_M11, k_start_M11 = (x.ravel()[:M, None, None] for x in fixed)
    x_X1, y_Y = jnp.arange(X)[:, None] - q_start_M11 // (N * H), jnp.arange(X) - k_start_M11 // (k.shape[2] * H)
    visible_XY = ((x_X1 < length_M11) & (y_Y >= 0) & (y_Y <= x_X1)).any(axis=0)
    written_BT11 = visible_XY.any(axis=1).reshape(*q.shape[:2], 1, 1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible_XY: jax.Array) -> jax.Array:
        k_XNH, v_XNH = (jnp.repeat(x.reshape(X, -1, H), N // x.shape[2], axis=1) for x in (k, v))
        s_NXY = jnp.einsum("XNH,YNH->NXY", q.reshape(X, N, H), k_XNH) * call["scale"]
        p_NXY = jax.nn.softmax(jnp.where(visible_XY, s_NXY, -1e30))
        return jnp.einsum("NXY,YNH->XNH", p_NXY, v_XNH).reshape(q.shape)

    @jax.custom_vjp
    def library(q: Any, k: Any, v: Any, visible_XY: Any, written_BT11: Any) -> jax.Array:
        return jnp.where(written_BT11, attend(q, k, v, visible_XY), jnp.nan)

    def pull(saved: tuple[jax.Array, ...], do: jax.Array) -> tuple[Any, ...]:
        *qkv, visible_XY, written_BT11 = saved
        cotangents = jax.vjp(lambda *each: attend(*each, visible_XY), *qkv)[1](do)
        return *(jnp.where(written_BT11, d, jnp.nan) for d in cotangents), None, None

    library.defvjp(lambda *args: (library(*args), args), pull)
    return library(q, k, v, visible_XY, written_BT11)


def with_cudnn(dtype: Any, max_segments: int) -> Attention:
    segments = jnp.asarray(SHORT_BT)
    more: Any = {"dtype": dtype, "mesh": one_device(), "max_segments": max_segments}
    return lambda q, k, v: cudnn.cudnn_attention(q, k, v, segments, **more)


def test_cudnn_equals_the_reference_and_is_zero_at_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
    ours = both_ways(with_cudnn(jnp.float32, 3))(*operands(SHORT_BT))
    for mine, right in zip(ours, both_ways(reference(SHORT_BT))(*operands(SHORT_BT)), strict=True):
        np.testing.assert_allclose(
            mine, np.where(SHORT_BT.reshape(B, -1, *(right.ndim - 2) * [1]), right, 0), atol=1e-5
        )


def test_cudnn_shows_a_segment_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
    o_BTKGH = np.asarray(jax.jit(with_cudnn(jnp.float32, 2))(*operands(SHORT_BT)[:3]))  # row 0 has three
    np.testing.assert_array_equal(
        np.isnan(o_BTKGH), np.broadcast_to((SHORT_BT == 7)[..., None, None, None], o_BTKGH.shape)
    )


@pytest.mark.parametrize("max_segments", [1, 3])
def test_cudnn_lowers_for_cuda(max_segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 90600)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn.fused, "is_cuda_compute_capability_equal", lambda _: False)
    run = both_ways(with_cudnn(jnp.bfloat16, max_segments))
    text = run.trace(*operands(SHORT_BT)).lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = [line for line in text.splitlines() if "@__cudnn$" in line]
    assert "fmhaSoftmax(" in forward and "fmhaSoftmaxBackward(" in backward
    M, N, T = max(max_segments, 2), K * G, SHORT_BT.shape[1]
    for call in (forward, backward):
        assert "PADDING_CAUSAL" in call and f"max_seg_per_batch\\22: {M}" in call
        # The queries, the lengths, the offsets and the statistics.
        for operand in (f"{B}x{T}x{N}x{H}xbf16", f"{B}x{M}xi32", f"{B}x{M + 1}xi32", f"{B * M}x{N}x{T}xf32"):
            assert f"tensor<{operand}>" in call
