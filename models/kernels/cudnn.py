"""How does attention run on an NVIDIA GPU?

Through cuDNN's fused attention over packed sequences, which spends nothing on the scores between two segments. jax
reaches it by a private function, whose contract is:

- q_seqlen, kv_seqlen (B, M) int32: the length of each segment of a row; q_offsets, kv_offsets (B, M + 1) int32: where
  in its row it begins. jax then joins the rows: it drops the negative entries of each list and takes the n-th length
  and the n-th offset that are left for the n-th segment. So unused entries are -1 in both, always the last offset too.
- M = 1 means "not packed" to it, and the offsets go unread.
- bfloat16 or float16; H a multiple of 8, up to 256; Hopper or later: else NotImplementedError, while it is traced. No
  cuDNN: RuntimeError. Unchecked: cuDNN 9.6 or later, and offsets count elements in int32, so a device's B x T x N x H
  stays below 2**31.
- it never writes the memory outside every segment, neither in the output nor in the cotangents.
- its softmax statistics are (B x M, N, T) float32, M times their content: keep M near the segments that a row has.
- it takes lengths and offsets of all rows to be split over devices as the queries are, and cannot see to it: so it runs
  under `jax.shard_map`, each device on its own rows and key/value heads.
- the backward pass over packed rows read memory that nothing had written before cuDNN 9.18, on Hopper.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import Mesh, PartitionSpec

from jax_client.sharding import sharding_for

FIRST_RIGHT = 91800  # cuDNN, as `fused.check_cudnn_version` counts
GQA_FIXED = (0, 11, 1)  # older jax silently reads the wrong keys where K < N (its pull request 39521)


def refuse_old_cudnn() -> None:
    """Raise RuntimeError without a cuDNN, or with one whose backward pass over packed rows is not to be trusted."""
    version = fused.check_cudnn_version()
    if version < FIRST_RIGHT:
        found, needed = (f"{v // 10_000}.{v // 100 % 100}.{v % 100}" for v in (version, FIRST_RIGHT))
        raise RuntimeError(
            f"cuDNN is {found}, whose gradients of packed rows may be wrong on some GPUs; install {needed} or later "
            "(nvidia-cudnn-cu12 or -cu13)."
        )


def cudnn_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
    max_segments: int,
    scale: float | None = None,
) -> jax.Array:
    """Attend causally within segments; differentiable by `jax.vjp`.

    Args:
        q_BTKGH, k_BTKH, v_BTKH: float32 queries, keys and values after norm and rotation.
        segments_BT: int32; a token sees the earlier tokens of its row with its own segment id. A segment's tokens stand
            next to each other. 0 is padding, anywhere in the row.
        dtype: of the matmul operands, bfloat16 or float16; the output and the cotangents are rounded to it.
        mesh: rows are split over its data and fsdp axes, key/value heads over its tensor axis.
        max_segments: the most segments that a row may have, padding not counted. The tokens of a further one are NaN.
        scale: of the scores; None for 1 / sqrt(H).

    Returns:
        o_BTKGH float32; 0 at padding, and so are the cotangents of q, k and v.

    Source: FlashAttention-2, arXiv 2307.08691, as built into cuDNN.
    """
    q = sharding_for(("rows", None, "kv_heads", None, None), q_BTKGH.shape, mesh, "attention's queries").spec
    kv, rows = PartitionSpec(q[0], None, q[2], None), PartitionSpec(q[0], None)
    factor = q_BTKGH.shape[-1] ** -0.5 if scale is None else scale
    attend = partial(_attend, dtype=dtype, M=max(max_segments, 2), scale=factor)
    run = jax.shard_map(attend, mesh=mesh, in_specs=(q, kv, kv, rows), out_specs=q, check_vma=False)
    return run(q_BTKGH, k_BTKH, v_BTKH, segments_BT)


def _attend(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    M: int,
    scale: float,
) -> jax.Array:
    """Attend on one device; M is the most segments of a row, at least 2."""
    B, T, K, G, H = q_BTKGH.shape
    lengths_BM, offsets_BM, number_BT = _segment_places(segments_BT, M)
    number_BT11 = number_BT[..., None, None]

    def operand(x_BTNH: jax.Array) -> jax.Array:
        # For the cotangent's sake: it is selected in turn, which drops a NaN that a product with zero would keep.
        return jnp.where(number_BT11 >= 0, x_BTNH, 0).astype(dtype)

    if jax.__version_info__ < GQA_FIXED:
        # Repeated before the cast, so that the group's dk and dv are summed in float32.
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, G, axis=2), jnp.repeat(v_BTKH, G, axis=2)
    o_BTNH: Any = fused.dot_product_attention(
        operand(q_BTKGH.reshape(B, T, K * G, H)),
        operand(k_BTKH),
        operand(v_BTKH),
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=scale,
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )
    o_BTNH = jnp.where(number_BT11 >= 0, o_BTNH.astype(jnp.float32), 0)
    return jnp.where(number_BT11 < M, o_BTNH, jnp.nan).reshape(q_BTKGH.shape)


def _segment_places(segments_BT: jax.Array, M: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return where the segments of each row lie, int32, as `fused.dot_product_attention` wants it.

    Returns:
        lengths (B, M) and offsets (B, M + 1), -1 where unused, and which segment of its row each token is in (B, T), -1
        at padding.
    """
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    begins_BT = (segments_BT != before_BT) & (segments_BT != 0)
    number_BT = jnp.where(segments_BT != 0, jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32) - 1, -1)
    own_BTM = number_BT[..., None] == jnp.arange(M, dtype=jnp.int32)
    lengths_BM = jnp.sum(own_BTM, axis=1, dtype=jnp.int32)
    offsets_BM = jnp.argmax(own_BTM, axis=1).astype(jnp.int32)  # of the first that is true
    used_BM = lengths_BM > 0
    ends = ((0, 0), (0, 1))
    return (
        jnp.where(used_BM, lengths_BM, -1),
        jnp.pad(jnp.where(used_BM, offsets_BM, -1), ends, constant_values=-1),
        number_BT,
    )
