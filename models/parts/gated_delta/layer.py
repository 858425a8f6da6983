"""What is a gated delta rule as a residual part? Projections, the mixing of tokens, a gated norm, a projection out.

    q, k, v, z = h W_q, h W_k, h W_v, h W_z
    a, b       = h W_a, h W_b                            one value of each per value head
    o          = what `mixing` makes of q, k, v, a and b
    y          = (norm(o) * silu(z)) W_out               the norm of each value head, times a weight

Every x W that the adapter covers is x W + (alpha / R) (x A) B. An adapter covers q, k, v, z and out.

Source: gated delta networks, arXiv 2412.06464; its form in Qwen3-Next, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_client.models.config import GatedDelta, ModelConfig
from jax_client.models.kernels.delta import CHUNK
from jax_client.models.layers import contract, rms_norm, rms_norm_backward
from jax_client.models.parts.gated_delta.mixing import CONVOLUTIONS, GATES, Inputs, delta_of, mix_rows_backward
from jax_client.models.parts.kind import Context, Kept, Kind, Mixing, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter, Pair, fused_pair
from jax_client.models.specs import LoraArray, ParamSpec

PRODUCTS = ("delta_q_LDO", "delta_k_LDO", "delta_v_LDO", "delta_z_LDO")
OUT = "delta_out_LPYD"


def _sizes(c: ModelConfig) -> tuple[GatedDelta, dict[str, int]]:
    """Return the rule's sizes, and how wide each product with an adapter is."""
    if (delta := c.delta) is None:
        raise ValueError("a model without a gated delta rule has no sizes of it")
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    return delta, {"q": keys, "k": keys, "v": values, "z": values}


def _params(c: ModelConfig, dtype: jnp.dtype) -> dict[str, ParamSpec]:
    delta, widths = _sizes(c)
    D, P, Y, f32 = c.d_model, delta.value_heads, delta.value_dim, jnp.dtype(jnp.float32)
    into = {leaf: (width, dtype) for leaf, width in zip(PRODUCTS, widths.values(), strict=True)}
    into |= {"delta_a_LDP": (P, dtype), "delta_b_LDP": (P, dtype)}
    leaves = {
        leaf: ParamSpec(shape=(D, width), dtype=kind, axes=("embed", "heads")) for leaf, (width, kind) in into.items()
    }
    for leaf, which in zip(CONVOLUTIONS, "qkv", strict=True):
        leaves[leaf] = ParamSpec(shape=(delta.taps, widths[which]), dtype=f32, axes=(None, "heads"))
    leaves |= dict.fromkeys(GATES, ParamSpec(shape=(P,), dtype=f32, axes=("heads",)))
    leaves["out_norm_LY"] = ParamSpec(shape=(Y,), dtype=f32, axes=(None,))
    leaves[OUT] = ParamSpec(shape=(P, Y, D), dtype=dtype, axes=("heads", None, "embed"))
    return leaves


def _modules(c: ModelConfig, rank: int) -> dict[str, dict[str, LoraArray]]:
    delta, widths = _sizes(c)
    D, P, Y, R = c.d_model, delta.value_heads, delta.value_dim, rank
    into = LoraArray((R, D), (None, None), D)
    found = {
        f"delta_{name}": {"A": into, "B": LoraArray((R, width), (None, "heads"), 0)} for name, width in widths.items()
    }
    out = {"A": LoraArray((R, P, Y), (None, "heads", None), P * Y), "B": LoraArray((R, D), (None, None), 0)}
    return found | {"delta_out": out}


def _pairs(lora: Adapter) -> dict[str, Pair]:
    if "delta_q" not in lora:
        return {}
    a_RPY = lora["delta_out"]["A"]
    return {
        "qkvz": fused_pair(lora, *(f"delta_{name}" for name in "qkvz")),
        "out": (a_RPY.reshape(len(a_RPY), -1), [lora["delta_out"]["B"]]),
    }


def _forward(
    h_MD: jax.Array,
    rows: tuple[int, int],
    w: Weights,
    linears: Linears | MixedLinears,
    c: Context,
    mixing: Mixing,
    known: Saved,
) -> tuple[jax.Array, Saved, Kept]:
    q_MO, k_MO, v_MO, z_MO = linears.forward("qkvz", h_MD, *(w[leaf] for leaf in PRODUCTS))
    saved = {"q": q_MO, "k": k_MO, "v": v_MO, "z": z_MO}
    saved |= {name: contract("MD,DP->MP", h_MD, w[f"delta_{name}_LDP"], c.dtype) for name in "ab"}
    with jax.named_scope("delta_rule"):
        o_BTPY, kept = mixing.recur(_inputs(saved, rows), w)
    saved["o"] = o_BTPY.reshape(len(h_MD), -1)
    (y_MD,) = linears.forward("out", _gated(saved, w, c), w[OUT].reshape(-1, h_MD.shape[1]))
    return y_MD, saved, kept


