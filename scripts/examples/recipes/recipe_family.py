"""On which model, and under which names, are the recipes tried? SmolLM2, or a tiny random Qwen3.5 for its renderers.

Most recipes ask for a Qwen3.5 or 3.6 unless told otherwise. The random one has the layout of such a release: the text
model below `model.language_model.`, a vision tower and a predictor of several tokens, which are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_client.models.families.registry import config_from_hf
from jax_client.weights.read.names import expected_tensors
from jax_client.weights.read.source import EMBEDDED_MODEL, resolve
from jax_client.weights.read.tokenizer import load_tokenizer

# Recipes without a renderer_name take SmolLM2 for one that the cookbook knows; it speaks ChatML too.
ALIAS = "Qwen/Qwen3-4B-Instruct-2507"
# The model that the recipe of prompt distillation names in its source.
TEACHER = "Qwen/Qwen3.6-35B-A3B"
# Its thinking, tools and pictures are what ChatML of SmolLM2's tokenizer has no token for.
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "attention_bias": False,
    "attn_output_gate": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
# Of tensors that are not read, enough for both prefixes.
UNREAD = {
    "model.visual.patch_embed.proj.weight": (32, 3, 2, 16, 16),
    "model.visual.merger.norm.weight": (32,),
    "mtp.fc.weight": (64, 128),
    "mtp.layers.0.input_layernorm.weight": (64,),
}
# How transformers cuts pictures for it, which the renderer asks.
PICTURES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models of a run.

    Attributes:
        model: what the recipes are told.
        known: what those without a renderer_name are told, a name of the cookbook's list.
        renderer: what the recipes are told; None leaves it to each, and to the cookbook's list.
        names: under which the server has the model beside `model`, and the working directory the tokenizer.
        random: its answers are noise, and end where max_tokens ends them.
    """

    model: str
    known: str
    renderer: str | None
    names: Sequence[str]
    random: bool = False


FAMILIES: Mapping[str, Models] = {
    "smollm2": Models(model=EMBEDDED_MODEL, known=ALIAS, renderer="qwen3_instruct", names=(ALIAS, TEACHER)),
    "qwen3_5": Models(
        model="Qwen/Qwen3.5-4B",
        known="Qwen/Qwen3.5-4B",
        renderer=None,
        # The policies, teachers and graders of the recipes' defaults.
        names=("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-9B-Base", "Qwen/Qwen3.6-27B", "Qwen/Qwen3.5-397B-A17B", TEACHER),
        random=True,
    ),
}


def write_qwen3_5(folder: Path, *, seed: int = 0) -> None:
    """Write a random Qwen3.5 of 3.3 million parameters, with its tokenizer.

    Args:
        folder: gets config.json, bfloat16 safetensors, and SmolLM2's tokenizer with the tokens of Qwen3.5's renderers.
        seed: of the weights.
    """
    tokenizer = load_tokenizer(resolve(EMBEDDED_MODEL))
    tokenizer.add_tokens(list(WORDS))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(str(folder))
    rows = math.ceil(len(tokenizer) / 64) * 64
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {**TEXT, "vocab_size": rows, "eos_token_id": tokenizer.eos_token_id},
        "vision_config": {"model_type": "qwen3_5", "depth": 1, "hidden_size": 32},
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES, indent=2) + "\n", encoding="utf-8")
    rng = np.random.default_rng(seed)
    text = expected_tensors(config_from_hf(config, str(folder)))
    shapes = {name.replace("model.", "model.language_model.", 1): shape for name, shape in text.items()} | UNREAD
    tensors = {name: _drawn(name, shape, rng).astype(ml_dtypes.bfloat16) for name, shape in sorted(shapes.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return weights as a new model has them; all norms but the rule's are stored as what is added to 1."""
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape))
    if name.endswith(("dt_bias", "linear_attn.norm.weight")):
        return np.ones(shape)
    return np.zeros(shape) if "norm" in name else rng.normal(scale=0.05, size=shape)
