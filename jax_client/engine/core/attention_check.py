"""Which attention does an engine run, and can it be trusted on packed rows?

A vendor's kernel is the fastest, but kernels have ignored segments before, silently. So each start compares it with the
plain one on small packed rows, on the device at hand, forwards and backwards, in memory that holds NaN before: what a
kernel reads and nothing has written then shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.models.config import ModelConfig
from jax_client.models.parts.attention import Attention, blockwise, cudnn, splash
from jax_client.sharding import put_rows, replicated

logger = logging.getLogger(__name__)

# Documents of two rows of every way, of which the first ends in padding and the second does not.
PROBE_LENGTHS = ((70, 1, 100, 213), (300, 212))
PROBE_ROW = 512
# Largest gap between two bfloat16 attentions, relative to the largest value. Leaking one document into the next, or
# dropping the scale, gives 0.3 and more.
TOLERANCE = 0.03
POISON = 2**24  # floats, 64 MiB: the arrays and workspaces of the probe have room in it


def choose_attention(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> Attention:
    """Return the platform's kernel where there is one and `agrees` with the blockwise attention, else the latter."""
    candidate, plain = kernel_of(mesh, dtype), plain_attention(mesh)
    return candidate if candidate is not None and agrees(candidate, plain, mesh, model, dtype) else plain


def plain_attention(mesh: Mesh) -> Attention:
    """Return the attention that runs everywhere."""
    return blockwise(one_cpu=mesh.size == 1 and mesh.devices.flat[0].platform == "cpu")


def kernel_of(mesh: Mesh, dtype: jnp.dtype) -> Attention | None:
    """Return the kernel of the mesh's platform, unchecked; None where there is none."""
    platform = mesh.devices.flat[0].platform
    make: Callable[[], Attention] | None = None
    if dtype == jnp.bfloat16 and platform == "tpu":
        make = partial(splash, mesh)
    elif dtype == jnp.bfloat16 and platform == "gpu":
        make = partial(cudnn, mesh)
    if make is None:
        return None
    try:
        return make()
    except Exception as error:  # such as a private module that a newer jax no longer has
        logger.warning("the %s kernel for attention cannot be loaded: %s", platform, error)
        return None


def agrees(candidate: Attention, plain: Attention, mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> bool:
    """Return whether two attentions give the same outputs and gradients on packed rows; log a warning if not."""
    try:
        gap = _largest_gap(candidate, plain, mesh, model, dtype)
    except Exception as error:  # whatever a kernel raises on this device, there is one that works
        logger.warning("attention %s does not run here, using %s: %s", candidate.name, plain.name, error)
        return False
    if not gap <= TOLERANCE:
        logger.warning("attention %s is off by %.3g on a packed row, using %s", candidate.name, gap, plain.name)
        return False
    return True


def _largest_gap(candidate: Attention, plain: Attention, mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> float:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ways * len(PROBE_LENGTHS)
    K, G, H = model.n_kv_heads, model.group, model.head_dim
    rng = np.random.default_rng(0)
    each = [np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), row) for row in PROBE_LENGTHS]
    segments_BT = np.tile([np.pad(ids, (0, PROBE_ROW - len(ids))) for ids in each], (ways, 1))
    shapes = [(rows, PROBE_ROW, K, G, H), (rows, PROBE_ROW, K, H), (rows, PROBE_ROW, K, H), (rows, PROBE_ROW, K, G, H)]
    q, k, v, do = (put_rows(rng.normal(size=shape).astype(np.float32), mesh) for shape in shapes)
    segments = put_rows(segments_BT, mesh)
    real = segments_BT > 0

    def run(attention: Attention) -> list[np.ndarray]:
        def both(*args: jax.Array) -> tuple[jax.Array, ...]:
            q, k, v, segments, do = args
            o, residual = attention.forward(q, k, v, segments, dtype)
            return o, *attention.backward(q, k, v, segments, o, residual, do, dtype)

        do_real = do * real.reshape(*real.shape, 1, 1, 1)  # as in training: nothing flows back from padding
        compiled = jax.jit(both).lower(q, k, v, segments, do_real).compile()
        _poison(mesh)
        return [np.asarray(a, np.float32)[real] for a in compiled(q, k, v, segments, do_real)]

    pairs = zip(run(candidate), run(plain), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def _poison(mesh: Mesh) -> None:
    """Fill memory that the next program gets with NaN, where an accelerator gives freed memory out again."""
    if mesh.devices.flat[0].platform != "cpu":
        jax.block_until_ready([jnp.full(POISON, jnp.nan, device=replicated(mesh)) for _ in range(4)])
