"""What is the text model of a Qwen3.5, 3.6 or 3.8? Three layers with a gated delta rule, then one with gated attention.

Attention rotates a part of each head. All norms but that of the rule are stored as what is added to 1. The three rotary
positions of the models that read images are equal for text, so that these rotate as others do. Neither their vision
tower nor the layers that predict several tokens ("mtp") are read.
"""

from __future__ import annotations

from typing import Any

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import GatedDelta, ModelConfig
from jax_client.models.families.family import Family, Files, HfConfig, Tower
from jax_client.models.families.hf_config import (
    from_one,
    layer_types,
    read_rope,
    refuse_unless,
    shared_fields,
    text_config,
)

TYPES = ("linear_attention", "full_attention")
PREDICTION = "mtp."


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a text model."""
    return ModelConfig(family="qwen3_5", **hybrid_fields(hf, where))


def config_of_tower(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a model that reads images: its `text_config`."""
    return ModelConfig(family="qwen3_5_vision", **hybrid_fields(text_config(hf, where, tied=False), where))


def hybrid_fields(hf: HfConfig, where: str) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a model whose layers have the rule, or gated attention."""
    refuse_unless(hf, where, "attention_bias", (None, False))
    refuse_unless(hf, where, "attn_output_gate", (None, True))
    rope = read_rope({"partial_rotary_factor": 0.25, **hf}, where)
    size = lambda key: from_one(hf[key], key, where)  # noqa: E731
    delta = GatedDelta(
        layers=_recurrent_layers(hf, where),
        key_heads=size("linear_num_key_heads"),
        value_heads=size("linear_num_value_heads"),
        key_dim=size("linear_key_head_dim"),
        value_dim=size("linear_value_head_dim"),
        taps=size("linear_conv_kernel_dim"),
    )
    if hf["head_dim"] is None:
        raise BadRequestError(f"{where}: head_dim is null; it must be an integer from 1 on.")
    fields = shared_fields(hf, where, rope, partial=True)
    return fields | {"qk_norm": True, "output_gate": True, "delta": delta if delta.layers else None}


def _recurrent_layers(hf: HfConfig, where: str) -> tuple[int, ...]:
    """Return which layers have the rule: by `layer_types`, or all but each `full_attention_interval`-th."""

    def usual(layer: int) -> str:
        each = from_one(hf.get("full_attention_interval", 4), "full_attention_interval", where)
        return TYPES[(layer + 1) % each == 0]

    types = layer_types(hf, where, TYPES, usual)
    if TYPES[1] not in types:
        raise UnsupportedError(
            f"{where}: no layer of layer_types is {TYPES[1]!r}; a model without attention is not supported. Use one "
            "that has it in some layers."
        )
    return tuple(i for i, kind in enumerate(types) if kind == TYPES[0])


NORMS_ADDED = Files(
    added_to_one=True, tower=Tower(modules="model.", stored=(("model.", "lm_head."),), others=(PREDICTION,))
)
VISION = Files(
    added_to_one=True,
    tower=Tower(
        modules="model.language_model.",
        stored=(("model.language_model.", "lm_head."),),
        others=("model.visual.", PREDICTION),
    ),
)
QWEN3_5 = Family(
    name="qwen3_5", architectures=("Qwen3_5ForCausalLM",), gguf=None, read=config_from_hf, files=NORMS_ADDED
)
QWEN3_5_VISION = Family(
    name="qwen3_5_vision",
    architectures=("Qwen3_5ForConditionalGeneration",),
    gguf=None,
    read=config_of_tower,
    files=VISION,
)
