"""What is a dense Qwen3? A Llama with RMS norms over each query and key head, and a head width of its own."""

from __future__ import annotations

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.hf_config import refuse_sliding_window, refuse_unless, shared_fields


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Qwen3 config.json."""
    refuse_unless(hf, where, "attention_bias", (None, False))
    refuse_sliding_window({"use_sliding_window": False, **hf}, where)
    fields = shared_fields(hf, where)
    fields["head_dim"] = hf.get("head_dim") or 128
    return ModelConfig(family="qwen3", qk_norm=True, **fields)


QWEN3 = Family(name="qwen3", architectures=("Qwen3ForCausalLM",), gguf="qwen3", read=config_from_hf)
