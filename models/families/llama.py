"""What is a Llama (Llama 3.x, SmolLM2)? The plain decoder: no biases, no q/k norm."""

from __future__ import annotations

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.hf_config import refuse_sliding_window, refuse_unless, shared_fields


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Llama config.json."""
    refuse_unless(hf, where, "attention_bias", (None, False))
    refuse_sliding_window(hf, where)
    return ModelConfig(family="llama", **shared_fields(hf, where))


LLAMA = Family(name="llama", architectures=("LlamaForCausalLM",), gguf="llama", read=config_from_hf)
