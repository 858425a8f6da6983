"""In which layouts do programs read an adapter of a gated delta rule? Its products apart, or as one matrix.

transformers has q, k and v of the rule as one linear layer, in some models z too (`Files.delta`), and peft and vLLM
adapt that layer. Each product keeps ranks of its own there: the A stand one above the other, and B is zero where the
ranks of one product meet the outputs of another. SGLang reads the products apart, as here.
"""

from __future__ import annotations

import numpy as np

from jax_client.models.config import GatedDelta, ModelConfig
from jax_client.models.families.registry import FAMILIES
from jax_client.weights.write.adapter_names import Pairs

# By `Files.delta`, the linear layer of several products.
FUSED = {"by product": "in_proj_qkv", "by head": "in_proj_qkvz"}
# What the rule is steered by, and its norm: files may keep them in float32 beside matrices in bfloat16, and they stay.
STEERING = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight")


def fused_name(c: ModelConfig) -> str:
    """Return transformers' name of the linear layer that several products are, the last part of it."""
    return FUSED[FAMILIES[c.family].files.delta]


def product_outputs(c: ModelConfig, delta: GatedDelta) -> dict[str, np.ndarray]:
    """Return which outputs of that linear layer are whose: int64 indices by the projection, in the order of ranks."""
    heads, keys = delta.key_heads, delta.key_dim
    values = delta.value_heads // heads * delta.value_dim  # of all value heads that share a key head
    widths = {"in_proj_q": keys, "in_proj_k": keys, "in_proj_v": values}
    if fused_name(c) == FUSED["by product"]:
        ends = np.cumsum([heads * width for width in widths.values()])
        return {
            name: np.arange(end - heads * width, end) for (name, width), end in zip(widths.items(), ends, strict=True)
        }
    widths["in_proj_z"] = values
    ends, all_of_head = np.cumsum(list(widths.values())), np.arange(heads * sum(widths.values())).reshape(heads, -1)
    return {
        name: all_of_head[:, end - width : end].reshape(-1)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def fused(c: ModelConfig, pairs: Pairs) -> Pairs:
    """Return the pairs with those of several products of a layer as one, A (n R, in) and B (n R, out); others as is."""
    if c.delta is None:
        return pairs
    outputs, found = product_outputs(c, c.delta), {}
    first, width = next(iter(outputs)), sum(map(len, outputs.values()))
    for linear, pair in pairs.items():
        prefix, _, projection = linear.rpartition(".")
        if projection not in outputs:
            found[linear] = pair
        elif projection == first:
            of = [pairs[f"{prefix}.{name}"] for name in outputs]
            a_NI = np.concatenate([a_RI for a_RI, _ in of])
            b_NO = np.zeros((len(a_NI), width), a_NI.dtype)
            for i, ((_, b_RO), at) in enumerate(zip(of, outputs.values(), strict=True)):
                b_NO[i * len(b_RO) : (i + 1) * len(b_RO), at] = b_RO
            found[f"{prefix}.{fused_name(c)}"] = a_NI, b_NO
    return found


def apart(c: ModelConfig, delta: GatedDelta, letter: str, whole: np.ndarray) -> dict[str, np.ndarray] | None:
    """Return each product's A (R, in) or B (out, R), by the projection; None where products share ranks.

    Args:
        c, delta: the model.
        letter: "A" or "B".
        whole: A (n R, in) or B (all out, n R) of the linear layer.
    """
    outputs = product_outputs(c, delta)
    R, rest = divmod(whole.shape["AB".index(letter)], len(outputs))
    if rest or not R:
        return None
    ranks = {name: slice(i * R, (i + 1) * R) for i, name in enumerate(outputs)}
    if letter == "A":
        return {name: whole[own] for name, own in ranks.items()}
    for name, own in ranks.items():
        if any(whole[at, own].any() for other, at in outputs.items() if other != name):
            return None
    return {name: whole[at, ranks[name]] for name, at in outputs.items()}
