"""What is a mixture of experts as a residual part? A router, k of E gated MLPs for each token, and their weighted sum.

    w, e = the k largest of softmax(h W_r), and which these are
    y    = sum_j w_j (silu(h W_gate,e) * (h W_up,e)) W_down,e           e = e_j

An adapter has for gate and up one A that all experts share and a B of each, for down an A of each and one B: the
shared-outer form, at full rank. So (h A) is computed once per token, and what the experts add for down is summed at the
width of the rank. Router and experts are frozen; the gradient goes through the weights w.

Source: Qwen3, arXiv 2505.09388; the router's softmax, arXiv 2101.03961; sorted rows, arXiv 2211.15841.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.config import Experts, ModelConfig
from jax_client.models.kernels.grouped import Groups, Tile, for_tiles, group
from jax_client.models.layers import contract
from jax_client.models.parts.kind import Attend, Context, Kind, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter, Pair, fused_pair
from jax_client.models.parts.router import route, route_backward
from jax_client.models.specs import LoraArray, ParamSpec

MATRICES = ("experts_gate_LEDF", "experts_up_LEDF", "experts_down_LEFD")


def _experts(c: ModelConfig) -> Experts:
    if c.experts is None:
        raise ValueError("a model without experts has no mixture of them")
    return c.experts


def _params(c: ModelConfig, dtype: jnp.dtype) -> dict[str, ParamSpec]:
    D, E, F = c.d_model, _experts(c).count, _experts(c).d_ff
    into = ParamSpec(shape=(E, D, F), dtype=dtype, axes=("experts", None, "ffw"))
    return {
        "router_LDE": ParamSpec(shape=(D, E), dtype=jnp.dtype(jnp.float32), axes=(None, None)),
        "experts_gate_LEDF": into,
        "experts_up_LEDF": into,
        "experts_down_LEFD": ParamSpec(shape=(E, F, D), dtype=dtype, axes=("experts", "ffw", None)),
    }


def _modules(c: ModelConfig, rank: int) -> dict[str, dict[str, LoraArray]]:
    D, E, F, R = c.d_model, _experts(c).count, _experts(c).d_ff, rank
    each = (None, "experts", "ffw")
    into = {"A": LoraArray((R, D), (None, None), D), "B": LoraArray((R, E, F), each, 0)}
    down = {"A": LoraArray((R, E, F), each, F), "B": LoraArray((R, D), (None, None), 0)}
    return {"experts_gate": into, "experts_up": into, "experts_down": down}


def _pairs(lora: Adapter) -> dict[str, Pair]:
    if "experts_gate" not in lora:
        return {}
    (a_nD, _), down = fused_pair(lora, "experts_gate", "experts_up"), lora["experts_down"]
    bs_REF = [lora[name]["B"] for name in ("experts_gate", "experts_up")]
    return {"experts_gate_up": (a_nD, bs_REF), "experts_down": (down["A"], [down["B"]])}


def _forward(
    h_MD: jax.Array,
    rows: tuple[int, int],
    w: Weights,
    linears: Linears | MixedLinears,
    c: Context,
    attend: Attend,
    known: Saved,
) -> tuple[jax.Array, Saved, Any]:
    experts, dtype = _experts(c.config), c.dtype
    if "choice" in known:
        choice_Mk, weight_Mk = known["choice"], known["weight"]
    else:
        choice_Mk, weight_Mk = route(h_MD, w["router_LDE"], experts.per_token, normalized=experts.normalized)
    groups = group(choice_Mk, experts.count)
    x_MD, S = h_MD.astype(dtype), len(groups.token_S)
    into, out = linears.pair("experts_gate_up"), linears.pair("experts_down")
    u_Mn = None
    if into is not None:
        u_Mn = contract("MD,nD->Mn", h_MD, into[0], dtype) * linears.scale("experts_gate_up")
        linears.us["u_experts_gate_up"] = u_Mn
        u_Mn = u_Mn.astype(dtype)  # gathered for each choice

    def tile(sums: Any, e: jax.Array, matrices: Any, tile: Tile) -> Any:
        gate_tF, up_tF = _gate_up(x_MD, u_Mn, into, e, matrices, tile, c)
        a_tF = jax.nn.silu(gate_tF) * up_tF
        new = [contract("tF,FD->tD", a_tF, matrices[2], dtype, sums[0].dtype), gate_tF, up_tF]
        if out is not None:
            new.append(contract("tF,RF->tR", a_tF, _of_expert(out[0], e), dtype))
        return [tile.put(old, rows) for old, rows in zip(sums, new, strict=True)]

    D, F, kept = c.config.d_model, experts.d_ff, dtype
    sums = [jnp.zeros((S, D), _result(c)), jnp.zeros((S, F), kept), jnp.zeros((S, F), kept)]
    if out is not None:
        sums.append(jnp.zeros((S, len(out[0]))))
    y_SD, gate_SF, up_SF, *narrow_SR = _through_experts(groups, w, tile, sums, c)
    y_MD = groups.total(y_SD, weight_Mk)
    if out is not None:
        u_MR = groups.total(narrow_SR[0], weight_Mk) * linears.scale("experts_down")
        linears.us["u_experts_down"] = u_MR
        y_MD += contract("MR,RD->MD", u_MR, out[1][0], dtype)
    saved = {"choice": choice_Mk, "weight": weight_Mk, "gate": gate_SF, "up": up_SF}
    return linears.total(y_MD), saved, None


def _backward(
    dy_MD: jax.Array,
    h: Callable[[], jax.Array],
    saved: Saved,
    w: Weights,
    linears: Linears,
    c: Context,
    segments_BT: jax.Array,
) -> jax.Array:
    experts, dtype = _experts(c.config), c.dtype
    h_MD, choice_Mk, weight_Mk = h(), saved["choice"], saved["weight"]
    groups = group(choice_Mk, experts.count)
    S, (M, D) = len(groups.token_S), dy_MD.shape
    weight_S, dy = groups.sort(weight_Mk), dy_MD.astype(dtype)
    into, out = linears.pair("experts_gate_up"), linears.pair("experts_down")
    u_Mn = None if into is None else linears.us["u_experts_gate_up"]
    # What the cotangent of y is at the width of the rank, times the scale.
    db_MR = None if out is None else contract("MD,RD->MR", dy, out[1][0], dtype) * linears.scale("experts_down")

    def tile(sums: Any, e: jax.Array, matrices: Any, tile: Tile) -> Any:
        (dx_SD, dweight_S, du_Sn), grads = sums
        gate_tF, up_tF = (tile.rows(saved[name]).astype(jnp.float32) for name in ("gate", "up"))
        da_tF = contract("tD,FD->tF", dy[tile.token_t], matrices[2], dtype)
        if out is not None and db_MR is not None:
            db_tR = db_MR[tile.token_t]
            da_tF += contract("tR,RF->tF", db_tR, _of_expert(out[0], e), dtype)
        sigmoid_tF = jax.nn.sigmoid(gate_tF)
        a_tF = gate_tF * sigmoid_tF * up_tF
        dweight_S = tile.put(dweight_S, jnp.sum(a_tF * da_tF, axis=-1))
        weight_t = jnp.where(tile.own_t, tile.rows(weight_S), 0.0)
        da_tF *= weight_t[:, None]
        dgate_tF = da_tF * up_tF * sigmoid_tF * (1 + gate_tF * (1 - sigmoid_tF))
        dup_tF = da_tF * gate_tF * sigmoid_tF
        dx_tD = contract("tF,DF->tD", dgate_tF, matrices[0], dtype, dx_SD.dtype)
        dx_SD = tile.put(dx_SD, dx_tD + contract("tF,DF->tD", dup_tF, matrices[1], dtype, dx_SD.dtype))
        if into is not None and u_Mn is not None:
            ds_tF, bs_REF = (dgate_tF, dup_tF), into[1]
            us_tR = jnp.split(u_Mn[tile.token_t], 2, axis=1)
            dus_tR = [contract("tF,RF->tR", d, _of_expert(b, e), dtype) for d, b in zip(ds_tF, bs_REF, strict=True)]
            du_Sn = tile.put(du_Sn, jnp.concatenate(dus_tR, axis=1))
            new = [contract("tR,tF->RF", u, d, dtype) for u, d in zip(us_tR, ds_tF, strict=True)]
            new.append(contract("tR,tF->RF", db_tR * weight_t[:, None], a_tF, dtype))
            grads = [tile.add(old, e, one) for old, one in zip(grads, new, strict=True)]
        return (dx_SD, dweight_S, du_Sn), grads

    width = 0 if into is None else len(into[0])
    sums = jnp.zeros((S, D), _result(c)), jnp.zeros(S), jnp.zeros((S, width))
    bs_REF = [] if into is None or out is None else [*into[1], out[0]]
    (dx_SD, dweight_S, du_Sn), grads = _through_experts(groups, w, tile, (sums, [jnp.zeros(b.shape) for b in bs_REF]), c)
    dh_MD = groups.total(dx_SD)
    if into is not None and out is not None:
        du_Mn = groups.total(du_Sn) * linears.scale("experts_gate_up")
        dh_MD += contract("Mn,nD->MD", du_Mn, into[0], dtype)
        linears.put_grad("experts_gate_up", (contract("Mn,MD->nD", du_Mn, h_MD, dtype), grads[:2]))
        db_RD = contract("MR,MD->RD", linears.us["u_experts_down"], dy_MD, dtype)
        linears.put_grad("experts_down", (grads[2], [db_RD]))
    route_of = {"normalized": experts.normalized}
    dweight_Mk = groups.by_choice(dweight_S)
    return dh_MD + route_backward(dweight_Mk, h_MD, choice_Mk, weight_Mk, w["router_LDE"], **route_of)


def _through_experts(groups: Groups, w: Weights, tile: Callable[..., Any], sums: Any, c: Context) -> Any:
    cut = lambda e: [w[name].cut(e) for name in MATRICES]  # noqa: E731
    return for_tiles(groups, cut, tile, sums, on_cpu=c.on_cpu)


def _gate_up(
    x_MD: jax.Array, u_Mn: jax.Array | None, pair: Pair | None, e: jax.Array, matrices: Any, tile: Tile, c: Context
) -> list[jax.Array]:
    """Return gate and up of a tile's rows, float32."""
    x_tD = x_MD[tile.token_t]
    both = [contract("tD,DF->tF", x_tD, matrix, c.dtype) for matrix in matrices[:2]]
    if pair is None or u_Mn is None:
        return both
    us_tR = jnp.split(u_Mn[tile.token_t], 2, axis=1)
    return [
        y + contract("tR,RF->tF", u, _of_expert(b, e), c.dtype) for y, u, b in zip(both, us_tR, pair[1], strict=True)
    ]


