"""How does attention run on a TPU?

Through splash attention, the Pallas kernel that jax ships: it skips the blocks above the causal diagonal and holds one
block of scores at a time. XLA cannot split a kernel over a mesh, so it runs under `shard_map`, each device on its own
rows and key/value heads. The segments only mask: a row costs the same however many it holds.

Forward and backward are two programs here. So the forward pass returns the log-sum-exp of every query, which the
kernel's own derivative would compute a second time, and the backward pass calls the private function behind that
derivative. It takes the residuals of one row: q, k and v, the segments, sinks (none: they are frozen, and the
log-sum-exp contains them), o, the log-sum-exp, and the blocks of the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
    splash_attention_kernel,
)
from jax.sharding import Mesh, PartitionSpec

from jax_client.sharding import sharding_for

BLOCK = 1024  # queries, and keys, that are brought into VMEM at a time
STEP = 512  # keys per product: BLOCK x STEP float32 scores are 2 MiB
BLOCK_BYTES = 2**19  # most of a block of keys; the kernels with twice that do not fit the 16 MiB of VMEM on v4 and v5
MOST_PARTIAL_DQ = 8


def splash_forward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
    interpret: bool = False,
    window: int | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend causally within segments.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation. T is a multiple of 128; any
            H will do, and 128 fills the matrix unit.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id. Padding (0) is a segment
            like the others, so every token sees at least itself.
        dtype: of the matmul operands, and of what enters and leaves the kernel: the output and the cotangents of
            q, k and v are rounded to it.
        mesh: rows are split over its data and fsdp axes, key/value heads over its tensor axis.
        interpret: emulate the kernel on any platform, for tests; slow.
        window, sinks, scale: as for `blockwise_forward`.

    Returns:
        o_BTKGH float32, and float32 lse_BNT, the log-sum-exp of each query's scores and sink, for `splash_backward`.

    Source: FlashAttention-2, arXiv 2307.08691; the kernel is jax.experimental.pallas.ops.tpu.splash_attention.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array, *sinks_KG: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        operands, segments = _operands(q, k, v, dtype, scale), SegmentIds(segments_BT, segments_BT)
        kernel = _kernel(operands[0].shape, dtype, interpret, window, save_residuals=True)
        more = {"sinks": sinks_KG[0].astype(jnp.float32).reshape(-1)} if sinks_KG else {}
        o_BNTH, (lse_BNT,) = jax.vmap(partial(kernel, **more))(*operands, segments)
        return jnp.swapaxes(o_BNTH, 1, 2).reshape(q.shape).astype(jnp.float32), lse_BNT

    q, kv, rows, lse = _specs(q_BTKGH.shape, mesh)
    more = () if sinks is None else (sinks,)
    run = _on_mesh(attend, mesh, (q, kv, kv, rows, *(PartitionSpec(q[2], None) for _ in more)), (q, lse), dtype)
    return run(q_BTKGH, k_BTKH, v_BTKH, segments_BT, *more)


def splash_backward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    o_BTKGH: jax.Array,
    lse_BNT: jax.Array,
    do_BTKGH: jax.Array,
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
    interpret: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the float32 cotangents of q, k and v for that of the output; arguments as those of `splash_forward`.

    Args:
        o_BTKGH, lse_BNT: what it returned.
        do_BTKGH: float32 cotangent of the output.
    """

    def pull(
        q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array, o: jax.Array, lse_BNT: jax.Array, do: Any
    ) -> tuple[jax.Array, ...]:
        operands = _operands(q, k, v, dtype, scale)
        H = q.shape[-1]
        shape = *q.shape[:2], -1, H
        kernel = _kernel(operands[0].shape, dtype, interpret, window)
        o_BNTH, do_BNTH = (jnp.swapaxes(x.astype(dtype).reshape(shape), 1, 2) for x in (o, do))

        def of_row(*row: Any) -> tuple[jax.Array, ...]:
            q, k, v, segments, o, lse, do = row
            mask = kernel.dq_mask_info, kernel.dkv_mask_info
            cotangents: Any = splash_attention_kernel._splash_attention_bwd(
                **kernel.kwargs, res=(q, k, v, segments, None, o, lse, *mask), do=do
            )
            return cotangents[3:6]

        segments = SegmentIds(segments_BT, segments_BT)
        dq_BNTH, dk_BKTH, dv_BKTH = jax.vmap(of_row)(*operands, segments, o_BNTH, lse_BNT, do_BNTH)
        dq, dk, dv = (jnp.swapaxes(d, 1, 2).astype(jnp.float32) for d in (dq_BNTH, dk_BKTH, dv_BKTH))
        return dq.reshape(q.shape) * (H**-0.5 if scale is None else scale), dk, dv

    q, kv, rows, lse = _specs(q_BTKGH.shape, mesh)
    run = _on_mesh(pull, mesh, (q, kv, kv, rows, q, lse, q), (q, kv, kv), dtype)
    return run(q_BTKGH, k_BTKH, v_BTKH, segments_BT, o_BTKGH, lse_BNT, do_BTKGH)


