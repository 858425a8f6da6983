"""Which models load by name, and which is the smallest machine that trains and samples each? Writes a table.

The sizes are those of the models' config.json; the machines are what `jax_client estimate` answers, with its defaults.
`--write` puts the table into docs/compatibility.md; without it the page is compared, and 1 returned if it differs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from written_page import keep

from jax_client.estimate.chips import parse_machine
from jax_client.estimate.plan import Question, estimate
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.models.families.registry import config_from_hf

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by scripts/make_support_table.py -->", "<!-- end of the models -->"
# Of one host, the smallest first.
TPUS = ("v5e-1", "v6e-1", "v5e-4", "v5e-8", "v6e-8", "v5p-8")
GPUS = ("h100", "h200", "h100-2", "h100-4", "h100-8", "h200-8")


def _sizes(D: int, L: int, N: int, K: int, F: int, V: int, context: int, *, H: int = 128) -> dict[str, Any]:
    """Return the keys of config.json that every family has."""
    return {
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "intermediate_size": F,
        "vocab_size": V,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }


def _llama(*sizes: int, H: int = 128, tied: bool = False) -> dict[str, Any]:
    return _sizes(*sizes, H=H) | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}


def _qwen(version: str, *sizes: int, H: int = 128, tied: bool = False) -> dict[str, Any]:
    return _sizes(*sizes, H=H) | {"architectures": [f"{version}ForCausalLM"], "tie_word_embeddings": tied}


def _qwen_moe(D: int, L: int, N: int, F: int, context: int) -> dict[str, Any]:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": F, "norm_topk_prob": True}
    # All layers are mixtures: the width of an MLP is that of no layer.
    return _sizes(D, L, N, 4, 3 * D, 151936, context) | {"architectures": ["Qwen3MoeForCausalLM"]} | experts


def _gpt_oss(L: int, E: int) -> dict[str, Any]:
    experts = {"num_local_experts": E, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True}
    return _sizes(2880, L, 64, 8, 2880, 201088, 131072, H=64) | {"architectures": ["GptOssForCausalLM"]} | experts


def _qwen_hybrid(*sizes: int, delta: tuple[int, int], tied: bool = False, **experts: int) -> dict[str, Any]:
    """Return a Qwen3.5's config: its text model's sizes, and key and value heads of the layers without attention."""
    text = _sizes(*sizes, 248320, 262144, H=256) | {
        "linear_num_key_heads": delta[0],
        "linear_num_value_heads": delta[1],
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        **experts,
    }
    version = "Qwen3_5Moe" if experts else "Qwen3_5"
    named = [f"{version}ForConditionalGeneration"]
    return {"architectures": named, "text_config": text, "tie_word_embeddings": tied}


def _experts(count: int, per_token: int, F: int) -> dict[str, int]:
    named = {"num_experts": count, "num_experts_per_tok": per_token, "moe_intermediate_size": F}
    return named | {"shared_expert_intermediate_size": F}


QWEN3_5_9B = _qwen_hybrid(4096, 32, 16, 4, 12288, delta=(16, 32))
QWEN3_5_27B = _qwen_hybrid(5120, 64, 24, 4, 17408, delta=(16, 48))
QWEN3_5_35B = _qwen_hybrid(2048, 40, 16, 2, 512, delta=(16, 32), **_experts(256, 8, 512))
GEMMA3_1B = _sizes(1152, 26, 4, 1, 6912, 262144, 32768, H=256) | {
    "architectures": ["Gemma3ForCausalLM"],
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
MISTRAL_7B = _sizes(4096, 32, 32, 8, 14336, 32000, 32768) | {
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 4096,
}
QWEN3_8B, LLAMA_8B = (36, 32, 8, 12288, 151936), (32, 32, 8, 14336, 128256)
# Under their names on the hub.
MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 30, 9, 3, 1536, 49152, 8192, H=64, tied=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(960, 32, 15, 5, 2560, 49152, 8192, H=64, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(2048, 24, 32, 32, 8192, 49152, 8192, H=64, tied=True),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen("Qwen2", 896, 24, 14, 2, 4864, 151936, 32768, H=64, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen("Qwen2", 3584, 28, 28, 4, 18944, 152064, 32768),
    "Qwen/Qwen3-0.6B": _qwen("Qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, tied=True),
    "Qwen/Qwen3-1.7B": _qwen("Qwen3", 2048, 28, 16, 8, 6144, 151936, 40960, tied=True),
    "Qwen/Qwen3-4B": _qwen("Qwen3", 2560, 36, 32, 8, 9728, 151936, 40960, tied=True),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen("Qwen3", 2560, 36, 32, 8, 9728, 151936, 262144, tied=True),
    "Qwen/Qwen3-8B": _qwen("Qwen3", 4096, *QWEN3_8B, 40960),
    "Qwen/Qwen3-8B-Base": _qwen("Qwen3", 4096, *QWEN3_8B, 32768),
    "Qwen/Qwen3-14B": _qwen("Qwen3", 5120, 40, 40, 8, 17408, 151936, 40960),
    "Qwen/Qwen3-32B": _qwen("Qwen3", 5120, 64, 64, 8, 25600, 151936, 40960),
    "Qwen/Qwen3-30B-A3B": _qwen_moe(2048, 48, 32, 768, 40960),
    "Qwen/Qwen3-30B-A3B-Base": _qwen_moe(2048, 48, 32, 768, 32768),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _qwen_moe(2048, 48, 32, 768, 262144),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _qwen_moe(4096, 94, 64, 1536, 262144),
    "Qwen/Qwen3.5-4B": _qwen_hybrid(2560, 32, 16, 4, 9216, delta=(16, 32), tied=True),
    "Qwen/Qwen3.5-9B": QWEN3_5_9B,
    "Qwen/Qwen3.5-9B-Base": QWEN3_5_9B,
    "Qwen/Qwen3.5-27B": QWEN3_5_27B,
    "Qwen/Qwen3.6-27B": QWEN3_5_27B,
    "Qwen/Qwen3.8-27B": QWEN3_5_27B,
    "Qwen/Qwen3.5-35B-A3B": QWEN3_5_35B,
    "Qwen/Qwen3.5-35B-A3B-Base": QWEN3_5_35B,
    "Qwen/Qwen3.6-35B-A3B": QWEN3_5_35B,
    "Qwen/Qwen3.5-397B-A17B": _qwen_hybrid(4096, 60, 32, 2, 1024, delta=(16, 64), **_experts(512, 10, 1024)),
    "openai/gpt-oss-20b": _gpt_oss(24, 32),
    "openai/gpt-oss-120b": _gpt_oss(36, 128),
    "google/gemma-3-1b-it": GEMMA3_1B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "meta-llama/Llama-3.1-8B": _llama(4096, *LLAMA_8B, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, *LLAMA_8B, 131072),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, 128256, 131072, H=64, tied=True),
    "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 16, 32, 8, 8192, 128256, 131072, H=64, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192, 128256, 131072, tied=True),
    "meta-llama/Llama-3.3-70B-Instruct": _llama(8192, 80, 64, 8, 28672, 128256, 131072),
}


def weight_bytes(c: ModelConfig) -> int:
    """Return the bytes of a model's weights, matrices in bfloat16, as one device would have them."""
    specs = jax.tree.leaves(param_specs(c, jnp.dtype(jnp.bfloat16)))
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def smallest(c: ModelConfig, machines: Sequence[str]) -> str:
    """Return the first machine that trains and samples a model."""
    for name in machines:
        if estimate(Question(model=c, machine=parse_machine(name))).fits:
            return name
    return "none of one host"


def row(name: str) -> str:
    """Return a model's row of the table."""
    fields = MODELS[name]
    c = config_from_hf(fields, name)
    size = f"{weight_bytes(c) / 1e9:.1f}"
    return f"| {name} | {fields['architectures'][0]} | {size} | {smallest(c, TPUS)} | {smallest(c, GPUS)} |"


def table() -> str:
    """Return the table, a row for each model."""
    head = ["| model | architecture | weights GB | TPU | GPU |", "|---|---|---:|---|---|"]
    return "\n".join([*head, *map(row, MODELS)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table, or compare the page with it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="write the table into the page, instead of comparing")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/compatibility.md")
    args = parser.parse_args(argv)
    return keep(args.page, (BEGIN, END), table(), write=args.write)


if __name__ == "__main__":
    sys.exit(main())