def _of_expert(array_REF: jax.Array, e: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array_REF, e, 1, keepdims=False)


def _result(c: Context) -> jnp.dtype:
    """Return the type of what experts return by row: rounded on an accelerator, as other wide results are."""
    return c.dtype if c.accelerator else jnp.dtype(jnp.float32)


def _widths(c: ModelConfig, tensor: int) -> dict[str, int]:
    hidden = _experts(c).per_token * _experts(c).d_ff // tensor
    return {"x": c.d_model, "gate": hidden, "up": hidden}


def _multiply_adds(c: ModelConfig) -> tuple[int, int, int]:
    experts = _experts(c)
    each, router = experts.per_token * c.d_model * experts.d_ff, c.d_model * experts.count
    return 3 * each + router, 2 * each, 2 * each + router


_SELECTIVE = ("x", "choice", "weight", "u_experts_gate_up", "u_experts_down")
MOE = Kind(
    name="moe",
    flag="train_mlp",
    params=_params,
    modules=_modules,
    pairs=_pairs,
    forward=_forward,
    backward=_backward,
    saved={"none": (*_SELECTIVE, "gate", "up"), "selective": _SELECTIVE},
    always=("choice", "weight"),
    exact=frozenset({"choice", "weight"}),
    in_stack=frozenset(MATRICES),
    us={"u_experts_gate_up": 2, "u_experts_down": 1},
    widths=_widths,
    live=lambda c: (_experts(c).per_token * _experts(c).d_ff, 0),
    multiply_adds=_multiply_adds,
)
