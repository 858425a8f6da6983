"""What is a mixture of experts as a residual part? A router, k of E gated MLPs for each token, and their weighted sum.

    w, e = the k largest of softmax(h W_r), and which these are
    y    = sum_j w_j (silu(h W_gate,e) * (h W_up,e)) W_down,e           e = e_j

gpt-oss has biases beside all four matrices, and another activation. Qwen3.5 adds an expert of all tokens (`shared`).
An adapter has for gate and up one A that all experts share and a B of each, for down an A of each and one B: the
shared-outer form, at full rank. So (h A) is computed once per token, and what the experts add for down is summed at the
width of the rank. Router and experts are frozen; the gradient goes through the weights w.

Source: Qwen3, arXiv 2505.09388; the router's softmax, arXiv 2101.03961; sorted rows, arXiv 2211.15841.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_client.models.config import Experts, ModelConfig
from jax_client.models.layers import InStack, contract
from jax_client.models.parts.activations import activation_of
from jax_client.models.parts.kind import Context, Kept, Kind, Mixing, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter, Pair, fused_pair
from jax_client.models.parts.mixture import experts, shared
from jax_client.models.parts.mixture.router import route, route_backward
from jax_client.models.specs import LoraArray, ParamSpec
from jax_client.sharding import ROWS, sharding_for


def _experts(c: ModelConfig) -> Experts:
    if c.experts is None:
        raise ValueError("a model without experts has no mixture of them")
    return c.experts


def _params(c: ModelConfig, dtype: jnp.dtype) -> dict[str, ParamSpec]:
    D, E, F = c.d_model, _experts(c).count, _experts(c).d_ff
    f32, into = jnp.dtype(jnp.float32), ParamSpec(shape=(E, D, F), dtype=dtype, axes=("experts", None, "ffw"))
    biases = {}
    if _experts(c).biased:
        bias = ParamSpec(shape=(E, F), dtype=f32, axes=("experts", "ffw"))
        biases = {
            "router_bias_LE": ParamSpec(shape=(E,), dtype=f32, axes=(None,)),
            "experts_gate_bias_LEF": bias,
            "experts_up_bias_LEF": bias,
            "experts_down_bias_LED": ParamSpec(shape=(E, D), dtype=f32, axes=("experts", None)),
        }
    return {
        "router_LDE": ParamSpec(shape=(D, E), dtype=f32, axes=(None, None)),
        "experts_gate_LEDF": into,
        "experts_up_LEDF": into,
        "experts_down_LEFD": ParamSpec(shape=(E, F, D), dtype=dtype, axes=("experts", "ffw", None)),
        **biases,
        **shared.params(c, dtype),
    }


def _modules(c: ModelConfig, rank: int) -> dict[str, dict[str, LoraArray]]:
    D, E, F, R = c.d_model, _experts(c).count, _experts(c).d_ff, rank
    each = (None, "experts", "ffw")
    into = {"A": LoraArray((R, D), (None, None), D), "B": LoraArray((R, E, F), each, 0)}
    down = {"A": LoraArray((R, E, F), each, F), "B": LoraArray((R, D), (None, None), 0)}
    return {"experts_gate": into, "experts_up": into, "experts_down": down} | shared.modules(c, rank)


def _pairs(lora: Adapter) -> dict[str, Pair]:
    if "experts_gate" not in lora:
        return {}
    (a_nD, _), down = fused_pair(lora, "experts_gate", "experts_up"), lora["experts_down"]
    bs_REF = [lora[name]["B"] for name in ("experts_gate", "experts_up")]
    return {"experts_gate_up": (a_nD, bs_REF), "experts_down": (down["A"], [down["B"]])} | shared.pairs(lora)


def _forward(
    h_MD: jax.Array,
    rows: tuple[int, int],
    w: Weights,
    linears: Linears | MixedLinears,
    c: Context,
    mixing: Mixing,
    known: Saved,
) -> tuple[jax.Array, Saved, Kept]:
    if "choice" in known:
        choice_Mk, weight_Mk = known["choice"], known["weight"]
    else:
        k = _experts(c.config).per_token
        choice_Mk, weight_Mk = route(h_MD, w["router_LDE"], k, **_router_options(w, c))
    into, out = linears.pair("experts_gate_up"), linears.pair("experts_down")
    if into is not None:
        u_Mn = contract("MD,nD->Mn", h_MD, into[0], c.dtype) * linears.scale("experts_gate_up")
        linears.us["u_experts_gate_up"] = u_Mn
    sent, owned = _sent(h_MD, choice_Mk, weight_Mk, linears, c), _owned(w, linears)
    y_MD, a_MR, kept = _on_devices(experts.forward, c, ("tokens", "tokens", "tokens"))(sent, owned)
    if out is not None and a_MR is not None:
        u_MR = a_MR * linears.scale("experts_down")
        linears.us["u_experts_down"] = u_MR
        y_MD += contract("MR,RD->MD", u_MR, out[1][0], c.dtype)
    saved = {"choice": choice_Mk, "weight": weight_Mk} | dict(zip(("gate", "up"), kept, strict=False))
    if shared.width(c.config):
        of_all_MD, more = shared.forward(h_MD, w, linears, c)
        y_MD, saved = y_MD + of_all_MD, saved | more
    return y_MD, saved, None


def _backward(
    dy_MD: jax.Array,
    h: Callable[[], jax.Array],
    saved: Saved,
    w: Weights,
    linears: Linears,
    c: Context,
    segments_BT: jax.Array,
) -> jax.Array:
    h_MD, choice_Mk, weight_Mk = h(), saved["choice"], saved["weight"]
    into, out, db_MR = linears.pair("experts_gate_up"), linears.pair("experts_down"), None
    if out is not None:
        db_MR = contract("MD,RD->MR", dy_MD, out[1][0], c.dtype) * linears.scale("experts_down")
    sent, owned = _sent(h_MD, choice_Mk, weight_Mk, linears, c), _owned(w, linears)
    kept = tuple(saved[name] for name in ("gate", "up") if name in saved)
    run = _on_devices(experts.backward, c, ("tokens", "tokens", "tokens", "experts"))
    dh_MD, dweight_Mk, du_Mn, grads = run(sent, owned, dy_MD.astype(c.dtype), db_MR, kept)
    if into is not None and du_Mn is not None:
        du_Mn *= linears.scale("experts_gate_up")
        dh_MD += contract("Mn,nD->MD", du_Mn, into[0], c.dtype)
        linears.put_grad("experts_gate_up", (contract("Mn,MD->nD", du_Mn, h_MD, c.dtype), list(grads[:2])))
        db_RD = contract("MR,MD->RD", linears.us["u_experts_down"], dy_MD, c.dtype)
        linears.put_grad("experts_down", (grads[2], [db_RD]))
    if shared.width(c.config):
        dh_MD += shared.backward(dy_MD, h_MD, saved, w, linears, c)
    options = _router_options(w, c)
    return dh_MD + route_backward(dweight_Mk, h_MD, choice_Mk, weight_Mk, w["router_LDE"], **options)


def _router_options(w: Weights, c: Context) -> dict[str, Any]:
    return {"normalized": _experts(c.config).normalized, "bias_E": w.get("router_bias_LE")}


def _sent(
    h_MD: jax.Array, choice_Mk: jax.Array, weight_Mk: jax.Array, linears: Linears | MixedLinears, c: Context
) -> experts.Sent:
    u_Mn = linears.us.get("u_experts_gate_up")
    return experts.Sent(h_MD.astype(c.dtype), choice_Mk, weight_Mk, None if u_Mn is None else u_Mn.astype(c.dtype))


def _owned(w: Weights, linears: Linears | MixedLinears) -> experts.Owned:
    matrices = {name: w[name] for name in experts.MATRICES}
    biases = {name: w[name] for name in experts.BIASES if name in w}
    into, out = linears.pair("experts_gate_up"), linears.pair("experts_down")
    if into is None or out is None:
        return experts.Owned(matrices, None, biases)
    return experts.Owned(matrices, experts.Lora((into[1][0], into[1][1]), out[0]), biases)


def _on_devices(function: Callable[..., Any], c: Context, results: tuple[str, ...]) -> Callable[..., Any]:
    """Return a function of `experts` that runs on each device over what that has of the arguments.

    A sampling program runs on each device already.

    Args:
        function: `f(sent, owned, *tokens, how=how) -> results`.
        c: has the mesh.
        results: of each result, whether its arrays go by "tokens" or are (R, E, F), and go by "experts".
    """
    rounded = c.dtype if c.accelerator else jnp.dtype(jnp.float32)
    how = {"dtype": c.dtype, "result": rounded, "on_cpu": not c.accelerator, "activation": activation_of(c.config)}
    if c.mesh is None:
        return partial(function, how=experts.How(**how, split=experts.Split()))
    split = split_of(c.mesh, _experts(c.config).count)
    run = partial(function, how=experts.How(**how, split=split))
    if c.on_device:
        return run
    ways = split.ways
    tokens, each = PartitionSpec(ROWS), PartitionSpec(None, ways or None, "tensor")
    into, down = PartitionSpec(None, ways or None, None, "tensor"), PartitionSpec(None, ways or None, "tensor", None)
    in_stack, of_device = cast(Any, InStack), cast(Any, experts.Owned)  # of specs in place of arrays
    matrices = {n: in_stack(p, PartitionSpec()) for n, p in zip(experts.MATRICES, (into, into, down), strict=True)}
    width = PartitionSpec(None, ways or None, None)
    biases = {n: in_stack(p, PartitionSpec()) for n, p in zip(experts.BIASES, (each, each, width), strict=True)}
    owned_specs = of_device(matrices, each, biases if _experts(c.config).biased else {})

    def on_mesh(sent: experts.Sent, owned: experts.Owned, *others: Any) -> Any:
        specs = tokens, owned_specs, *(tokens,) * len(others)
        out = tuple(each if by == "experts" else tokens for by in results)
        return jax.shard_map(run, mesh=c.mesh, in_specs=specs, out_specs=out, check_vma=False)(sent, owned, *others)

    return on_mesh


def split_of(mesh: Mesh, count: int) -> experts.Split:
    """Return how a mesh splits `count` experts."""
    of_experts = sharding_for(("experts",), (count,), mesh).spec[0]
    ways = (of_experts,) if isinstance(of_experts, str) else tuple(of_experts or ())
    return experts.Split(
        ways=ways,
        replicas=tuple(axis for axis in ROWS if axis not in ways and mesh.shape[axis] > 1),
        tensor=("tensor",) if mesh.shape["tensor"] > 1 else (),
        count=math.prod(mesh.shape[axis] for axis in ways),
    )


def _widths(c: ModelConfig, tensor: int) -> dict[str, int]:
    hidden = _experts(c).per_token * _experts(c).d_ff // tensor
    return {"x": c.d_model, "gate": hidden, "up": hidden} | dict.fromkeys(shared.SAVED, shared.width(c) // tensor)


def _multiply_adds(c: ModelConfig) -> tuple[int, int, int]:
    experts = _experts(c)
    each, router = c.d_model * (experts.per_token * experts.d_ff + shared.width(c)), c.d_model * experts.count
    router += c.d_model * bool(shared.width(c))  # each token's share
    return 3 * each + router, 2 * each, 2 * each + router


_ALWAYS = ("choice", "weight", "u_experts_down")
_SELECTIVE = ("x", "u_experts_gate_up", *_ALWAYS)
MOE = Kind(
    name="moe",
    flag="train_mlp",
    params=_params,
    modules=_modules,
    pairs=_pairs,
    forward=_forward,
    backward=_backward,
    saved={"none": (*_SELECTIVE, "gate", "up", *shared.SAVED), "selective": _SELECTIVE},
    always=_ALWAYS,
    needed=frozenset({"x", "choice", "weight"}),
    exact=frozenset({"choice", "weight"}),
    in_stack=frozenset((*experts.MATRICES, *experts.BIASES)),
    us={"u_experts_gate_up": 2, "u_experts_down": 1},
    widths=_widths,
    live=lambda c: (_experts(c).per_token * _experts(c).d_ff + shared.width(c), 0),
    multiply_adds=_multiply_adds,
)
