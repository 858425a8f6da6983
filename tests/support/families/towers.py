"""Which tiny models with a vision tower are there, and what are their files?

Weights of the text model come from seeds, those of a vision tower from transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jax_client.models.config import ModelConfig
from jax_client.models.families.registry import FAMILIES, config_from_hf
from jax_client.models.lora_arrays import array_shapes
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.read.names import expected_tensors
from support.families import cases
from support.weight_files import write_hf

SPEC = LoraSpec(rank=4, seed=0)
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": 120,
        "video_token_id": 121,
        "vision_start_token_id": 122,
        "vision_end_token_id": 123,
        "text_config": _TEXT
        | {
            "model_type": "qwen3_vl_moe_text",
            "num_hidden_layers": 2,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "eos_token_id": 2,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        "tie_word_embeddings": False,
    },
    # As in the releases, most keys are absent, and ends of sequences are in the outer config.
    "gemma3_vision": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "image_token_index": 120,
        "boi_token_index": 121,
        "eoi_token_index": 122,
        "mm_tokens_per_image": 4,
        "text_config": _TEXT
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    },
}
_HYBRID = {name: value for name, value in cases.CASES["qwen3_5"].items() if name != "architectures"}
CASES["qwen3_5_vision"] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
    "text_config": _HYBRID,
    "vision_config": {
        "model_type": "qwen3_5",
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
}
CASES["qwen3_5_moe_vision"] = CASES["qwen3_5_vision"] | {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {name: value for name, value in cases.CASES["qwen3_5_moe"].items() if name != "architectures"},
    "vision_config": CASES["qwen3_5_vision"]["vision_config"] | {"model_type": "qwen3_5_moe"},
}
# With these no token of the data has two experts of almost equal probability.
SEEDS = {"qwen3_vl_moe": 0, "gemma3_vision": 1}


def model_config(case: str) -> ModelConfig:
    return config_from_hf(CASES[case], case)


def text(case: str) -> dict[str, np.ndarray]:
    """Return the text model's weights, under the names of a model that has text alone."""
    if case.startswith("qwen3_5"):
        return cases.tensors(case.removesuffix("_vision"))
    rng, found = np.random.default_rng(SEEDS[case]), {}
    for name, shape in sorted(expected_tensors(model_config(case)).items()):
        plus = 1.0 if "norm" in name and case != "gemma3_vision" else 0.0
        found[name] = (plus + rng.normal(size=shape) * (0.1 if "norm" in name else 0.25)).astype(np.float32)
    return found


def others(case: str) -> dict[str, np.ndarray]:
    """Return what stands for another tower where nothing computes it: in two dtypes, under names of the newer form."""
    beginning = next(name for name in tower(case).others if name.startswith("model."))
    weight = np.random.default_rng(2).normal(size=(6, 4))
    return {f"{beginning}a.weight": weight.astype(np.float16), f"{beginning}b.position_ids": np.arange(6)[None]}


def stored(case: str, form: int = 0) -> dict[str, np.ndarray]:
    """Return the text model's weights under the names of the files of a form."""
    layers, head = tower(case).stored[form]
    return {
        layers + name.removeprefix("model.") if name.startswith("model.") else head + name.removeprefix("lm_head."): x
        for name, x in text(case).items()
    }


def tower(case: str) -> Any:
    found = FAMILIES[case].files.tower
    assert found is not None
    return found


def write(directory: Path, case: str, form: int = 0) -> Path:
    """Write a model directory with tensors of another tower, that nothing computes."""
    return write_hf(directory, CASES[case], stored(case, form) | others(case))


def write_whole(directory: Path, case: str) -> Path:
    """Write a model directory with a vision tower of transformers'."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case])
    whole = transformers.AutoModelForImageTextToText.from_config(config).state_dict()
    vision = {name: x.numpy() for name, x in whole.items() if name.startswith(tower(case).others)}
    assert vision
    return write_hf(directory, CASES[case], stored(case) | vision)


def state(case: str) -> AdapterState:
    """Return an adapter, none of its arrays zero."""
    rng = np.random.default_rng(1)
    arrays = {
        name: (rng.normal(size=shape) * (0.1 if name.endswith(".A") else 0.02)).astype(np.float32)
        for name, shape in array_shapes(model_config(case), SPEC).items()
    }
    return AdapterState(spec=SPEC, step=0, weights=arrays)


def tokens() -> np.ndarray:
    """Return 48 tokens, none of them an image's."""
    return np.random.default_rng(3).integers(3, 119, 48).astype(np.int32)


def torch_model(path: Path, case: str) -> Any:
    """Return transformers' whole model of a directory; the directory must hold every tensor and no other."""
    return cases.torch_model(path, model_config(case), of="AutoModelForImageTextToText")


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens())[None].long()).logits[0].float().numpy()
