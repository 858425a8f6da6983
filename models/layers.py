"""What are the small pieces of a decoder layer: matmul, norm?

They are pure functions of arrays. All of them compute in float32, except that a matmul's operands have the matmul type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


def contract(
    spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype, out: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Return einsum(spec, x, y) with operands in `dtype`, float32 accumulation, and the result in `out`.

    bfloat16 operands with a float32 result are the tensor-core and MXU path; float32 operands ask for full precision,
    because TPU and NVIDIA default to less. A product written as autodiff's transpose would get a float32 cotangent and
    lose the fast path, so the backward passes call this too.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=out, precision=precision)


def to_bits(tree: Any) -> Any:
    """Return the tree with bfloat16 arrays as their uint16 bit patterns, for what only moves data on a CPU.

    XLA's CPU backend has no bfloat16 slices, gathers and updates: it would convert whole stacks of layers to float32
    and back. Base weights are kept this way, too, since the change of type itself is a copy there.
    """
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a, tree)


def from_bits(tree: Any) -> Any:
    """Undo `to_bits`."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, tree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class InStack:
    """One layer's array, still in the stack of all layers (L, E, ...), bfloat16 perhaps as its bits.

    A slice of a stack is a copy of a layer. Where a layer has many matrices and a product takes one, only that is cut.
    """

    stack: jax.Array
    layer: jax.Array

    def cut(self, e: jax.Array) -> jax.Array:
        """Return entry e of the layer's array."""
        start = (self.layer, e, *(0,) * (self.stack.ndim - 2))
        return from_bits(jax.lax.dynamic_slice(self.stack, start, (1, 1, *self.stack.shape[2:]))[0, 0])


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scale the last axis of x to unit root mean square, times `weight`; float32 throughout."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


@jax.named_scope("norm")
def rms_norm_backward(x: jax.Array, weight: jax.Array, eps: float, g: jax.Array) -> jax.Array:
    """Return the cotangent of x for the cotangent g of `rms_norm(x)`; the weight is frozen."""
    x = x.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    g = g * weight
    return r * (g - x * (r * r) * jnp.mean(x * g, axis=-1, keepdims=True))
