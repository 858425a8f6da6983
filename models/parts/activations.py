"""Which gated activations are there, and what are their backward passes?

An `Activation` is a pair of functions of the raw gate and up, which are all that a feed-forward keeps of it. Both
compute in float32. The tests compare the backward ones with `jax.vjp` of the forward ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """What stands between the matrices in and the matrix out of a gated feed-forward.

    Attributes:
        name: for messages.
        forward: `forward(gate, up) -> a`, of arrays of one shape; the result is float32.
        backward: `backward(da, gate, up) -> (a, dgate, dup)`, float32: the activated values once more, and the
            cotangents for that of them.
    """

    name: str
    forward: Callable[[jax.Array, jax.Array], jax.Array]
    backward: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def activation_of(c: ModelConfig) -> Activation:
    """Return the activation of a model's MLPs and experts."""
    if c.clamp is not None:
        return clamped_swiglu(c.clamp.limit, c.clamp.alpha)
    return {"swiglu": swiglu, "geglu": geglu}[c.activation]()


def swiglu() -> Activation:
    """Return silu(gate) * up. Source: arXiv 2002.05202."""

    def forward(gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)

    def backward(da: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        da, gate, up = _float32(da, gate, up)
        sigmoid = jax.nn.sigmoid(gate)
        dgate = da * up * sigmoid * (1 + gate * (1 - sigmoid))
        return gate * sigmoid * up, dgate, da * gate * sigmoid

    return Activation(name="swiglu", forward=forward, backward=backward)


def clamped_swiglu(limit: float = 7.0, alpha: float = 1.702) -> Activation:
    """Return g * sigmoid(alpha * g) * (u + 1) of g = min(gate, limit) and u = up within +-limit.

    A value beyond its limit has no gradient; one at it has. Source: gpt-oss, arXiv 2508.10925.
    """

    def parts(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        g, u = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return g, jax.nn.sigmoid(alpha * g), u + 1

    def forward(gate: jax.Array, up: jax.Array) -> jax.Array:
        g, sigmoid, u1 = parts(*_float32(gate, up))
        return g * sigmoid * u1

    def backward(da: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        da, gate, up = _float32(da, gate, up)
        g, sigmoid, u1 = parts(gate, up)
        dgate = jnp.where(gate <= limit, da * u1 * sigmoid * (1 + alpha * g * (1 - sigmoid)), 0)
        return g * sigmoid * u1, dgate, jnp.where(jnp.abs(up) <= limit, da * g * sigmoid, 0)

    return Activation(name="clamped swiglu", forward=forward, backward=backward)


def geglu() -> Activation:
    """Return gelu(gate) * up, with gelu's approximation by a tanh. Source: arXiv 2002.05202 and 1606.08415."""
    slope, cubic = math.sqrt(2 / math.pi), 0.044715

    def forward(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = _float32(gate, up)
        return jax.nn.gelu(gate, approximate=True) * up

    def backward(da: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        da, gate, up = _float32(da, gate, up)
        tanh = jnp.tanh(slope * (gate + cubic * gate**3))
        gelu = 0.5 * gate * (1 + tanh)
        dgelu = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope * (1 + 3 * cubic * gate * gate)
        return gelu * up, da * up * dgelu, da * gelu

    return Activation(name="geglu", forward=forward, backward=backward)


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.float32) for x in arrays)
