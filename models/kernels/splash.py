"""How does attention run on a TPU?

Through splash attention, the Pallas kernel that jax ships: it skips the blocks above the causal diagonal and holds one
block of scores at a time. XLA cannot split a kernel over a mesh, so it runs under `shard_map`, each device on its own
rows and key/value heads. The segments only mask: a row costs the same however many it holds.
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
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.sharding import Mesh, PartitionSpec

from jax_client.sharding import sharding_for

BLOCK = 1024  # queries, and keys, that are brought into VMEM at a time
STEP = 512  # keys per product: BLOCK x STEP float32 scores are 2 MiB
BLOCK_BYTES = 2**19  # most of a block of keys; the kernels with twice that do not fit the 16 MiB of VMEM on v4 and v5
MOST_PARTIAL_DQ = 8


def splash_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally within segments; differentiable by `jax.vjp`.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation. T is a multiple of 128; any
            H will do, and 128 fills the matrix unit.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id. Padding (0) is a segment
            like the others, so every token sees at least itself.
        dtype: of the matmul operands, and of what enters and leaves the kernel: the output and the cotangents of
            q, k and v are rounded to it.
        mesh: rows are split over its data and fsdp axes, key/value heads over its tensor axis.
        interpret: emulate the kernel on any platform, for tests; slow.

    Returns:
        o_BTKGH float32.

    Source: FlashAttention-2, arXiv 2307.08691; the kernel is jax.experimental.pallas.ops.tpu.splash_attention.
    """

    def attend(q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        B, T, K, G, H = q_BTKGH.shape
        # The kernel does not scale, and takes query head n to key/value head n // G.
        q_BNTH = jnp.swapaxes((q_BTKGH * H**-0.5).astype(dtype).reshape(B, T, K * G, H), 1, 2)
        k_BKTH, v_BKTH = (jnp.swapaxes(x.astype(dtype), 1, 2) for x in (k_BTKH, v_BTKH))
        mask = MultiHeadMask([CausalMask((T, T))] * (K * G))
        kernel = make_splash_mha_single_device(mask, block_sizes=_block_sizes(T, H, dtype), interpret=interpret)
        o_BNTH: Any = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, SegmentIds(segments_BT, segments_BT))
        return jnp.swapaxes(o_BNTH, 1, 2).reshape(q_BTKGH.shape).astype(jnp.float32)

    q_spec = sharding_for(("rows", None, "kv_heads", None, None), q_BTKGH.shape, mesh, "attention's queries").spec
    rows, heads = q_spec[0], q_spec[2]
    kv_spec = PartitionSpec(rows, None, heads, None)
    run = jax.shard_map(
        _fully_precise(attend) if dtype == jnp.float32 else attend,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(rows, None)),
        out_specs=q_spec,
        check_vma=False,  # the kernel does not say over which mesh axes its results vary
    )
    return run(q_BTKGH, k_BTKH, v_BTKH, segments_BT)


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


def _fully_precise(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `attend` with float32 products at full precision, which the kernel leaves to jax's setting.

    The setting counts when a product is traced. Those of the backward pass are traced when the caller pulls back, long
    after a `with` around the forward pass has ended: hence a rule of our own.
    """
    setting = partial(jax.default_matmul_precision, "highest")

    @jax.custom_vjp
    def precise(*args: jax.Array) -> jax.Array:
        with setting():
            return attend(*args)

    def forward(*args: jax.Array) -> tuple[jax.Array, Any]:
        with setting():
            return jax.vjp(attend, *args)

    def backward(pull: Any, do: jax.Array) -> Any:
        with setting():
            return pull(do)

    precise.defvjp(forward, backward)
    return precise
