"""What does one decoder layer compute, and what is its backward pass?

Written by hand, because that decides what is kept: only the inputs of the matmuls and of the attention, in the matmul
type; norms, rotations and the gated activation are recomputed from them, and more where memory is short (`KEPT`).
Frozen weights get no gradient. The tests compare it with `jax.vjp` of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_client.models.attention import Attention
from jax_client.models.config import ModelConfig
from jax_client.models.layers import rms_norm, rms_norm_backward, rotate
from jax_client.models.lora import (
    Adapter,
    Pair,
    adapter_scale,
    layer_pairs,
    linear,
    linear_backward,
    mix,
    side_by_side,
)

Saved = dict[str, Any]
Remat = Literal["none", "selective", "full"]
# What of a layer's forward pass is kept for its backward pass; "selective" recomputes the wide half of the layer only.
_SELECTIVE = ("x", "qkv", "o", "x2", "u_qkv", "u_o", "attention")
KEPT: dict[Remat, tuple[str, ...]] = {
    "none": (*_SELECTIVE, "gate", "up", "u_gate_up", "u_down"),
    "selective": _SELECTIVE,
    "full": ("x",),
}
# From rotated q_BTKGH, k_BTKH and v_BTKH to (o_BTKGH, anything the caller wants to keep).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every layer of a pass shares: the model, the matmul type, the attention, the rotary table (B, T, H/2).

    Attributes:
        split_rows: keeps the residual stream (B, T, D) split by rows over a mesh. The embedding and the weights are
            split by width over the same axis: left to itself, XLA would follow them, and compute all rows everywhere.
    """

    config: ModelConfig
    dtype: jnp.dtype
    attention: Attention
    cos_BTH: jax.Array
    sin_BTH: jax.Array
    split_rows: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD


