"""In which layouts do programs read an adapter of experts? Apart, fused as peft has them, or shared as here.

transformers has the experts of a layer as two parameters, gate_up and down, and peft adapts these: A is expert after
expert, B's columns are rank after rank with the expert running fastest. Gate and up together take twice the rank, as a
block each. Whether a parameter has the input or the output first does not matter to A and B; whether it has gate and up
by turns does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jax_client.models.config import ModelConfig
from jax_client.models.families.registry import FAMILIES
from jax_client.models.parts.mixture.moe import MOE
from jax_client.models.plan import kinds, layers_of
from jax_client.weights.towers import module_name
from jax_client.weights.write.adapter_names import Pairs

# The parameters of transformers that hold all experts of a layer, and which projections each has; `Files.experts` says
# in which order. These are the ends of their names in files, too.
PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# The projections of an expert in the names that the shared layout has.
SHARED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# peft's names of the matrices of gate_up and down: the second wraps the first.
FUSED = {"gate_up": "base_layer.", "down": ""}
GATE_UP = r".*\.gate_up_proj"
# Families whose releases have the experts of a layer in one tensor, by rows.
BY_ROWS = ("qwen3_5_moe", "qwen3_5_moe_vision")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def has_experts(c: ModelConfig, pairs: Pairs) -> bool:
    """Return whether an adapter covers experts."""
    return MOE in kinds(c) and any(".experts." in name for name in pairs)


def _experts(c: ModelConfig, pairs: Pairs) -> Mapping[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]:
    """Return the pairs of all experts of each layer by projection, under the layer's prefix."""
    count = 0 if c.experts is None else c.experts.count
    return {
        (prefix := module_name(f"model.layers.{layer}.mlp.experts", c)): {
            projection: [pairs[f"{prefix}.{e}.{projection}"] for e in range(count)] for projection in SHARED
        }
        for layer in layers_of(c, MOE)
    }


def fused_product(pairs: Sequence[tuple[np.ndarray, np.ndarray]], order: str) -> np.ndarray:
    """Return A B of an expert's gate and up, or of its down alone, as the matrix that a file has of them.

    Args:
        pairs: A (R, in) and B (R, out) of gate and of up, or of down.
        order: `Files.experts`.
    """
    if order == "rows":
        return np.concatenate([b_RO.T @ a_RI for a_RI, b_RO in pairs])
    if order == "columns" or len(pairs) == 1:
        return np.concatenate([a_RI.T @ b_RO for a_RI, b_RO in pairs], axis=1)
    # As one product, of which each B has columns of its own, it is written in order.
    (gate_RI, gate_RO), (up_RI, up_RO) = pairs
    R, F = gate_RO.shape
    b = np.zeros((2 * R, 2 * F), gate_RO.dtype)
    b[:R, ::2], b[R:, 1::2] = gate_RO, up_RO
    return np.concatenate([gate_RI, up_RI]).T @ b


def in_one_tensor(c: ModelConfig) -> bool:
    """Return whether a family's releases have the experts of a layer in one tensor; vLLM then wants peft's form."""
    return FAMILIES[c.family].files.experts != "rows" or c.family in BY_ROWS


def fused(c: ModelConfig, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the matrices of an adapter as peft has them, A (n, in) and B (out, n)."""
    found: dict[str, np.ndarray] = {}
    for name, (a_RI, b_RO) in pairs.items():
        if ".experts." not in name:
            found |= {f"{name}.lora_A": a_RI, f"{name}.lora_B": b_RO.T}
    for prefix, of in _experts(c, pairs).items():
        each = zip(of["gate_proj"], of["up_proj"], strict=True)
        both = [(np.concatenate([a, a2]), _blocks(c, b.T, b2.T)) for (a, b), (a2, b2) in each]
        down = [(a, b.T) for a, b in of["down_proj"]]
        for which, matrices in (("gate_up", both), ("down", down)):
            name = f"{prefix}.{FUSED[which]}lora_"
            found[name + "A"] = np.concatenate([a for a, _ in matrices])
            b_OnE = np.stack([b for _, b in matrices], axis=-1)
            found[name + "B"] = b_OnE.reshape(len(b_OnE), -1)
    return found


def _blocks(c: ModelConfig, b_FR: np.ndarray, b2_FR: np.ndarray) -> np.ndarray:
    """Return B of gate and up as one (2F, 2R): each has columns of its own, and its rows where the model has them."""
    (F, R), rows = b_FR.shape, gate_up_rows(c)
    both = np.zeros((2 * F, 2 * R), b_FR.dtype)
    both[rows["gate_proj"], :R], both[rows["up_proj"], R:] = b_FR, b2_FR
    return both


def gate_up_rows(c: ModelConfig) -> dict[str, slice]:
    """Return which outputs of gate and up as one are whose."""
    if FAMILIES[c.family].files.experts == "interleaved":
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    F = 0 if c.experts is None else c.experts.d_ff
    return {"gate_proj": slice(0, F), "up_proj": slice(F, None)}


def shared(c: ModelConfig, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the matrices with those of a layer's experts as one array (E, ...), or (1, ...) where all share it."""
    found: dict[str, np.ndarray] = {}
    for name, (a_RI, b_RO) in pairs.items():
        if ".experts." not in name:
            found |= {f"{name}.lora_A": a_RI, f"{name}.lora_B": b_RO.T}
    for prefix, of in _experts(c, pairs).items():
        for projection, matrices in of.items():
            a, b = np.stack([a for a, _ in matrices]), np.stack([b.T for _, b in matrices])
            name = f"{prefix}.{SHARED[projection]}.lora_"
            one_a, one_b = projection != "down_proj", projection == "down_proj"
            found |= {name + "A": a[:1] if one_a else a, name + "B": b[:1] if one_b else b}
    return found
