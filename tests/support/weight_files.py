"""How do the tests make tiny models on disk, in both layouts?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "head_dim": None},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False},
}


def hf_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Make random float32 weights, named and shaped as transformers saves them."""
    rng = np.random.default_rng(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config["head_dim"] or D // N
    family = config["architectures"][0]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (D,),
            f"model.layers.{i}.post_attention_layernorm.weight": (D,),
            attn + "q_proj.weight": (N * H, D),
            attn + "k_proj.weight": (K * H, D),
            attn + "v_proj.weight": (K * H, D),
            attn + "o_proj.weight": (D, N * H),
            mlp + "gate_proj.weight": (F, D),
            mlp + "up_proj.weight": (F, D),
            mlp + "down_proj.weight": (D, F),
        }
        if family.startswith("Qwen2"):
            shapes |= {attn + f"{p}_proj.bias": (n * H,) for p, n in (("q", N), ("k", K), ("v", K))}
        if family.startswith("Qwen3"):
            shapes |= {attn + f"{p}_norm.weight": (H,) for p in "qk"}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_hf(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], n_shards: int = 1) -> Path:
    """Write a model directory; more than one shard come with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if n_shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::n_shards]}, directory / file)
        weight_map |= dict.fromkeys(names[i::n_shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    arch: str = "llama",
    quantization: str = "F32",
    metadata: dict[str, Any] | None = None,
    part_tensors: int = 0,
) -> Path:
    """Write a GGUF file as llama.cpp's converter does: rotary pairs of a "llama" next to each other in q and k.

    With `part_tensors`, write parts of at most that number of tensors, such as NAME-00001-of-00003.gguf.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    writer = GGUFWriter(path, arch, split_max_tensors=part_tensors)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(config["eos_token_id"])
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    kind = GGMLQuantizationType[quantization]
    for name, tensor in tensors.items():
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            layer, stem = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{GGUF_NAMES[stem]}.{suffix}"
        else:
            target = f"{GGUF_NAMES[stem]}.{suffix}"
        if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            n = heads if stem.endswith("q_proj") else kv_heads
            rows = [h * head_dim + half * head_dim // 2 + i
                    for h in range(n) for i in range(head_dim // 2) for half in (0, 1)]  # fmt: skip
            tensor = tensor[rows]
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor)
        else:
            writer.add_tensor(target, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Return the tokens and merges of a tiny byte-level BPE: three specials, 256 bytes, a few words."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    merges = ["t h", "th e", "Ġ the", "1 2", "i n", "Ġ a", "Ċ Ċ", "in g", "Ġ Ġ"]
    return tokens + [m.replace(" ", "") for m in merges], merges


def tokenizer_metadata(pre: str = "smollm") -> dict[str, Any]:
    """Return the GGUF metadata of that tokenizer."""
    tokens, merges = byte_level_vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }
