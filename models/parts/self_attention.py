"""What is self-attention as a residual part? Fused q|k|v, rotary positions, grouped queries, an output projection.

    q, k, v = h W_q, h W_k, h W_v                        + biases (Qwen2, gpt-oss)
    g       = h W_g                                      in Qwen3.5 only; its rows stand among those of W_q
    q, k    = rope(norm(q)), rope(norm(k))               the norms, times a weight each, not in all families
    o       = softmax(q k^T / sqrt(H)) v                 causal, within a segment and a window if there is one; a query
                                                         head n uses the key/value head n // G
    y       = o W_o                                      + a bias (gpt-oss); (o * sigmoid(g)) W_o in Qwen3.5

Every x W that the adapter covers is x W + (alpha / R) (x A) B.

Source: Llama, arXiv 2302.13971; grouped queries, arXiv 2305.13245; LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.models.layers import rms_norm, rms_norm_backward
from jax_client.models.parts.kind import Context, Kept, Kind, Mixing, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter, Pair, fused_pair
from jax_client.models.rope import rotate
from jax_client.models.specs import LoraArray, ParamSpec


def _query_rows(c: ModelConfig) -> int:
    """Return how many heads of W_q a key/value head has: those of queries, and as many gates if there are any."""
    return c.group * (1 + c.output_gate)


def _params(c: ModelConfig, dtype: jnp.dtype) -> dict[str, ParamSpec]:
    D, K, G, H, J = c.d_model, c.n_kv_heads, c.group, c.head_dim, _query_rows(c) + 2
    f32 = jnp.dtype(jnp.float32)
    # q|k|v of a key/value head after those of the one before, gates behind queries. Not with the heads apart: a TPU
    # lays out the last two axes in tiles of 8 x 128, and each use would copy the matrix into another layout first.
    leaves = {"qkv_LDO": ParamSpec(shape=(D, K * J * H), dtype=dtype, axes=("embed", "kv_heads"))}
    if c.qkv_bias:
        leaves["qkv_bias_LKJH"] = ParamSpec(shape=(K, J, H), dtype=f32, axes=("kv_heads", None, None))
    if c.qk_norm:
        leaves |= {name: ParamSpec(shape=(H,), dtype=f32, axes=(None,)) for name in ("q_norm_LH", "k_norm_LH")}
    leaves["o_LKGHD"] = ParamSpec(shape=(K, G, H, D), dtype=dtype, axes=("kv_heads", None, None, "embed"))
    if c.o_bias:
        leaves["o_bias_LD"] = ParamSpec(shape=(D,), dtype=f32, axes=(None,))
    if c.sinks:
        leaves["sinks_LKG"] = ParamSpec(shape=(K, G), dtype=f32, axes=("kv_heads", None))
    return leaves


def _modules(c: ModelConfig, rank: int) -> dict[str, dict[str, LoraArray]]:
    D, K, G, H, R = c.d_model, c.n_kv_heads, c.group, c.head_dim, rank
    into = LoraArray((R, D), (None, None), D)
    q_heads, kv_heads = (None, "kv_heads", None, None), (None, "kv_heads", None)
    return {
        "q": {"A": into, "B": LoraArray((R, K, _query_rows(c), H), q_heads, 0)},
        "k": {"A": into, "B": LoraArray((R, K, H), kv_heads, 0)},
        "v": {"A": into, "B": LoraArray((R, K, H), kv_heads, 0)},
        "o": {"A": LoraArray((R, K, G, H), q_heads, K * G * H), "B": LoraArray((R, D), (None, None), 0)},
    }


def _pairs(lora: Adapter) -> dict[str, Pair]:
    if "q" not in lora:
        return {}
    a_RKGH = lora["o"]["A"]
    return {"qkv": fused_pair(lora, "q", "k", "v"), "o": (a_RKGH.reshape(len(a_RKGH), -1), [lora["o"]["B"]])}


@jax.named_scope("rope")
def _rotated(q_BTKGH: jax.Array, k_BTKH: jax.Array, w: Weights, c: Context) -> tuple[jax.Array, jax.Array]:
    """Normalise (Qwen3, Gemma 3) and rotate the queries and keys. Cheap: no matmul."""
    q, k, (cos_BTH, sin_BTH) = q_BTKGH, k_BTKH, c.rotary
    if c.config.qk_norm:
        q, k = rms_norm(q, w["q_norm_LH"], c.config.norm_eps), rms_norm(k, w["k_norm_LH"], c.config.norm_eps)
    return rotate(q, cos_BTH, sin_BTH), rotate(k, cos_BTH, sin_BTH)


@jax.named_scope("rope")
def _rotated_backward(
    dq: jax.Array, dk: jax.Array, q: jax.Array, k: jax.Array, w: Weights, c: Context
) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents of `_rotated`'s q and k, whose values are read only where there is a norm."""
    cos_BTH, sin_BTH = c.rotary
    dq, dk = rotate(dq, cos_BTH, -sin_BTH), rotate(dk, cos_BTH, -sin_BTH)
    if c.config.qk_norm:
        dq = rms_norm_backward(q, w["q_norm_LH"], c.config.norm_eps, dq)
        dk = rms_norm_backward(k, w["k_norm_LH"], c.config.norm_eps, dk)
    return dq, dk


