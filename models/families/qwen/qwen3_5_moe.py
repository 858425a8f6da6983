"""What is the text model of a Qwen3.5 with experts? The layers of a Qwen3.5, with a mixture of experts in all of them.

A token's experts have weights that sum to 1, and one more expert is shared by all tokens. Releases have the experts of
a layer in two tensors, and transformers saves them one by one.
"""

from __future__ import annotations

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.hf_config import refuse_unless, text_config
from jax_client.models.families.qwen.qwen3_5 import NORMS_ADDED, VISION, hybrid_fields
from jax_client.models.families.qwen.qwen3_moe import read_experts


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a text model."""
    return _read("qwen3_5_moe", hf, where)


def config_of_tower(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a model that reads images: its `text_config`."""
    return _read("qwen3_5_moe_vision", text_config(hf, where, tied=False), where)


def _read(family: str, hf: HfConfig, where: str) -> ModelConfig:
    # Keys of other families with experts, which transformers does not read in this one.
    refuse_unless(hf, where, "norm_topk_prob", (None, True))
    refuse_unless(hf, where, "mlp_only_layers", (None, []))
    refuse_unless(hf, where, "decoder_sparse_step", (None, 1))
    keys = {**hf, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    experts = read_experts(keys, where, hf["num_hidden_layers"], shared=True)
    # No layer has one MLP, and no config says how wide it would be.
    fields = hybrid_fields({**hf, "intermediate_size": experts.d_ff}, where)
    return ModelConfig(family=family, experts=experts, **fields)


QWEN3_5_MOE = Family(
    name="qwen3_5_moe", architectures=("Qwen3_5MoeForCausalLM",), gguf=None, read=config_from_hf, files=NORMS_ADDED
)
QWEN3_5_MOE_VISION = Family(
    name="qwen3_5_moe_vision",
    architectures=("Qwen3_5MoeForConditionalGeneration",),
    gguf=None,
    read=config_of_tower,
    files=VISION,
)
