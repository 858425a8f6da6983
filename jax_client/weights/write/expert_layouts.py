"""In which layouts do programs read an adapter of experts? Apart, fused as peft has them, or shared as here.

transformers has the experts of a layer as two parameters, gate_up (E, 2F, D) and down (E, D, F), and peft adapts these:
A is expert after expert, B's columns are rank after rank with the expert running fastest. Gate and up together take
twice the rank, as a block each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jax_client.models.config import ModelConfig
from jax_client.models.parts.moe import MOE
from jax_client.models.plan import kinds, layers_of
from jax_client.weights.write.adapter_names import Pairs

# The projections of an expert in the names that the shared layout has.
SHARED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# peft's names of the matrices of gate_up and down: the second wraps the first.
FUSED = {"gate_up": "base_layer.", "down": ""}
GATE_UP = r".*\.gate_up_proj"
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def has_experts(c: ModelConfig, pairs: Pairs) -> bool:
    """Return whether an adapter covers experts."""
    return MOE in kinds(c) and any(".experts." in name for name in pairs)


def _experts(c: ModelConfig, pairs: Pairs) -> Mapping[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]:
    """Return the pairs of all experts of each layer by projection, under the layer's prefix."""
    count = 0 if c.experts is None else c.experts.count
    return {
        (prefix := f"model.layers.{layer}.mlp.experts"): {
            projection: [pairs[f"{prefix}.{e}.{projection}"] for e in range(count)] for projection in SHARED
        }
        for layer in layers_of(c, MOE)
    }


def fused(c: ModelConfig, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the matrices of an adapter as peft has them, A (n, in) and B (out, n)."""
    found: dict[str, np.ndarray] = {}
    for name, (a_RI, b_RO) in pairs.items():
        if ".experts." not in name:
            found |= {f"{name}.lora_A": a_RI, f"{name}.lora_B": b_RO.T}
    for prefix, of in _experts(c, pairs).items():
        each = zip(of["gate_proj"], of["up_proj"], strict=True)
        both = [(np.concatenate([a, a2]), _blocks(b.T, b2.T)) for (a, b), (a2, b2) in each]
        down = [(a, b.T) for a, b in of["down_proj"]]
        for which, matrices in (("gate_up", both), ("down", down)):
            name = f"{prefix}.{FUSED[which]}lora_"
            found[name + "A"] = np.concatenate([a for a, _ in matrices])
            b_OnE = np.stack([b for _, b in matrices], axis=-1)
            found[name + "B"] = b_OnE.reshape(len(b_OnE), -1)
    return found


def _blocks(b_OR: np.ndarray, b2_OR: np.ndarray) -> np.ndarray:
    """Return a matrix with two blocks on its diagonal."""
    zeros = np.zeros_like(b_OR)
    return np.block([[b_OR, zeros], [zeros, b2_OR]])


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
