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
from jax_client.models.layers import rms_norm, rms_norm_backward, rotate
from jax_client.models.lora import Adapter, adapter_scale, layer_pairs, linear, linear_backward

Saved = dict[str, Any]
# From rotated q_BTKGH, k_BTKH and v_BTKH to (o_BTKGH, anything the caller wants to keep).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every layer of a pass shares: the model, the matmul type and the rotary table (B, T, H/2).

    `head_by_head` is attention's order of work, see `attention_forward`.
    """

    config: ModelConfig
    dtype: jnp.dtype
    head_by_head: bool
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
    rows, D, eps = x_BTD.shape[:2], c.config.d_model, c.config.norm_eps
    pairs, us = layer_pairs(lora), {}

    def apply(name: str, x_MI: jax.Array, *ws_IO: jax.Array) -> list[jax.Array]:
        ys_MO, us[name] = linear(x_MI, ws_IO, pairs.get(name), adapter_scale(lora), c.dtype)
        return ys_MO

    x_MD = x_BTD.reshape(-1, D)
    (qkv_MO,) = apply("qkv", rms_norm(x_MD, w["attn_norm_LD"], eps), w["qkv_LDKJH"].reshape(D, -1))
    if c.config.qkv_bias:
        qkv_MO += w["qkv_bias_LKJH"].reshape(-1)
    o_BTKGH, kept = attend(*_heads(qkv_MO.reshape(*rows, *w["qkv_LDKJH"].shape[1:]), w, c))
    o_MI = o_BTKGH.reshape(len(x_MD), -1)
    x2_MD = x_MD + apply("o", o_MI, w["o_LKGHD"].reshape(-1, D))[0]
    gate_MF, up_MF = apply("gate_up", rms_norm(x2_MD, w["mlp_norm_LD"], eps), *w["gate_up_L2DF"])
    y_MD = x2_MD + apply("down", jax.nn.silu(gate_MF) * up_MF, w["down_LFD"])[0]

    saved = {"x": x_MD, "qkv": qkv_MO, "o": o_MI, "x2": x2_MD, "gate": gate_MF, "up": up_MF, "u": us}
    return y_MD.reshape(x_BTD.shape), jax.tree.map(lambda s: s.astype(c.dtype), saved), kept


def layer_backward(
    dy_BTD: jax.Array,
    saved: Saved,
    lse_BKnX: jax.Array,
    segments_BT: jax.Array,
    w: dict[str, jax.Array],
    lora: Adapter,
    c: Context,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Return the cotangent of the layer's input and the gradients of its adapters, for the cotangent of its output."""
    rows, D, eps = dy_BTD.shape[:2], c.config.d_model, c.config.norm_eps
    pairs, turn_back = jax.vjp(layer_pairs, lora)
    grads = {}

    def back(name: str, dys_MO: list[jax.Array], x_MI: jax.Array, *ws_IO: jax.Array) -> jax.Array:
        u_Mn, pair = saved["u"][name], pairs.get(name)
        dx_MI, grad = linear_backward(dys_MO, x_MI, u_Mn, ws_IO, pair, adapter_scale(lora), c.dtype)
        if grad is not None:
            grads[name] = grad
        return dx_MI

    dy_MD = dy_BTD.reshape(-1, D)
    gate_MF, up_MF = saved["gate"].astype(jnp.float32), saved["up"].astype(jnp.float32)
    sigmoid_MF = jax.nn.sigmoid(gate_MF)
    da_MF = back("down", [dy_MD], gate_MF * sigmoid_MF * up_MF, w["down_LFD"])
    d_gate_MF = da_MF * up_MF * sigmoid_MF * (1 + gate_MF * (1 - sigmoid_MF))
    d_up_MF = da_MF * gate_MF * sigmoid_MF
    h_MD = rms_norm(saved["x2"], w["mlp_norm_LD"], eps)
    dh_MD = back("gate_up", [d_gate_MF, d_up_MF], h_MD, *w["gate_up_L2DF"])
    dx2_MD = dy_MD + rms_norm_backward(saved["x2"], w["mlp_norm_LD"], eps, dh_MD)

    do_MI = back("o", [dx2_MD], saved["o"], w["o_LKGHD"].reshape(-1, D))
    heads = (*rows, *w["o_LKGHD"].shape[:-1])
    qkv_BTKJH = saved["qkv"].reshape(*rows, *w["qkv_LDKJH"].shape[1:]).astype(jnp.float32)
    (q, k, v), split_vjp = jax.vjp(lambda qkv: _heads(qkv, w, c), qkv_BTKJH)
    o, do = saved["o"].reshape(heads), do_MI.reshape(heads)
    dqkv = attention_backward(q, k, v, segments_BT, o, lse_BKnX, do, c.dtype, c.head_by_head)
    dqkv_MO = split_vjp(dqkv)[0].reshape(len(dy_MD), -1)
    h_MD = rms_norm(saved["x"], w["attn_norm_LD"], eps)
    dh_MD = back("qkv", [dqkv_MO], h_MD, w["qkv_LDKJH"].reshape(D, -1))
    dx_MD = dx2_MD + rms_norm_backward(saved["x"], w["attn_norm_LD"], eps, dh_MD)
    return dx_MD.reshape(dy_BTD.shape), turn_back(grads)[0]


def row_attention(segments_BT: jax.Array, c: Context) -> Attend:
    """Return the attention of training and prefill: causal within the segments of a row; keeps (k, v, lse)."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        o, lse = attention_forward(q, k, v, segments_BT, c.dtype, c.head_by_head)
        return o, (k, v, lse)

    return attend