def _split(qkv_KJH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q_KGH, k_KH and v_KH of the fused (..., K, J, H); of gates, too, there are G behind the queries."""
    return qkv_KJH[..., :-2, :], qkv_KJH[..., -2, :], qkv_KJH[..., -1, :]


def _join(q_KGH: jax.Array, k_KH: jax.Array, v_KH: jax.Array) -> jax.Array:
    """Undo `_split`."""
    return jnp.concatenate([q_KGH, k_KH[..., None, :], v_KH[..., None, :]], axis=-2)


def _forward(
    h_MD: jax.Array,
    rows: tuple[int, int],
    w: Weights,
    linears: Linears | MixedLinears,
    c: Context,
    mixing: Mixing,
    known: Saved,
) -> tuple[jax.Array, Saved, Kept]:
    heads = (-1, _query_rows(c.config) + 2, c.config.head_dim)

    def parts(qkv_MO: jax.Array) -> list[jax.Array]:
        if c.accelerator:
            # Else a TPU lays the weights out for what follows, and relays those of all layers in each program.
            qkv_MO = jax.lax.optimization_barrier(qkv_MO)
        qkv_MKJH = qkv_MO.reshape(len(h_MD), *heads)
        if c.config.qkv_bias:
            qkv_MKJH += w["qkv_bias_LKJH"]
        return [part.reshape(len(h_MD), -1) for part in _split(qkv_MKJH)]

    q_MO, k_MO, v_MO = linears.forward("qkv", h_MD, w["qkv_LDO"], parts=parts)
    K, _, H, _ = w["o_LKGHD"].shape
    q_BTKGH, *gate = jnp.split(q_MO.reshape(*rows, K, -1, H), 1 + c.config.output_gate, axis=-2)
    k_BTKH, v_BTKH = (x.reshape(*rows, -1, q_BTKGH.shape[-1]) for x in (k_MO, v_MO))
    rotated_q, rotated_k = _rotated(q_BTKGH, k_BTKH, w, c)
    with jax.named_scope("softmax"):
        o_BTKGH, kept = mixing.attend(rotated_q, rotated_k, v_BTKH, **c.extras(w))
    if not c.config.qk_norm:  # a norm's backward pass reads its inputs; else nothing need be rotated again
        q_BTKGH, k_BTKH = rotated_q, rotated_k
    saved = {"q": q_BTKGH, "k": k_BTKH, "v": v_BTKH, "o": o_BTKGH.reshape(len(h_MD), -1)}
    if gate:
        saved["gate"] = gate[0].reshape(len(h_MD), -1)
    o_MI = _gated(saved)
    (y_MD,) = linears.forward("o", o_MI, w["o_LKGHD"].reshape(-1, h_MD.shape[1]))
    if c.config.o_bias:
        y_MD += w["o_bias_LD"]
    return y_MD, saved, kept


def _gated(saved: Saved) -> jax.Array:
    """Return what the output projection takes."""
    if "gate" not in saved:
        return saved["o"]
    return saved["o"].astype(jnp.float32) * jax.nn.sigmoid(saved["gate"].astype(jnp.float32))


def _backward(
    dy_MD: jax.Array,
    h: Callable[[], jax.Array],
    saved: Saved,
    w: Weights,
    linears: Linears,
    c: Context,
    segments_BT: jax.Array,
) -> jax.Array:
    M, D = dy_MD.shape
    do_MI = linears.backward("o", [dy_MD], _gated(saved), w["o_LKGHD"].reshape(-1, D)).astype(jnp.float32)
    dgate = None
    if "gate" in saved:
        share_MI = jax.nn.sigmoid(saved["gate"].astype(jnp.float32))
        dgate = do_MI * saved["o"].astype(jnp.float32) * share_MI * (1 - share_MI)
        do_MI *= share_MI
    q, k, v = (saved[name].astype(jnp.float32) for name in "qkv")
    rotated_q, rotated_k = _rotated(q, k, w, c) if c.config.qk_norm else (q, k)
    o, do = saved["o"].reshape(q.shape), do_MI.reshape(q.shape)
    with jax.named_scope("softmax"):
        operands = rotated_q, rotated_k, v, segments_BT, o, saved["attention"], do, c.dtype
        dq, dk, dv = c.attention.backward(*operands, **c.extras(w))
    dqkv = *_rotated_backward(dq, dk, q, k, w, c), dv
    if dgate is not None:
        dqkv = jnp.concatenate([dqkv[0], dgate.reshape(q.shape)], axis=-2), *dqkv[1:]
    h_MD = h()
    dqkv_MO = [d.reshape(M, -1) for d in dqkv]
    whole_MO = _join(*dqkv).reshape(M, -1)
    return linears.backward("qkv", dqkv_MO, h_MD, w["qkv_LDO"], whole_MO=whole_MO)


def _widths(c: ModelConfig, tensor: int) -> dict[str, int]:
    heads, kv = c.n_heads * c.head_dim // tensor, c.n_kv_heads * c.head_dim // tensor
    gate = {"gate": heads} if c.output_gate else {}
    return {"x": c.d_model, "q": heads, "k": kv, "v": kv, "o": heads, **gate}


def _multiply_adds(c: ModelConfig) -> tuple[int, int, int]:
    qkv, o = c.d_model * c.n_kv_heads * (_query_rows(c) + 2) * c.head_dim, c.n_heads * c.head_dim * c.d_model
    return qkv + o, 0, qkv + o


_SAVED = ("x", "q", "k", "v", "o", "gate", "u_qkv", "u_o", "attention")
ATTENTION = Kind(
    name="attention",
    flag="train_attn",
    params=_params,
    modules=_modules,
    pairs=_pairs,
    forward=_forward,
    backward=_backward,
    saved={"none": _SAVED, "selective": _SAVED},
    needed=frozenset({"x", "q", "k", "v", "o", "attention"}),
    us={"u_qkv": 3, "u_o": 1},
    widths=_widths,
    live=lambda c: (0, c.n_heads * c.head_dim),
    multiply_adds=_multiply_adds,
)