def _inputs(saved: Saved, rows: tuple[int, ...]) -> Inputs:
    return Inputs(*(saved[name].reshape(*rows, -1) for name in ("q", "k", "v", "a", "b")))


def _normed(saved: Saved, w: Weights, c: Context) -> tuple[jax.Array, jax.Array]:
    """Return the output by head (M, P, Y), float32, and its norm."""
    o_MPY = saved["o"].reshape(len(saved["o"]), -1, delta_of(c).value_dim).astype(jnp.float32)
    return o_MPY, rms_norm(o_MPY, w["out_norm_LY"], c.config.norm_eps)


def _gated(saved: Saved, w: Weights, c: Context) -> jax.Array:
    """Return what the projection out takes (M, P x Y), float32."""
    z_MO = saved["z"].astype(jnp.float32)
    return _normed(saved, w, c)[1].reshape(z_MO.shape) * jax.nn.silu(z_MO)


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
    dgated_MO = linears.backward("out", [dy_MD], _gated(saved, w, c), w[OUT].reshape(-1, D)).astype(jnp.float32)
    o_MPY, normed_MPY = _normed(saved, w, c)
    z_MO = saved["z"].astype(jnp.float32)
    sigmoid_MO = jax.nn.sigmoid(z_MO)
    dz_MO = dgated_MO * normed_MPY.reshape(M, -1) * sigmoid_MO * (1 + z_MO * (1 - sigmoid_MO))
    dnormed_MPY = (dgated_MO * z_MO * sigmoid_MO).reshape(o_MPY.shape)
    do_MPY = rms_norm_backward(o_MPY, w["out_norm_LY"], c.config.norm_eps, dnormed_MPY)
    inputs = _inputs(saved, segments_BT.shape)
    with jax.named_scope("delta_rule"):
        d = mix_rows_backward(inputs, w, segments_BT, do_MPY.reshape(*segments_BT.shape, *o_MPY.shape[1:]), c)
    dqkvz_MO = [x.reshape(M, -1) for x in d[:3]] + [dz_MO]
    dh_MD = linears.backward("qkvz", dqkvz_MO, h(), *(w[leaf] for leaf in PRODUCTS))
    for x_BTP, name in ((d.a_BTP, "a"), (d.b_BTP, "b")):
        dh_MD += contract("MP,DP->MD", x_BTP.reshape(M, -1), w[f"delta_{name}_LDP"], c.dtype)
    return dh_MD


def _widths(c: ModelConfig, tensor: int) -> dict[str, int]:
    delta, widths = _sizes(c)
    found = {name: width // tensor for name, width in widths.items()}
    heads = delta.value_heads // tensor
    return {"x": c.d_model, **found, "o": found["v"], "a": heads, "b": heads}


def chunk_multiply_adds(c: ModelConfig) -> float:
    """Return the multiply-adds of a token in the chunks of the rule, all heads of a layer together.

    Of each head: keys with keys and queries with keys, of which half are used; the solution; what the state is asked,
    what it learns, and the products with corrections.
    """
    delta, _ = _sizes(c)
    X, Y = delta.key_dim, delta.value_dim
    return delta.value_heads * (2 * CHUNK * X + CHUNK * (X + Y) / 2 + CHUNK * Y + 3 * X * Y)


def _multiply_adds(c: ModelConfig) -> tuple[int, int, int]:
    delta, widths = _sizes(c)
    every = c.d_model * (sum(widths.values()) + 2 * delta.value_heads + widths["v"])
    return every, 0, every


_SAVED = ("x", "q", "k", "v", "z", "a", "b", "o", "u_qkvz", "u_out")
DELTA = Kind(
    name="delta",
    flag="train_attn",
    params=_params,
    modules=_modules,
    pairs=_pairs,
    forward=_forward,
    backward=_backward,
    saved={"none": _SAVED, "selective": _SAVED},
    needed=frozenset({"x", "q", "k", "v", "z", "a", "b", "o"}),
    exact=frozenset({"a", "b"}),
    us={"u_qkvz": 4, "u_out": 1},
    widths=_widths,
    # As many arrays as wide as queries, keys, values and z together as attention has of all its heads.
    live=lambda c: (0, 4 * sum(_sizes(c)[1].values())),
    multiply_adds=_multiply_adds,
)
