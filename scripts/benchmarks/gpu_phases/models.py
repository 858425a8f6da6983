"""Which model do the phases measure? Random weights in the shapes of Qwen3-4B, or a toy of the same family.

Speed depends on shapes alone. The weights are pieces of one block of random numbers, written as fast as the disk takes
them, in Hugging Face layout, so that torch reads the same files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench_rows import ROWS
from jax_client.weights.write.shards import Tensor, write_file

BF16 = np.dtype(ml_dtypes.bfloat16)
LENGTHS = {
    "2x4096": (4096,) * 2,
    "8x4096": (4096,) * 8,
    "1x8192": (8192,),
    "8x256": ROWS["8x256"].lengths,
    "ragged16": ROWS["ragged16"].lengths,
}
TOY_LENGTHS = {"2x4096": (99,) * 2, "8x256": (16,) * 8}
BLOCK = 2**24  # numbers
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
TOY = QWEN3_4B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model's files by name."""
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_norm": (H,),
        "self_attn.k_norm": (H,),
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (D,)}


def write(directory: Path, config: dict[str, Any]) -> int:
    """Write the model as a new directory, and return its bytes; one that is there already is left as it is."""
    if not (directory / "config.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        rng, D = np.random.default_rng(0), config["hidden_size"]
        block = (rng.standard_normal(BLOCK, np.float32) * np.float32(D**-0.5)).astype(BF16)

        def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
            start = int(rng.integers(BLOCK))

            def rows(first: int, end: int) -> np.ndarray:
                if len(shape) == 1:
                    return np.ones(end - first, BF16)
                at = (start + np.arange(first, end) * shape[1]) % (BLOCK - shape[1])
                return np.stack([block[i : i + shape[1]] for i in at])

            return Tensor(name=name, shape=shape, rows=rows)

        write_file(directory / "model.safetensors", [tensor(*item) for item in shapes(config).items()], BF16)
        (directory / "config.json").write_text(json.dumps(config))  # last: whoever finds it finds the whole
    return sum(file.stat().st_size for file in directory.iterdir())
