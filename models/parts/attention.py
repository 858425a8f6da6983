"""Which attention does a pass run, and what do layers ask of it?

An `Attention` is a pair of functions, since the layers' backward pass is written by hand. The forward one also returns
what the backward one needs besides the inputs and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.models.kernels.blockwise import blockwise_backward, blockwise_forward

# The vendors' kernels take rows in multiples of this; shorter prompts go blockwise.
KERNEL_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Causal attention within segments, forwards and backwards.

    Attributes:
        name: for `describe()` and the log.
        forward: `forward(q_BTKGH, k_BTKH, v_BTKH, segments_BT, dtype) -> (o_BTKGH, residual)`, float32.
        backward: `backward(q, k, v, segments, o, residual, do, dtype) -> (dq, dk, dv)`, float32.
        row_length: longest row that several sequences should share. None: the work follows the segments' lengths and
            not the row's, so a long row of short ones is cheap.
        max_segments: most segments of a row; None for any number.
    """

    name: str
    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    row_length: int | None
    max_segments: int | None = None


def blockwise(one_cpu: bool) -> Attention:
    """Return the attention that runs everywhere, in plain JAX; `one_cpu` as for its functions."""

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: jnp.dtype) -> Any:
        return blockwise_forward(q, k, v, segments, dtype, one_cpu=one_cpu)

    def backward(*args: Any) -> Any:
        return blockwise_backward(*args, one_cpu=one_cpu)

    return Attention(name="blockwise", forward=forward, backward=backward, row_length=None if one_cpu else 2048)


def splash(mesh: Mesh, interpret: bool = False) -> Attention:
    """Return the TPU's kernel."""
    # Here and below: only the platform that runs a kernel imports it, for Pallas is large and cuDNN's part is private.
    from jax_client.models.kernels.splash import splash_attention

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return splash_attention(q, k, v, segments, dtype=dtype, mesh=mesh, interpret=interpret)

    return _from_kernel("splash", kernel, row_length=2048)


def cudnn(max_segments: int = 64) -> Attention:
    """Return NVIDIA's kernel, for bfloat16 on one device.

    Its softmax statistics take (rows, segments, heads, row length): both limits keep them small.
    """
    from jax_client.models.kernels.cudnn import cudnn_attention

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return cudnn_attention(q, k, v, segments, dtype=dtype, max_segments=max_segments)

    return _from_kernel("cudnn", kernel, row_length=4096, max_segments=max_segments)


def _from_kernel(name: str, kernel: Callable[..., jax.Array], **limits: Any) -> Attention:
    """Wrap a kernel that brings its own derivative.

    Both directions trace `jax.vjp`, and so the same forward kernel: where a layer is recomputed in the program of its
    backward pass, XLA keeps one of the two.
    """
    fallback = blockwise(one_cpu=False)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: jnp.dtype) -> Any:
        if q.shape[1] % KERNEL_ROWS:
            return fallback.forward(q, k, v, segments, dtype)
        return jax.vjp(lambda *qkv: kernel(*qkv, segments, dtype), q, k, v)[0], ()

    def backward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array,
        o: jax.Array,
        residual: Any,
        do: jax.Array,
        dtype: Any,
    ) -> Any:
        if q.shape[1] % KERNEL_ROWS:
            return fallback.backward(q, k, v, segments, o, residual, do, dtype)
        return jax.vjp(lambda *qkv: kernel(*qkv, segments, dtype), q, k, v)[1](do)

    return Attention(name=name, forward=forward, backward=backward, **limits)
