"""Which models and which training run do the goldens describe? Weights and data come from seeds, by numpy alone.

One golden is of the bundled model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support.weight_files import hf_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"
# Of the bundled model: 201 tokens, and the logprobs of all but the first.
REAL_GOLDEN = GOLDENS / "smollm2.npz"
REAL_TEXT = """\
The lighthouse stood at the end of a long spit of sand, and for most of the year nobody came. Every evening
the keeper climbed one hundred and twelve steps, wound the clockwork, trimmed the wick and wrote the weather
into a ledger that went back to 1874. He liked the entries of his predecessors: wind from the north-west, a
schooner aground, two seals on the rocks, nothing to report. When the electric lamp arrived in a wooden crate,
with a manual in three languages and a man from the ministry to install it, the keeper asked what would become
of the ledger. The man did not know. So the keeper went on climbing the stairs, although the light now
switched itself on, and he went on writing the weather down, because somebody ought to. Years later a
scientist found forty-one volumes in a dry cupboard and built from them the longest unbroken record of storms
on that coast."""
RANK = 4
STEPS = 5
ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 1.0}

_BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_parameters": _DEFAULT_ROPE},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 12,
        "rope_parameters": _DEFAULT_ROPE,
    },
}
CASES: dict[str, dict[str, Any]] = {
    f"{family}_{'tied' if tied else 'untied'}": {**_BASE, **keys, "tie_word_embeddings": tied}
    for family, keys in _FAMILIES.items()
    for tied in (True, False)
}


def module_shapes(c: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (in, out) of each linear layer of a decoder layer, by Hugging Face name."""
    D, F = c["hidden_size"], c["intermediate_size"]
    heads, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return {
        "self_attn.q_proj": (D, heads),
        "self_attn.k_proj": (D, kv),
        "self_attn.v_proj": (D, kv),
        "self_attn.o_proj": (heads, D),
        "mlp.gate_proj": (D, F),
        "mlp.up_proj": (D, F),
        "mlp.down_proj": (F, D),
    }


def base_values(c: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the base weights under their Hugging Face names, at a scale where logits stay within a few nats."""
    return {
        n: (1 + 0.1 * w).astype(np.float32) if "norm" in n else (0.2 * w).astype(np.float32)
        for n, w in hf_tensors(c).items()
    }


def lora_values(c: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return A (R, in) and B (out, R), both nonzero, by names such as "layers.0.self_attn.q_proj.A", "lm_head.B"."""
    rng = np.random.default_rng(1)
    modules = {f"layers.{i}.{m}": s for i in range(c["num_hidden_layers"]) for m, s in module_shapes(c).items()}
    modules["lm_head"] = (c["hidden_size"], c["vocab_size"])
    values = {}
    for name, (n_in, n_out) in modules.items():
        values[f"{name}.A"] = rng.uniform(-1, 1, (RANK, n_in)).astype(np.float32) * n_in**-0.5
        values[f"{name}.B"] = rng.normal(size=(n_out, RANK)).astype(np.float32) * 0.02
    return values


def sequences(c: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Return three ragged sequences with tokens, targets and weights."""
    rng = np.random.default_rng(2)
    out = []
    for n in (9, 21, 14):
        tokens = rng.integers(0, c["vocab_size"], n + 1).astype(np.int32)
        out.append({"tokens": tokens[:-1], "targets": tokens[1:], "weights": rng.uniform(0, 2, n).astype(np.float32)})
    return out


def real_model() -> Any:
    """Return the bundled model as transformers reads it, in float32; that takes most of a minute."""
    from transformers import AutoModelForCausalLM

    from jax_client.weights.read.source import embedded_gguf

    path = embedded_gguf()
    assert path is not None
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()


def real_logprobs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logprobs of all tokens but the first under a model of transformers."""
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:-1])[None].long()).logits[0]
    return torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(tokens[1:])[:, None].long())[:, 0].numpy()
