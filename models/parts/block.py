"""What does one decoder layer compute, and what is its backward pass?

`layer_forward` computes attention and a gated MLP, each behind a norm and added to the residual stream.
`layer_backward` is written by hand, because that decides what is kept: only the inputs of the matmuls and of the
attention, in the matmul type. It recomputes norms and the gated activation, and more where memory is short
(`SAVED_FOR_BACKWARD`). Frozen weights get no gradient. The tests compare it with `jax.vjp` of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jax_client.models.config import ModelConfig
from jax_client.models.layers import rms_norm, rms_norm_backward, rotate
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.lora import (
    Adapter,
    Pair,
    Parts,
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
_SELECTIVE = ("x", "q", "k", "v", "o", "x2", "u_qkv", "u_o", "attention")
SAVED_FOR_BACKWARD: dict[Remat, tuple[str, ...]] = {
    "none": (*_SELECTIVE, "gate", "up", "u_gate_up", "u_down"),
    "selective": _SELECTIVE,
    "full": ("x",),
}
# The matmuls whose outputs an accelerator rounds; of the others it is the cotangents of the inputs.
ROUNDED = ("qkv", "gate_up")
# attend(q_BTKGH, k_BTKH, v_BTKH) -> (o_BTKGH, what the caller wants to keep), with rotated q and k.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every layer of a pass shares: the model, the matmul type, the attention, the rotary table (B, T, H/2).

    Attributes:
        on_cpu: whether the program runs on a CPU, where what is kept of bfloat16 are its bits.
        one_cpu: whether it runs on one CPU device, where some layouts are worth a constraint.
        one_gpu: whether it runs on one GPU, where the layout of what is kept is worth one.
        accelerator: whether it runs on a TPU or a GPU. What the attention and the gated activation read there, and the
            cotangents of what they return, is rounded to the matmul type: the widest results are written and read at
            half the size. They are kept for the backward pass in that type, and products take them in it, all the same.
        split_rows: `split_rows(x_BTD) -> x_BTD` keeps the residual stream split by rows over a mesh. The embedding and
            the weights are split by width over the same axis: left to itself, XLA would follow them, and compute all
            rows everywhere.
    """

    config: ModelConfig
    dtype: jnp.dtype
    attention: Attention
    cos_BTH: jax.Array
    sin_BTH: jax.Array
    on_cpu: bool = False
    one_cpu: bool = False
    one_gpu: bool = False
    accelerator: bool = False
    split_rows: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD


@jax.named_scope("rope")
def _rotated(q_BTKGH: jax.Array, k_BTKH: jax.Array, w: dict[str, jax.Array], c: Context) -> tuple[jax.Array, jax.Array]:
    """Normalise (Qwen3) and rotate the queries and keys. Cheap: no matmul."""
    q, k = q_BTKGH, k_BTKH
    if c.config.qk_norm:
        q, k = rms_norm(q, w["q_norm_LH"], c.config.norm_eps), rms_norm(k, w["k_norm_LH"], c.config.norm_eps)
    return rotate(q, c.cos_BTH, c.sin_BTH), rotate(k, c.cos_BTH, c.sin_BTH)


@jax.named_scope("rope")
def _rotated_backward(
    dq: jax.Array, dk: jax.Array, q: jax.Array, k: jax.Array, w: dict[str, jax.Array], c: Context
) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents of `_rotated`'s q and k, whose values are read only where there is a norm."""
    dq, dk = rotate(dq, c.cos_BTH, -c.sin_BTH), rotate(dk, c.cos_BTH, -c.sin_BTH)
    if c.config.qk_norm:
        dq = rms_norm_backward(q, w["q_norm_LH"], c.config.norm_eps, dq)
        dk = rms_norm_backward(k, w["k_norm_LH"], c.config.norm_eps, dk)
    return dq, dk