def _heads(qkv_BTKJH: jax.Array, w: dict[str, jax.Array], c: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split the fused projection; normalise (Qwen3) and rotate the queries and keys. Cheap: no matmul."""
    q, k, v = _split(qkv_BTKJH)
    if c.config.qk_norm:
        q, k = rms_norm(q, w["q_norm_LH"], c.config.norm_eps), rms_norm(k, w["k_norm_LH"], c.config.norm_eps)
    return rotate(q, c.cos_BTH, c.sin_BTH), rotate(k, c.cos_BTH, c.sin_BTH), v


def _heads_backward(
    dqkv: tuple[jax.Array, jax.Array, jax.Array], qkv_BTKJH: jax.Array, w: dict[str, jax.Array], c: Context
) -> jax.Array:
    """Return the cotangent of the fused projection for those of `_heads`' results."""
    dq, dk = (rotate(x, c.cos_BTH, -c.sin_BTH) for x in dqkv[:2])
    if c.config.qk_norm:
        q, k, _ = _split(qkv_BTKJH)
        dq = rms_norm_backward(q, w["q_norm_LH"], c.config.norm_eps, dq)
        dk = rms_norm_backward(k, w["k_norm_LH"], c.config.norm_eps, dk)
    return jnp.concatenate([dq, dk[..., None, :], dqkv[2][..., None, :]], axis=-2)


def _split(qkv_BTKJH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q_BTKGH, k_BTKH and v_BTKH, J = G + 2."""
    return qkv_BTKJH[..., :-2, :], qkv_BTKJH[..., -2, :], qkv_BTKJH[..., -1, :]


def layer_forward(
    x_BTD: jax.Array, w: dict[str, jax.Array], linears: Linears | MixedLinears, c: Context, attend: Attend
) -> tuple[jax.Array, Saved, Any]:
    """Apply one layer.

    Args:
        x_BTD: float32 residual stream.
        w: the layer's parameters, as in `decoder.Layers` without the leading axis.
        linears: the layer's matmuls with their adapters.
        attend: the attention to use: over the row (training, prefill) or over a cache (decoding).

    Returns:
        The new residual stream, everything that `layer_backward` reads (see `KEPT`), and what `attend` gave to keep.
    """
    rows, D = x_BTD.shape[:2], c.config.d_model
    x_MD = x_BTD.reshape(-1, D)
    h_MD = rms_norm(x_MD, w["attn_norm_LD"], c.config.norm_eps)
    (qkv_MO,) = linears.forward("qkv", h_MD, w["qkv_LDKJH"].reshape(D, -1))
    if c.config.qkv_bias:
        qkv_MO += w["qkv_bias_LKJH"].reshape(-1)
    o_BTKGH, kept = attend(*_heads(qkv_MO.reshape(*rows, *w["qkv_LDKJH"].shape[1:]), w, c))
    o_MI = o_BTKGH.reshape(len(x_MD), -1)
    x2_MD = x_MD + linears.forward("o", o_MI, w["o_LKGHD"].reshape(-1, D))[0]
    y_MD, mlp_saved = _mlp(x2_MD, w, linears, c)
    saved = {"x": x_MD, "qkv": qkv_MO, "o": o_MI, "x2": x2_MD} | mlp_saved | linears.us
    return y_MD.reshape(x_BTD.shape), jax.tree.map(lambda s: s.astype(c.dtype), saved), kept


def _mlp(
    x2_MD: jax.Array, w: dict[str, jax.Array], linears: Linears | MixedLinears, c: Context
) -> tuple[jax.Array, Saved]:
    """Apply the second half of a layer; return the new residual stream and what its backward pass needs."""
    h_MD = rms_norm(x2_MD, w["mlp_norm_LD"], c.config.norm_eps)
    gate_MF, up_MF = linears.forward("gate_up", h_MD, *w["gate_up_L2DF"])
    (down_MD,) = linears.forward("down", jax.nn.silu(gate_MF) * up_MF, w["down_LFD"])
    return x2_MD + down_MD, {"gate": gate_MF, "up": up_MF}


def layer_backward(
    dy_BTD: jax.Array,
    kept: Saved,
    segments_BT: jax.Array,
    w: dict[str, jax.Array],
    lora: Adapter,
    c: Context,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Return the cotangent of the layer's input and the gradients of its adapters, for the cotangent of its output.

    Args:
        kept: of what `layer_forward` saved, and under "attention" of what the attention did, any set of `KEPT`; the
            rest is recomputed.
    """
    rows, D, eps = dy_BTD.shape[:2], c.config.d_model, c.config.norm_eps
    saved = _recompute(kept, segments_BT, w, lora, c)
    linears = Linears(lora, c.dtype, us=saved)
    dy_MD = dy_BTD.reshape(-1, D)
    gate_MF, up_MF = saved["gate"].astype(jnp.float32), saved["up"].astype(jnp.float32)
    sigmoid_MF = jax.nn.sigmoid(gate_MF)
    da_MF = linears.backward("down", [dy_MD], gate_MF * sigmoid_MF * up_MF, w["down_LFD"])
    d_gate_MF = da_MF * up_MF * sigmoid_MF * (1 + gate_MF * (1 - sigmoid_MF))
    d_up_MF = da_MF * gate_MF * sigmoid_MF
    h_MD = rms_norm(saved["x2"], w["mlp_norm_LD"], eps)
    dh_MD = linears.backward("gate_up", [d_gate_MF, d_up_MF], h_MD, *w["gate_up_L2DF"])
    dx2_MD = dy_MD + rms_norm_backward(saved["x2"], w["mlp_norm_LD"], eps, dh_MD)

    do_MI = linears.backward("o", [dx2_MD], saved["o"], w["o_LKGHD"].reshape(-1, D))
    heads = (*rows, *w["o_LKGHD"].shape[:-1])
    qkv_BTKJH = saved["qkv"].reshape(*rows, *w["qkv_LDKJH"].shape[1:]).astype(jnp.float32)
    q, k, v = _heads(qkv_BTKJH, w, c)
    o, do = saved["o"].reshape(heads), do_MI.reshape(heads)
    dqkv = c.attention.backward(q, k, v, segments_BT, o, saved["attention"], do, c.dtype)
    dqkv_MO = _heads_backward(dqkv, qkv_BTKJH, w, c).reshape(len(dy_MD), -1)
    h_MD = rms_norm(saved["x"], w["attn_norm_LD"], eps)
    dh_MD = linears.backward("qkv", [dqkv_MO], h_MD, w["qkv_LDKJH"].reshape(D, -1))
    dx_MD = dx2_MD + rms_norm_backward(saved["x"], w["attn_norm_LD"], eps, dh_MD)
    return dx_MD.reshape(dy_BTD.shape), linears.adapter_grads()


def _recompute(kept: Saved, segments_BT: jax.Array, w: dict[str, jax.Array], lora: Adapter, c: Context) -> Saved:
    """Return everything that the backward pass reads; products that it does not read are never carried out."""
    if "gate" in kept:
        return kept
    if "qkv" in kept:
        linears = Linears(lora, c.dtype)
        _, mlp_saved = _mlp(kept["x2"].astype(jnp.float32), w, linears, c)
        return linears.us | mlp_saved | kept
    x_BTD = kept["x"].reshape(*segments_BT.shape, -1).astype(jnp.float32)
    _, saved, (_, _, residual) = layer_forward(x_BTD, w, Linears(lora, c.dtype), c, row_attention(segments_BT, c))
    return saved | {"attention": residual}


def row_attention(segments_BT: jax.Array, c: Context) -> Attend:
    """Return the attention of training and prefill: causal within the segments of a row; keeps (k, v, residual)."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        o, residual = c.attention.forward(q, k, v, segments_BT, c.dtype)
        return o, (k, v, residual)

    return attend


class Linears:
    """A layer's matmuls with their adapters. Collects each one's u (see `lora.linear`) and gradients by name."""

    def __init__(self, lora: Adapter, dtype: jnp.dtype, us: Saved | None = None):
        self._pairs, self._turn_back = jax.vjp(layer_pairs, lora)
        self._scale = adapter_scale(lora)
        self._dtype = dtype
        self._grads: dict[str, Pair] = {}
        self.us: Saved = {} if us is None else us

    def forward(self, name: str, x_MI: jax.Array, *ws_IO: jax.Array) -> list[jax.Array]:
        """Return x W with the adapter's part of each W, float32 (M, O)."""
        ys_MO, u_Mn = linear(x_MI, ws_IO, self._pairs.get(name), self._scale, self._dtype)
        if u_Mn is not None:
            self.us[f"u_{name}"] = u_Mn
        return ys_MO

    def backward(self, name: str, dys_MO: list[jax.Array], x_MI: jax.Array, *ws_IO: jax.Array) -> jax.Array:
        """Return the cotangent of x (M, I) for those of the outputs."""
        u_Mn, pair = self.us.get(f"u_{name}"), self._pairs.get(name)
        dx_MI, grad = linear_backward(dys_MO, x_MI, u_Mn, ws_IO, pair, self._scale, self._dtype)
        if grad is not None:
            self._grads[name] = grad
        return dx_MI

    def adapter_grads(self) -> dict[str, dict[str, jax.Array]]:
        """Return the collected gradients by the adapter's own modules."""
        return self._turn_back(self._grads)[0]


class MixedLinears:
    """A layer's matmuls for rows of different adapters, forwards only.

    Args:
        pairs: by matmul, from `mixed_pairs`.
        scale_MV: float32; alpha / rank in the column of a row's adapter, else 0.
        dtype: of the matmul operands.
    """

    def __init__(self, pairs: dict[str, Pair], scale_MV: jax.Array, dtype: jnp.dtype):
        self._pairs = pairs
        self._scale_MV = scale_MV
        self._dtype = dtype
        self.us: Saved = {}

    def forward(self, name: str, x_MI: jax.Array, *ws_IO: jax.Array) -> list[jax.Array]:
        """Return x W with each row's own adapter's part of each W, float32 (M, O)."""
        pair = self._pairs.get(name)
        scale = 0.0 if pair is None else mix(self._scale_MV, pair)
        return linear(x_MI, ws_IO, pair, scale, self._dtype)[0]


def mixed_pairs(loras: Sequence[Adapter], dtype: jnp.dtype) -> dict[str, Pair]:
    """Return the pairs of a layer's matmuls for several adapters of the same modules, in the matmul type."""
    layers = [layer_pairs(lora) for lora in loras]
    pairs = {name: side_by_side([layer[name] for layer in layers]) for name in (layers[0] if layers else ())}
    return jax.tree.map(lambda a: a.astype(dtype), pairs)
