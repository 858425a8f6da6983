"""How does an adapter add to a frozen linear layer, forwards and backwards?

y = x W + s (x A) B with s = alpha / rank. A is stored (R, in) and B (R, out...), so that every product of the pair
contracts trailing or leading axes without a transpose. Adapters of fused layers stay separate tensors; their A's run
as one matmul.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract

Adapter = Mapping[str, Mapping[str, jax.Array]]

# LoRA's alpha is fixed; only the rank is a user's choice.
LORA_ALPHA = 32.0


def lora_scale(a: jax.Array) -> float:
    """Return alpha / rank of the adapter whose A (R, ...) is given."""
    return LORA_ALPHA / a.shape[0]


def lora_down(x_BTI: jax.Array, lora: Adapter, names: Sequence[str], dtype: jnp.dtype) -> jax.Array | None:
    """Return u (B, T, n, R) = s (x A) of the named modules, or None when the adapter does not cover them."""
    if names[0] not in lora:
        return None
    a_nRI = jnp.stack([lora[name]["A"] for name in names])
    return contract("BTI,nRI->BTnR", x_BTI, a_nRI, dtype) * lora_scale(a_nRI[0])


def lora_up(u_BTnR: jax.Array, lora: Adapter, names: Sequence[str], dtype: jnp.dtype) -> list[jax.Array]:
    """Return u B of each named module, float32, in the shape of its output."""
    return [
        contract("BTR,RO->BTO", u_BTnR[:, :, i], _flat(lora[name]["B"]), dtype).reshape(
            *u_BTnR.shape[:2], *lora[name]["B"].shape[1:]
        )
        for i, name in enumerate(names)
    ]


def lora_backward(
    x_BTI: jax.Array,
    u_BTnR: jax.Array,
    dys: Sequence[jax.Array],
    lora: Adapter,
    names: Sequence[str],
    dtype: jnp.dtype,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Return the adapters' part of dx (B, T, I), and the gradients of A and B by module name.

    Args:
        x_BTI: the layer's input, as in the forward pass.
        u_BTnR: what `lora_down` returned.
        dys: the cotangent of each module's output.
    """
    grads: dict[str, dict[str, jax.Array]] = {}
    dus = []
    for i, (name, dy) in enumerate(zip(names, dys, strict=True)):
        b = lora[name]["B"]
        dy_BTO = dy.reshape(*dy.shape[:2], -1)
        grads[name] = {"B": contract("BTR,BTO->RO", u_BTnR[:, :, i], dy_BTO, dtype).reshape(b.shape)}
        dus.append(contract("BTO,RO->BTR", dy_BTO, _flat(b), dtype))
    a_nRI = jnp.stack([lora[name]["A"] for name in names])
    du_BTnR = jnp.stack(dus, axis=2) * lora_scale(a_nRI[0])
    da_nRI = contract("BTnR,BTI->nRI", du_BTnR, x_BTI, dtype)
    for i, name in enumerate(names):
        grads[name]["A"] = da_nRI[i]
    return contract("BTnR,nRI->BTI", du_BTnR, a_nRI, dtype), grads


def _flat(b: jax.Array) -> jax.Array:
    return b.reshape(b.shape[0], -1)