def _split(qkv_KJH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q_KGH, k_KH and v_KH of the fused (..., K, J, H), J = G + 2."""
    return qkv_KJH[..., :-2, :], qkv_KJH[..., -2, :], qkv_KJH[..., -1, :]


def _join(q_KGH: jax.Array, k_KH: jax.Array, v_KH: jax.Array) -> jax.Array:
    """Undo `_split`."""
    return jnp.concatenate([q_KGH, k_KH[..., None, :], v_KH[..., None, :]], axis=-2)


def layer_forward(
    x_BTD: jax.Array, w: dict[str, jax.Array], linears: Linears | MixedLinears, c: Context, attend: Attend
) -> tuple[jax.Array, Saved, Any]:
    """Apply one layer: two residual parts, attention and a gated MLP, each behind a norm.

        h       = norm(x) * attn_norm                        norm(x) = x / sqrt(mean(x^2) + eps) over D
        q, k, v = h W_q, h W_k, h W_v                        + biases (Qwen2)
        q, k    = rope(norm(q)), rope(norm(k))               the norms, times a weight each, in Qwen3 only
        o       = softmax(q k^T / sqrt(H)) v                 causal, within a segment; a query head n uses the
                                                             key/value head n // G
        x2      = x + o W_o
        g, u    = norm(x2) * mlp_norm (W_gate, W_up)
        y       = x2 + (silu(g) * u) W_down

    Every x W that the adapter covers is x W + (alpha / R) (x A) B. The W's of q, k, v are stored as one, and so are
    those of gate and up.

    Args:
        x_BTD: float32 residual stream.
        w: the layer's parameters, as in `decoder.Layers` without the leading axis.
        linears: the layer's matmuls with their adapters.
        c: what all layers of the pass share.
        attend: `f(q, k, v) -> (o, kept)`, the attention over the row (training) or over a cache (sampling).

    Returns:
        The new residual stream, everything that `layer_backward` reads (see `SAVED_FOR_BACKWARD`), and what
        `attend` kept.

    Source: Llama, arXiv 2302.13971; grouped queries, arXiv 2305.13245; LoRA, arXiv 2106.09685.
    """
    x2_MD, saved, kept = _attention(x_BTD, w, linears, c, attend)
    y_MD, mlp_saved = _mlp(x2_MD, w, linears, c)
    saved = saved | mlp_saved | linears.us
    saved = jax.tree.map(lambda s: s.astype(c.dtype), saved)
    return y_MD.reshape(x_BTD.shape), _row_major(saved, c), _row_major(kept, c)


def _row_major(saved: Any, c: Context) -> Any:
    """Fix the layout of what is kept: a GPU would lay out the stacks of all layers as the products of one like them.

    They would be copied whole at the end of the forward pass, and before the backward pass. XLA does not split what has
    a fixed layout over a mesh.
    """
    if not c.one_gpu:
        return saved
    return jax.tree.map(lambda s: with_layout_constraint(s, Layout(major_to_minor=tuple(range(s.ndim)))), saved)


@jax.named_scope("attention")
def _attention(
    x_BTD: jax.Array, w: dict[str, jax.Array], linears: Linears | MixedLinears, c: Context, attend: Attend
) -> tuple[jax.Array, Saved, Any]:
    """Apply the first half of a layer; return x2 (M, D), what its backward pass needs, and what `attend` kept."""
    rows, D, heads = x_BTD.shape[:2], c.config.d_model, (-1, c.config.group + 2, c.config.head_dim)
    x_MD = x_BTD.reshape(-1, D)
    h_MD = rms_norm(x_MD, w["attn_norm_LD"], c.config.norm_eps)

    def parts(qkv_MO: jax.Array) -> list[jax.Array]:
        if c.accelerator:
            # Else a TPU lays the weights out for what follows, and relays those of all layers in each program.
            qkv_MO = jax.lax.optimization_barrier(qkv_MO)
        qkv_MKJH = qkv_MO.reshape(len(x_MD), *heads)
        if c.config.qkv_bias:
            qkv_MKJH += w["qkv_bias_LKJH"]
        return [part.reshape(len(x_MD), -1) for part in _split(qkv_MKJH)]

    q_MO, k_MO, v_MO = linears.forward("qkv", h_MD, w["qkv_LDO"], parts=parts)
    q_BTKGH = q_MO.reshape(*rows, *w["o_LKGHD"].shape[:-1])
    k_BTKH, v_BTKH = (x.reshape(*rows, -1, q_BTKGH.shape[-1]) for x in (k_MO, v_MO))
    rotated_q, rotated_k = _rotated(q_BTKGH, k_BTKH, w, c)
    with jax.named_scope("softmax"):
        o_BTKGH, kept = attend(rotated_q, rotated_k, v_BTKH)
    if not c.config.qk_norm:  # a norm's backward pass reads its inputs; else nothing need be rotated again
        q_BTKGH, k_BTKH = rotated_q, rotated_k
    o_MI = o_BTKGH.reshape(len(x_MD), -1)
    x2_MD = x_MD + linears.forward("o", o_MI, w["o_LKGHD"].reshape(-1, D))[0]
    return x2_MD, {"x": x_MD, "q": q_BTKGH, "k": k_BTKH, "v": v_BTKH, "o": o_MI, "x2": x2_MD}, kept


@jax.named_scope("mlp")
def _mlp(
    x2_MD: jax.Array, w: dict[str, jax.Array], linears: Linears | MixedLinears, c: Context
) -> tuple[jax.Array, Saved]:
    """Apply the second half of a layer; return the new residual stream and what its backward pass needs."""
    h_MD = rms_norm(x2_MD, w["mlp_norm_LD"], c.config.norm_eps)
    gate_MF, up_MF = linears.forward("gate_up", h_MD, *w["gate_up_L2DF"])
    activated_MF = jax.nn.silu(gate_MF.astype(jnp.float32)) * up_MF.astype(jnp.float32)
    (down_MD,) = linears.forward("down", activated_MF, w["down_LFD"])
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
        dy_BTD: float32 cotangent of the residual stream after the layer.
        kept: of what `layer_forward` saved, and under "attention" of what the attention did, any set of
            `SAVED_FOR_BACKWARD`; the rest is recomputed.
        segments_BT: int32; segment 0 is padding.
        w: the layer's parameters, without the leading axis.
        lora: the layer's adapters.
        c: what all layers of the pass share.
    """
    saved = _recompute(_row_major(kept, c), segments_BT, w, lora, c)
    linears = Linears(lora, c, us=saved)
    dx2_MD = _mlp_backward(dy_BTD.reshape(-1, c.config.d_model), saved, w, linears, c)
    dx_MD = _attention_backward(dx2_MD, saved, segments_BT, w, linears, c)
    return dx_MD.reshape(dy_BTD.shape), linears.adapter_grads()


@jax.named_scope("mlp")
def _mlp_backward(dy_MD: jax.Array, saved: Saved, w: dict[str, jax.Array], linears: Linears, c: Context) -> jax.Array:
    """Return the cotangent of x2 for that of the layer's output."""
    gate_MF, up_MF = saved["gate"].astype(jnp.float32), saved["up"].astype(jnp.float32)
    sigmoid_MF = jax.nn.sigmoid(gate_MF)
    da_MF = linears.backward("down", [dy_MD], gate_MF * sigmoid_MF * up_MF, w["down_LFD"]).astype(jnp.float32)
    d_gate_MF = da_MF * up_MF * sigmoid_MF * (1 + gate_MF * (1 - sigmoid_MF))
    d_up_MF = da_MF * gate_MF * sigmoid_MF
    h_MD = rms_norm(saved["x2"], w["mlp_norm_LD"], c.config.norm_eps)
    dh_MD = linears.backward("gate_up", [d_gate_MF, d_up_MF], h_MD, *w["gate_up_L2DF"])
    return dy_MD + rms_norm_backward(saved["x2"], w["mlp_norm_LD"], c.config.norm_eps, dh_MD)


@jax.named_scope("attention")
def _attention_backward(
    dx2_MD: jax.Array,
    saved: Saved,
    segments_BT: jax.Array,
    w: dict[str, jax.Array],
    linears: Linears,
    c: Context,
) -> jax.Array:
    """Return the cotangent of the layer's input for that of x2."""
    M, D = dx2_MD.shape
    do_MI = linears.backward("o", [dx2_MD], saved["o"], w["o_LKGHD"].reshape(-1, D)).astype(jnp.float32)
    q, k, v = (saved[name].astype(jnp.float32) for name in "qkv")
    rotated_q, rotated_k = _rotated(q, k, w, c) if c.config.qk_norm else (q, k)
    o, do = saved["o"].reshape(q.shape), do_MI.reshape(q.shape)
    with jax.named_scope("softmax"):
        dq, dk, dv = c.attention.backward(rotated_q, rotated_k, v, segments_BT, o, saved["attention"], do, c.dtype)
    dqkv = *_rotated_backward(dq, dk, q, k, w, c), dv
    h_MD = rms_norm(saved["x"], w["attn_norm_LD"], c.config.norm_eps)
    dqkv_MO = [d.reshape(M, -1) for d in dqkv]
    whole_MO = _join(*dqkv).reshape(M, -1)
    dh_MD = linears.backward("qkv", dqkv_MO, h_MD, w["qkv_LDO"], whole_MO=whole_MO)
    return dx2_MD + rms_norm_backward(saved["x"], w["attn_norm_LD"], c.config.norm_eps, dh_MD)


@jax.named_scope("recompute")
def _recompute(kept: Saved, segments_BT: jax.Array, w: dict[str, jax.Array], lora: Adapter, c: Context) -> Saved:
    """Return everything that the backward pass reads; XLA drops the products that it does not read."""
    if "gate" in kept:
        return kept
    if "q" in kept:
        linears = Linears(lora, c)
        _, mlp_saved = _mlp(kept["x2"].astype(jnp.float32), w, linears, c)
        return linears.us | mlp_saved | kept
    x_BTD = kept["x"].reshape(*segments_BT.shape, -1).astype(jnp.float32)
    _, saved, (_, _, residual) = layer_forward(x_BTD, w, Linears(lora, c), c, row_attention(segments_BT, c))
    return saved | {"attention": residual}


def row_attention(segments_BT: jax.Array, c: Context) -> Attend:
    """Return the attention of training and prefill: causal within the segments of a row; keeps (k, v, residual)."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        o, residual = c.attention.forward(q, k, v, segments_BT, c.dtype)
        return o, (k, v, residual)

    return attend


class Linears:
    """A layer's matmuls with their adapters. Collects each one's u (see `lora.linear`) and gradients by name."""

    def __init__(self, lora: Adapter, c: Context, us: Saved | None = None):
        self._pairs, self._pairs_vjp = jax.vjp(layer_pairs, lora)
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

    def adapter_grads(self) -> dict[str, dict[str, jax.Array]]:
        """Return the collected gradients by the adapter's own modules."""
        return self._pairs_vjp(self._grads)[0]


class MixedLinears:
    """A layer's matmuls for rows of different adapters, forwards only.

    Args:
        pairs: by matmul, from `mixed_pairs`.
        scale_MV: float32; alpha / rank in the column of a row's adapter, else 0.
        dtype: of the matmul operands.
        total: sums the outputs of o and down over the devices that have a part of their inputs each.
        accelerator: as of the `Context`.
    """

    def __init__(
        self,
        pairs: dict[str, Pair],
        scale_MV: jax.Array,
        dtype: jnp.dtype,
        total: Callable[[jax.Array], jax.Array] = lambda y_MO: y_MO,
        *,
        accelerator: bool = False,
    ):
        self._rounded = dtype if accelerator else jnp.dtype(jnp.float32)
        self._total = total
        self._pairs = pairs
        self._scale_MV = scale_MV
        self._dtype = dtype
        self.us: Saved = {}

    def forward(self, name: str, x_MI: jax.Array, *ws_IO: jax.Array, parts: Parts | None = None) -> list[jax.Array]:
        """Return x W with each row's own adapter's part of each output (M, O), typed as by `Linears`."""
        out = self._rounded if name in ROUNDED else jnp.float32
        pair = self._pairs.get(name)
        scale = 0.0 if pair is None else mix(self._scale_MV, pair)
        ys_MO, _ = linear(x_MI, ws_IO, pair, scale, self._dtype, parts, out)
        return [self._total(y_MO) for y_MO in ys_MO] if name in ("o", "down") else ys_MO


def mixed_pairs(loras: Sequence[Adapter], dtype: jnp.dtype) -> dict[str, Pair]:
    """Return the pairs of a layer's matmuls for several adapters of the same modules, in the matmul type."""
    layers = [layer_pairs(lora) for lora in loras]
    pairs = {name: side_by_side([layer[name] for layer in layers]) for name in (layers[0] if layers else ())}
    return jax.tree.map(lambda a: a.astype(dtype), pairs)
