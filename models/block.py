"""What does one decoder layer compute, and what is its backward pass?

Written by hand, because that decides what is kept: only the inputs of the matmuls and of the attention, in the matmul
type; norms, rotations and the gated activation are recomputed from them. Frozen weights get no gradient. The tests
compare it with `jax.vjp` of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.attention import attention_backward, attention_forward
from jax_client.models.config import ModelConfig
from jax_client.models.layers import contract, rms_norm, rms_norm_backward, rotate
from jax_client.models.lora import Adapter, lora_backward, lora_down, lora_up

QKV = ("q", "k", "v")
GATE_UP = ("gate", "up")
Saved = dict[str, Any]
# From rotated q_BTKGH, k_BTKH and v_BTKH to (o_BTKGH, anything the caller wants to keep).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every layer of a pass shares: the model, the matmul type and the rotary table (B, T, H/2)."""

    config: ModelConfig
    dtype: jnp.dtype
    cos_BTH: jax.Array
    sin_BTH: jax.Array


def _heads(qkv_BTKJH: jax.Array, w: dict[str, jax.Array], c: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split the fused projection; normalise (Qwen3) and rotate the queries and keys. Cheap: no matmul."""
    group = c.config.group
    q, k, v = qkv_BTKJH[..., :group, :], qkv_BTKJH[..., group, :], qkv_BTKJH[..., group + 1, :]
    if c.config.qk_norm:
        q, k = rms_norm(q, w["q_norm_LH"], c.config.norm_eps), rms_norm(k, w["k_norm_LH"], c.config.norm_eps)
    return rotate(q, c.cos_BTH, c.sin_BTH), rotate(k, c.cos_BTH, c.sin_BTH), v


def layer_forward(
    x_BTD: jax.Array, w: dict[str, jax.Array], lora: Adapter, c: Context, attend: Attend
) -> tuple[jax.Array, Saved, Any]:
    """Apply one layer.

    Args:
        x_BTD: float32 residual stream.
        w: the layer's parameters, as in `decoder.Layers` without the leading axis.
        lora: the layer's adapters by module name; empty for the base model.
        attend: the attention to use: over the row (training, prefill) or over a cache (decoding).

    Returns:
        The new residual stream, what `layer_backward` needs, and what `attend` gave to keep.
    """
    h_BTD = rms_norm(x_BTD, w["attn_norm_LD"], c.config.norm_eps)
    qkv_BTKJH = contract("BTD,DKJH->BTKJH", h_BTD, w["qkv_LDKJH"], c.dtype)
    if c.config.qkv_bias:
        qkv_BTKJH += w["qkv_bias_LKJH"]
    u_qkv = lora_down(h_BTD, lora, QKV, c.dtype)
    if u_qkv is not None:
        dq, dk, dv = lora_up(u_qkv, lora, QKV, c.dtype)
        qkv_BTKJH += jnp.concatenate([dq, dk[..., None, :], dv[..., None, :]], axis=-2)
    o_BTKGH, kept = attend(*_heads(qkv_BTKJH, w, c))
    x2_BTD = x_BTD + contract("BTKGH,KGHD->BTD", o_BTKGH, w["o_LKGHD"], c.dtype)
    o_BTI = o_BTKGH.reshape(*o_BTKGH.shape[:2], -1)
    u_o = lora_down(o_BTI, _flat_a(lora, "o"), ("o",), c.dtype)
    if u_o is not None:
        x2_BTD += lora_up(u_o, lora, ("o",), c.dtype)[0]

    h2_BTD = rms_norm(x2_BTD, w["mlp_norm_LD"], c.config.norm_eps)
    gate_up_BT2F = contract("BTD,DcF->BTcF", h2_BTD, w["gate_up_LD2F"], c.dtype)
    u_gate_up = lora_down(h2_BTD, lora, GATE_UP, c.dtype)
    if u_gate_up is not None:
        gate_up_BT2F += jnp.stack(lora_up(u_gate_up, lora, GATE_UP, c.dtype), axis=2)
    a_BTF = jax.nn.silu(gate_up_BT2F[:, :, 0]) * gate_up_BT2F[:, :, 1]
    y_BTD = x2_BTD + contract("BTF,FD->BTD", a_BTF, w["down_LFD"], c.dtype)
    u_down = lora_down(a_BTF, lora, ("down",), c.dtype)
    if u_down is not None:
        y_BTD += lora_up(u_down, lora, ("down",), c.dtype)[0]

    saved = {
        "x": x_BTD,
        "qkv": qkv_BTKJH,
        "o": o_BTKGH,
        "x2": x2_BTD,
        "gate_up": gate_up_BT2F,
        "u": [u for u in (u_qkv, u_o, u_gate_up, u_down) if u is not None],
    }
    return y_BTD, jax.tree.map(lambda s: s.astype(c.dtype), saved), kept


def layer_backward(
    dy_BTD: jax.Array,
    saved: Saved,
    lse_BKGT: jax.Array,
    segments_BT: jax.Array,
    w: dict[str, jax.Array],
    lora: Adapter,
    c: Context,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Return the cotangent of the layer's input and the gradients of its adapters, for the cotangent of its output."""
    us = list(saved["u"])
    u_qkv, u_o = (us.pop(0), us.pop(0)) if "q" in lora else (None, None)
    u_gate_up, u_down = (us.pop(0), us.pop(0)) if "gate" in lora else (None, None)
    grads: dict[str, dict[str, jax.Array]] = {}

    gate, up = saved["gate_up"][:, :, 0].astype(jnp.float32), saved["gate_up"][:, :, 1].astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    da_BTF = contract("BTD,FD->BTF", dy_BTD, w["down_LFD"], c.dtype)
    if u_down is not None:
        dx, g = lora_backward(gate * sigmoid * up, u_down, [dy_BTD], lora, ("down",), c.dtype)
        da_BTF, grads = da_BTF + dx, grads | g
    d_gate = da_BTF * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = da_BTF * gate * sigmoid
    dh2_BTD = contract("BTcF,DcF->BTD", jnp.stack([d_gate, d_up], axis=2), w["gate_up_LD2F"], c.dtype)
    if u_gate_up is not None:
        h2_BTD = rms_norm(saved["x2"], w["mlp_norm_LD"], c.config.norm_eps)
        dx, g = lora_backward(h2_BTD, u_gate_up, [d_gate, d_up], lora, GATE_UP, c.dtype)
        dh2_BTD, grads = dh2_BTD + dx, grads | g
    dx2_BTD = dy_BTD + rms_norm_backward(saved["x2"], w["mlp_norm_LD"], c.config.norm_eps, dh2_BTD)

    o_BTKGH = saved["o"]
    do_BTKGH = contract("BTD,KGHD->BTKGH", dx2_BTD, w["o_LKGHD"], c.dtype)
    if u_o is not None:
        o_BTI = o_BTKGH.reshape(*o_BTKGH.shape[:2], -1)
        dx, g = lora_backward(o_BTI, u_o, [dx2_BTD], _flat_a(lora, "o"), ("o",), c.dtype)
        g["o"]["A"] = g["o"]["A"].reshape(lora["o"]["A"].shape)
        do_BTKGH, grads = do_BTKGH + dx.reshape(do_BTKGH.shape), grads | g
    (q, k, v), split_vjp = jax.vjp(lambda qkv: _heads(qkv, w, c), saved["qkv"].astype(jnp.float32))
    dqkv_BTKJH = split_vjp(attention_backward(q, k, v, segments_BT, o_BTKGH, lse_BKGT, do_BTKGH, c.dtype))[0]
    dh_BTD = contract("BTKJH,DKJH->BTD", dqkv_BTKJH, w["qkv_LDKJH"], c.dtype)
    if u_qkv is not None:
        group = c.config.group
        parts = [dqkv_BTKJH[..., :group, :], dqkv_BTKJH[..., group, :], dqkv_BTKJH[..., group + 1, :]]
        h_BTD = rms_norm(saved["x"], w["attn_norm_LD"], c.config.norm_eps)
        dx, g = lora_backward(h_BTD, u_qkv, parts, lora, QKV, c.dtype)
        dh_BTD, grads = dh_BTD + dx, grads | g
    return dx2_BTD + rms_norm_backward(saved["x"], w["attn_norm_LD"], c.config.norm_eps, dh_BTD), grads


def row_attention(segments_BT: jax.Array, dtype: jnp.dtype) -> Attend:
    """Return the attention of training and prefill: causal within the segments of a row; keeps (k, v, lse)."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        o, lse = attention_forward(q, k, v, segments_BT, dtype)
        return o, (k, v, lse)

    return attend


def _flat_a(lora: Adapter, name: str) -> Adapter:
    """Give the o adapter, whose A is stored by heads (R, K, G, H), the flat input axis of the matmul."""
    if name not in lora:
        return lora
    a = lora[name]["A"]
    return {**lora, name: {"A": a.reshape(a.shape[0], -1), "B": lora[name]["B"]}}
