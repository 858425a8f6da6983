"""What is a Mistral? A Llama, in its first release with a window on every layer."""

from __future__ import annotations

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.hf_config import read_windows, refuse_unless, shared_fields


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Mistral config.json."""
    hf = {"sliding_window": 4096, **hf}  # what transformers takes where the key is absent; null is none
    refuse_unless(hf, where, "attention_bias", (None, False))
    fields = shared_fields(hf, where)
    windowed = [] if hf.get("sliding_window") is None else range(fields["n_layers"])
    return ModelConfig(family="mistral", windows=read_windows(hf, where, windowed), **fields)


MISTRAL = Family(name="mistral", architectures=("MistralForCausalLM",), gguf=None, read=config_from_hf)
