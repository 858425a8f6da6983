"""What is a Gemma 3? Norms on both sides of each part, a geglu, and a window on five of six layers.

The layers with a window rotate by a frequency of their own. Norms are stored as what is added to 1.

Source: Gemma 3 technical report, arXiv 2503.19786.
"""

from __future__ import annotations

import math

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, Files, HfConfig
from jax_client.models.families.hf_config import (
    positive,
    read_rope,
    read_windows,
    refuse_unless,
    shared_fields,
    windowed_layers,
)

# What transformers takes for a key that is absent; releases leave out many.
DEFAULTS = {
    "vocab_size": 262_208,
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
    hf = {**DEFAULTS, **hf}
    refuse_unless(hf, where, "hidden_activation", (None, "gelu_pytorch_tanh"))
    refuse_unless(hf, where, "attention_bias", (None, False))
    for softcap in ("attn_logit_softcapping", "final_logit_softcapping"):
        refuse_unless(hf, where, softcap, (None,))
    refuse_unless(hf, where, "use_bidirectional_attention", (None, False))
    each = int(positive(hf, where, "sliding_window_pattern", 6))
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


GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    gguf=None,
    read=config_from_hf,
    files=Files(
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        added_to_one=True,
    ),
)
