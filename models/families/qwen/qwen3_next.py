"""What is a Qwen3-Next? A Qwen3.5 with experts by other keys, and some layers with one MLP in place of them.

Its files hold the rule's products in by key head, and the layers that predict several tokens ("mtp") are not read.
"""

from __future__ import annotations

from dataclasses import replace

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.qwen.qwen3_5 import NORMS_ADDED, hybrid_fields
from jax_client.models.families.qwen.qwen3_moe import read_experts


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Qwen3-Next config.json."""
    fields = hybrid_fields(hf, where)
    experts = read_experts(hf, where, fields["n_layers"], shared=True)
    return ModelConfig(family="qwen3_next", experts=experts, **fields)


QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    gguf=None,
    read=config_from_hf,
    files=replace(NORMS_ADDED, delta="by head"),
)
