"""How do a layer's matmuls run with an adapter, or with the adapters of many rows?

`Linears` serves training: one adapter, forwards and backwards. `MixedLinears` serves sampling: each row has its own
adapter, and there is no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.parts.kind import Context, Kind, Saved
from jax_client.models.parts.lora import (
    Adapter,
    Pair,
    Parts,
    adapter_scale,
    linear,
    linear_backward,
    mix,
    side_by_side,
)

# The matmuls whose outputs an accelerator rounds; of the others it is the cotangents of the inputs.
ROUNDED = ("qkv", "gate_up", "qkvz", "shared_gate_up")
# Those whose inputs are split over devices.
SUMMED = ("o", "down", "out", "shared_down")


class Linears:
    """A part's matmuls with their adapters. Collects each one's u (see `lora.linear`) and gradients by name.

    Args:
        kind: of the part.
        lora: the modules that the adapter has there.
        c: what all layers of the pass share.
        us: of the forward pass.
    """

    def __init__(self, kind: Kind, lora: Adapter, c: Context, us: Saved | None = None):
        self._pairs, self._pairs_vjp = jax.vjp(kind.pairs, lora)
        self._scale = adapter_scale(lora)
        self._dtype, self._one_cpu = c.dtype, c.one_cpu
        self._rounded = c.dtype if c.accelerator else jnp.dtype(jnp.float32)
        self._grads: dict[str, Pair] = {}
        self.us: Saved = {} if us is None else us

    def forward(self, name: str, x_MI: jax.Array, *ws_IO: jax.Array, parts: Parts | None = None) -> list[jax.Array]:
        """Return x W with the adapter's part of each output (M, O), float32 or as `Context.accelerator` says."""
        out = self._rounded if name in ROUNDED else jnp.float32
        ys_MO, u_Mn = linear(x_MI, ws_IO, self._pairs.get(name), self._scale, self._dtype, parts, out)
        if u_Mn is not None:
            self.us[f"u_{name}"] = u_Mn
        return ys_MO

    def backward(
        self,
        name: str,
        dys_MO: list[jax.Array],
        x_MI: jax.Array,
        *ws_IO: jax.Array,
        whole_MO: jax.Array | None = None,
    ) -> jax.Array:
        """Return the cotangent of x (M, I) for those of the outputs, and of the `whole_MO` that they are parts of."""
        u_Mn, pair = self.us.get(f"u_{name}"), self._pairs.get(name)
        out = jnp.float32 if name in ROUNDED else self._rounded
        options: Any = {"one_cpu": self._one_cpu, "whole_MO": whole_MO, "out": out}
        dx_MI, grad = linear_backward(dys_MO, x_MI, u_Mn, ws_IO, pair, self._scale, self._dtype, **options)
        if grad is not None:
            self._grads[name] = grad
        return dx_MI

    def pair(self, name: str) -> Pair | None:
        """Return the pair of a matmul, None where the adapter does not cover it."""
        return self._pairs.get(name)

    def scale(self, name: str) -> float | jax.Array:
        """Return what u (M, n) of a matmul is multiplied by."""
        return self._scale

    def put_grad(self, name: str, grad: Pair) -> None:
        """Note the gradient of the pair of a matmul that a kind computes itself."""
        self._grads[name] = grad

    def adapter_grads(self) -> dict[str, dict[str, jax.Array]]:
        """Return the collected gradients by the adapter's own modules."""
        return self._pairs_vjp(self._grads)[0]


class MixedLinears:
    """A part's matmuls for rows of different adapters, forwards only.

    Args:
        pairs: by matmul, from `mixed_pairs`.
        scale_MV: float32; alpha / rank in the column of a row's adapter, else 0.
        dtype: of the matmul operands.
        total: sums the outputs of `SUMMED` over the devices that have a part of their inputs each.
        accelerator: as of the `Context`.
    """

    def __init__(
        self,
        pairs: dict[str, Pair],
        scale_MV: jax.Array,
        dtype: jnp.dtype,
        total: Callable[[jax.Array], jax.Array] = lambda y_MD: y_MD,
        *,
        accelerator: bool = False,
    ):
        self._rounded = dtype if accelerator else jnp.dtype(jnp.float32)
        self.total = total
        self._pairs = pairs
        self._scale_MV = scale_MV
        self._dtype = dtype
        self.us: Saved = {}

    def forward(self, name: str, x_MI: jax.Array, *ws_IO: jax.Array, parts: Parts | None = None) -> list[jax.Array]:
        """Return x W with each row's own adapter's part of each output (M, O), typed as by `Linears`."""
        out = self._rounded if name in ROUNDED else jnp.float32
        ys_MO, _ = linear(x_MI, ws_IO, self.pair(name), self.scale(name), self._dtype, parts, out)
        return [self.total(y_MO) for y_MO in ys_MO] if name in SUMMED else ys_MO

    def pair(self, name: str) -> Pair | None:
        """Return the pair of a matmul, None where no adapter covers it."""
        return self._pairs.get(name)

    def scale(self, name: str) -> float | jax.Array:
        """Return what u (M, n) of a matmul is multiplied by."""
        pair = self.pair(name)
        return 0.0 if pair is None else mix(self._scale_MV, pair)


def mixed_pairs(kind: Kind, loras: Sequence[Adapter], dtype: jnp.dtype) -> dict[str, Pair]:
    """Return the pairs of a part's matmuls for several adapters of the same modules, in the matmul type."""
    layers = [kind.pairs(lora) for lora in loras]
    pairs = {name: side_by_side([layer[name] for layer in layers]) for name in (layers[0] if layers else ())}
    return jax.tree.map(lambda a: a.astype(dtype), pairs)
