"""What is a gated MLP as a residual part? Fused gate|up, an activation, a down projection.

    g, u = h (W_gate, W_up)
    y    = (silu(g) * u) W_down          or another activation of g and u, see `activations`

Every x W that the adapter covers is x W + (alpha / R) (x A) B.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.models.parts.activations import activation_of
from jax_client.models.parts.kind import Context, Kept, Kind, Mixing, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter, Pair, fused_pair
from jax_client.models.specs import LoraArray, ParamSpec


def _params(c: ModelConfig, dtype: jnp.dtype) -> dict[str, ParamSpec]:
    D, F = c.d_model, c.d_ff
    return {
        "gate_up_L2DF": ParamSpec(shape=(2, D, F), dtype=dtype, axes=(None, "embed", "ffw")),
        "down_LFD": ParamSpec(shape=(F, D), dtype=dtype, axes=("ffw", "embed")),
    }


def _modules(c: ModelConfig, rank: int) -> dict[str, dict[str, LoraArray]]:
    D, F, R = c.d_model, c.d_ff, rank
    into, out = LoraArray((R, D), (None, None), D), LoraArray((R, F), (None, "ffw"), 0)
    down = {"A": LoraArray((R, F), (None, "ffw"), F), "B": LoraArray((R, D), (None, None), 0)}
    return {"gate": {"A": into, "B": out}, "up": {"A": into, "B": out}, "down": down}


def _pairs(lora: Adapter) -> dict[str, Pair]:
    if "gate" not in lora:
        return {}
    return {"gate_up": fused_pair(lora, "gate", "up"), "down": (lora["down"]["A"], [lora["down"]["B"]])}


def _forward(
    h_MD: jax.Array,
    rows: tuple[int, int],
    w: Weights,
    linears: Linears | MixedLinears,
    c: Context,
    mixing: Mixing,
    known: Saved,
) -> tuple[jax.Array, Saved, Kept]:
    gate_MF, up_MF = linears.forward("gate_up", h_MD, *w["gate_up_L2DF"])
    (y_MD,) = linears.forward("down", activation_of(c.config).forward(gate_MF, up_MF), w["down_LFD"])
    return y_MD, {"gate": gate_MF, "up": up_MF}, None


def _backward(
    dy_MD: jax.Array,
    h: Callable[[], jax.Array],
    saved: Saved,
    w: Weights,
    linears: Linears,
    c: Context,
    segments_BT: jax.Array,
) -> jax.Array:
    gate_MF, up_MF, activation = saved["gate"], saved["up"], activation_of(c.config)
    da_MF = linears.backward("down", [dy_MD], activation.forward(gate_MF, up_MF), w["down_LFD"])
    _, dgate_MF, dup_MF = activation.backward(da_MF, gate_MF, up_MF)
    return linears.backward("gate_up", [dgate_MF, dup_MF], h(), *w["gate_up_L2DF"])


def _widths(c: ModelConfig, tensor: int) -> dict[str, int]:
    return {"x": c.d_model, "gate": c.d_ff // tensor, "up": c.d_ff // tensor}


DENSE = Kind(
    name="dense",
    flag="train_mlp",
    params=_params,
    modules=_modules,
    pairs=_pairs,
    forward=_forward,
    backward=_backward,
    saved={"none": ("x", "gate", "up", "u_gate_up", "u_down"), "selective": ("x",)},
    needed=frozenset({"x", "gate", "up"}),
    us={"u_gate_up": 2, "u_down": 1},
    widths=_widths,
    live=lambda c: (c.d_ff, 0),
    multiply_adds=lambda c: (3 * c.d_model * c.d_ff, 2 * c.d_model * c.d_ff, 2 * c.d_model * c.d_ff),
)
