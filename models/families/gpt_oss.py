"""What is a gpt-oss? Experts with biases and a clamped swiglu, attention with sinks, and a window on half the layers.

Source: gpt-oss-120b and gpt-oss-20b model card, arXiv 2508.10925.
"""

from __future__ import annotations

from jax_client.models.config import Experts, ModelConfig, SwigluClamp
from jax_client.models.families.family import Family, Files, HfConfig
from jax_client.models.families.hf_config import (
    positive,
    read_rope,
    read_windows,
    shared_fields,
    windowed_layers,
)

# What transformers takes for keys that are absent, and for rotations that are null, too.
DEFAULTS = {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a gpt-oss config.json; where `layer_types` is absent, every other layer has a window from the first on."""
    hf = {**DEFAULTS, **hf}
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        hf["rope_parameters"] = ROPE
    rope = read_rope(hf, where, default_theta=150_000.0)
    biased = bool(hf.get("attention_bias", True))
    experts = Experts(
        # Two spellings: attributes of transformers' config have the second.
        count=hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"],
        per_token=hf["num_experts_per_tok"],
        d_ff=hf["intermediate_size"],
        normalized=True,
        biased=True,
    )
    return ModelConfig(
        family="gpt_oss",
        qkv_bias=biased,
        o_bias=biased,
        sinks=True,
        windows=read_windows(hf, where, windowed_layers(hf, where, lambda i: i % 2 == 0)),
        clamp=SwigluClamp(
            limit=positive(hf, where, "swiglu_limit", 7.0), alpha=positive(hf, where, "swiglu_alpha", 1.702)
        ),
        experts=experts,
        **shared_fields(hf, where, rope),
    )


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    gguf=None,
    read=config_from_hf,
    files=Files(router="mlp.router", experts="interleaved"),
)
