"""What is the text model of a Qwen3-VL with experts? A Qwen3 mixture of experts, with a vision tower that is not read.

Its three rotary positions are equal for text, so that it rotates as a Qwen3 does.
"""

from __future__ import annotations

from dataclasses import replace

from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Family, Files, HfConfig, Tower
from jax_client.models.families.hf_config import refuse_unless, text_config
from jax_client.models.families.qwen import qwen3_moe


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read the config.json of a Qwen3-VL with experts: its `text_config`."""
    text = text_config(hf, where, tied=False)
    # The layers always divide by the sum of the chosen experts' weights.
    refuse_unless(text, where, "norm_topk_prob", (None, True))
    text["norm_topk_prob"] = True
    if text.get("rope_theta") is None:
        text["rope_theta"] = 500_000.0
    return replace(qwen3_moe.config_from_hf(text, where), family="qwen3_vl_moe")


QWEN3_VL_MOE = Family(
    name="qwen3_vl_moe",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    gguf=None,
    read=config_from_hf,
    files=Files(
        experts="columns",
        tower=Tower(
            modules="model.language_model.",
            stored=(("model.language_model.", "lm_head."),),
            others=("model.visual.",),
        ),
    ),
)
