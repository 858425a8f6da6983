"""What is a Qwen2 / Qwen2.5? A Llama with biases on q, k and v."""

from __future__ import annotations

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.hf_config import refuse_sliding_window, shared_fields


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Qwen2 config.json; its window counts only with `use_sliding_window`."""
    refuse_sliding_window({"use_sliding_window": False, **hf}, where)
    return ModelConfig(family="qwen2", qkv_bias=True, **shared_fields(hf, where))


QWEN2 = Family(name="qwen2", architectures=("Qwen2ForCausalLM",), gguf="qwen2", read=config_from_hf)
