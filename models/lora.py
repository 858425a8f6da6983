"""How does an adapter add to a frozen linear layer, forwards and backwards?

y = x W + s (x A) B with s = alpha / rank. A is stored (R, in) and B (R, out...), so that the products of the pair
contract their operands' last axes, or the right one's first: the orientations that keep every backend's fast path.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jax_client.models.layers import contract

Adapter = Mapping[str, Mapping[str, jax.Array]]
Pair = tuple[jax.Array, jax.Array]  # A (R, I) and B (R, O) of one matmul

# LoRA's alpha is fixed; only the rank is a user's choice.
LORA_ALPHA = 32.0


def lora_scale(a: jax.Array) -> float:
    """Return alpha / rank of the adapter whose A (R, ...) is given."""
    return LORA_ALPHA / a.shape[0]


def adapter_scale(lora: Adapter) -> float:
    """Return alpha / rank of a layer's adapter; 1 where it has none."""
    return next((lora_scale(module["A"]) for module in lora.values()), 1.0)


def layer_pairs(lora: Adapter) -> dict[str, Pair]:
    """Return (A, B) of each matmul of a layer that the adapter covers: qkv, o, gate, up and down.

    The fused projection q|k|v has the three A's on top of each other (3R, D) and the B's in the blocks of a
    (3R, K * J * H) matrix that is zero elsewhere. Linear in the adapter, so its transpose turns gradients back.
    """
    pairs = {}
    if "q" in lora:
        a_RD = jnp.concatenate([lora[name]["A"] for name in "qkv"])
        q, k, v = lora["q"]["B"], lora["k"]["B"][:, :, None], lora["v"]["B"][:, :, None]
        group = q.shape[2]
        places = ((q, 0, 2), (k, group, 1), (v, group + 1, 0))
        b_RKJH = jnp.concatenate([jnp.pad(b, ((0, 0), (0, 0), (before, after), (0, 0))) for b, before, after in places])
        pairs["qkv"] = (a_RD, b_RKJH.reshape(len(b_RKJH), -1))
    if "o" in lora:
        a_RKGH, b_RD = lora["o"]["A"], lora["o"]["B"]
        pairs["o"] = (a_RKGH.reshape(len(a_RKGH), -1), b_RD)
    return pairs | {name: (lora[name]["A"], lora[name]["B"]) for name in ("gate", "up", "down") if name in lora}


def linear(x_MI: jax.Array, w_IO: jax.Array, pair: Pair | None, scale: float, dtype: jnp.dtype) -> jax.Array:
    """Return x W + scale (x A) B, float32 (M, O); only x W for no pair."""
    y_MO = contract("MI,IO->MO", x_MI, w_IO, dtype)
    if pair is None:
        return y_MO
    a_RI, b_RO = pair
    return y_MO + contract("MR,RO->MO", contract("MI,RI->MR", x_MI, a_RI, dtype) * scale, b_RO, dtype)


def linear_backward(
    dy_MO: jax.Array,
    x_MI: jax.Array,
    w_IO: jax.Array,
    pair: Pair | None,
    scale: float,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Pair | None]:
    """Return dx (M, I) and the gradients of (A, B), float32; the frozen W gets none.

    The two narrow products with x and dy are computed twice, once in each orientation: cheaper than a matmul that
    contracts the left operand's first axis, which falls off the bfloat16 path on a CPU.
    """
    dx_MI = contract("MO,IO->MI", dy_MO, w_IO, dtype)
    if pair is None:
        return dx_MI, None
    a_RI, b_RO = pair
    u_RM = contract("RI,MI->RM", a_RI, x_MI, dtype) * scale
    du_RM = contract("RO,MO->RM", b_RO, dy_MO, dtype) * scale
    du_MR = contract("MO,RO->MR", dy_MO, b_RO, dtype) * scale
    grads = (contract("RM,MI->RI", du_RM, x_MI, dtype), contract("RM,MO->RO", u_RM, dy_MO, dtype))
    return dx_MI + contract("MR,RI->MI", du_MR, a_RI, dtype), grads