def _operands(
    q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, dtype: jnp.dtype, scale: float | None
) -> tuple[jax.Array, ...]:
    """Return q_BNTH, k_BKTH and v_BKTH; the kernel does not scale, and takes query head n to key/value head n // G."""
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH = (q_BTKGH * (H**-0.5 if scale is None else scale)).astype(dtype).reshape(B, T, K * G, H)
    return tuple(jnp.swapaxes(x.astype(dtype), 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))


def _kernel(
    shape_BNTH: tuple[int, ...], dtype: jnp.dtype, interpret: bool, window: int | None, save_residuals: bool = False
) -> Any:
    _, N, T, H = shape_BNTH
    mask = CausalMask((T, T)) if window is None else LocalMask((T, T), (window - 1, 0), 0)
    return make_splash_mha_single_device(
        MultiHeadMask([mask] * N),
        block_sizes=_block_sizes(T, H, dtype),
        save_residuals=save_residuals,
        interpret=interpret,
    )


def _specs(shape_BTKGH: tuple[int, ...], mesh: Mesh) -> tuple[PartitionSpec, ...]:
    """Return how q, k (and v), the segments and the log-sum-exp lie on a mesh."""
    q = sharding_for(("rows", None, "kv_heads", None, None), shape_BTKGH, mesh, "attention's queries").spec
    rows, heads = q[0], q[2]
    return q, PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None), PartitionSpec(rows, heads, None)


def _on_mesh(
    body: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, dtype: jnp.dtype
) -> Callable[..., Any]:
    """Return a function of whole arrays from one that each device runs on its own part of them."""

    def precise(*args: jax.Array) -> Any:
        # The kernel leaves the precision of float32 products to jax's setting.
        with jax.default_matmul_precision("highest"):
            return body(*args)

    return jax.shard_map(
        precise if dtype == jnp.float32 else body,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # the kernel does not say over which mesh axes its results vary
    )


def _block_sizes(T: int, H: int, dtype: jnp.dtype) -> BlockSizes:
    """Return how much of a row of T tokens the kernels work on at a time.

    The fused backward pass computes the scores once for dq, dk and dv, but leaves a dq for every block of keys, to be
    summed afterwards: T / block times the memory of q. So these blocks grow with T, and where they may grow no more
    dq gets a kernel of its own, which computes the scores again.
    """
    room = BLOCK_BYTES // (max(H, 128) * jnp.dtype(dtype).itemsize)
    block = _divisor(T, min(BLOCK, room))
    keys = _divisor(T, min(max(BLOCK, T // MOST_PARTIAL_DQ), room))
    fused = T // keys <= MOST_PARTIAL_DQ
    return BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=_divisor(block, STEP),
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=_divisor(keys, STEP),
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else _divisor(block, STEP),
        use_fused_bwd_kernel=fused,
    )


def _divisor(length: int, limit: int) -> int:
    """Return the largest multiple of 128, a register's lanes, that divides the length, up to the limit."""
    return max(size for size in range(128, limit + 1, 128) if length % size == 0)
