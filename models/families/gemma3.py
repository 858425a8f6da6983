"""What is a Gemma 3? Norms on both sides of each part, a geglu, and a window on five of six layers.

The layers with a window rotate by a frequency of their own. Norms are stored as what is added to 1. Of the models that
read images, too, the text model alone is read.

Source: Gemma 3 technical report, arXiv 2503.19786.
"""

from __future__ import annotations

import math
from dataclasses import replace

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, Files, HfConfig, Tower
from jax_client.models.families.hf_config import (
    from_one,
    positive,
    read_rope,
    read_windows,
    refuse_unless,
    shared_fields,
    text_config,
    windowed_layers,
)

# What transformers takes for a key that is absent; releases leave out many.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a Gemma 3 that has text alone."""
    return _read({**DEFAULTS, **hf}, where)


def config_of_tower(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a Gemma 3 with a vision tower: its `text_config`."""
    text = text_config(hf, where, tied=True)
    return replace(_read({**DEFAULTS, **text}, where), family="gemma3_vision")


def _read(hf: HfConfig, where: str) -> ModelConfig:
    refuse_unless(hf, where, "hidden_activation", (None, "gelu_pytorch_tanh"))
    refuse_unless(hf, where, "attention_bias", (None, False))
    for softcap in ("attn_logit_softcapping", "final_logit_softcapping"):
        refuse_unless(hf, where, softcap, (None,))
    refuse_unless(hf, where, "use_bidirectional_attention", (None, False))
    each = from_one(hf["sliding_window_pattern"], "sliding_window_pattern", where)
    windowed = windowed_layers(hf, where, lambda i: (i + 1) % each != 0)
    local = read_rope(hf, where, "sliding_attention", 10_000.0)
    fields = shared_fields(hf, where, read_rope(hf, where, "full_attention", 1_000_000.0))
    scalar = positive(hf, where, "query_pre_attn_scalar", 256)
    return ModelConfig(
        family="gemma3",
        qk_norm=True,
        query_scale=None if scalar == fields["head_dim"] else scalar**-0.5,
        windows=read_windows(hf, where, windowed, local),
        activation="geglu",
        post_norms=True,
        embedding_scale=math.sqrt(fields["d_model"]),
        **fields,
    )


FILES = Files(
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    added_to_one=True,
)
GEMMA3 = Family(name="gemma3", architectures=("Gemma3ForCausalLM",), gguf=None, read=config_from_hf, files=FILES)
GEMMA3_VISION = Family(
    name="gemma3_vision",
    architectures=("Gemma3ForConditionalGeneration",),
    gguf=None,
    read=config_of_tower,
    files=replace(
        FILES,
        tower=Tower(
            modules="model.language_model.",
            # The second form is that of files from before transformers 4.52.
            stored=(("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")),
            others=("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector."),
        ),
    ),
)
