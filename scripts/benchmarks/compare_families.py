"""How fast do models with other layers than a dense one's train here, against such a one, and against torch?

Three contenders take turns, each measurement in a fresh child process: the model here, a dense model that computes as
much here, and the model in transformers + peft (its defaults: grouped_mm for experts, torch for a gated delta rule).
Weights are random. The table shows medians over repeats, and the ratios to the bars. Needs the extras torch, demo and
dev; 3 GB of disk for the models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench_rows import ROWS, Job, machine, medians
from compare_torch import DTYPES, OURS, TORCH, spawn
from jax_client.models.families.registry import config_from_hf
from jax_client.models.plan import layers
from jax_client.weights.read.names import expected_tensors

VOCABULARY, WIDTH, LAYERS, HEADS, HEAD_WIDTH, HIDDEN, EXPERTS, EACH = 32_000, 768, 11, 12, 64, 1536, 16, 2
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 3,
    "head_dim": HEAD_WIDTH,
    "intermediate_size": HIDDEN * EACH,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
DENSE: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
# By family: the model, and the dense one.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts": (
        SHARED
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": EXPERTS,
            "num_experts_per_tok": EACH,
            "moe_intermediate_size": HIDDEN,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        },
        SHARED | DENSE,
    ),
    "hybrid": (
        SHARED
        | {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 12,
            "intermediate_size": 2560,
            "full_attention_interval": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 6,
            "linear_num_value_heads": 12,
            "linear_conv_kernel_dim": 4,
        },
        SHARED | DENSE | {"num_hidden_layers": 12, "intermediate_size": 2816},
    ),
}
# Name, contender, which of the two models.
CONTENDERS = (("model", OURS, 0), ("dense", OURS, 1), ("torch", TORCH, 0))
# What the model's rate should be at least, as a share of the others'.
BARS = {"experts": {"dense": 0.7, "torch": 1.3}, "hybrid": {"torch": 1.5}}


# Norms, and what a decay is made of; those of a hybrid are added to 1 when they are read, which is as good.
ONES = ("norm.weight", "A_log", "dt_bias")


def write(directory: Path, config: dict[str, Any]) -> Path:
    """Write a model with random weights of the scale that training starts from, and return its directory."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    tensors = {
        name: np.ones(shape, np.float32) if name.endswith(ONES) else rng.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in expected_tensors(config_from_hf(config, str(directory))).items()
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def active(config: dict[str, Any]) -> float:
    """Return the millions of weights that a token is multiplied with."""
    c = config_from_hf(config, "the model")
    return (sum(kind.multiply_adds(c)[0] for layer in layers(c) for kind in layer.kinds) + VOCABULARY * WIDTH) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=MODELS, default="experts")
    parser.add_argument("--rows", nargs="+", choices=["8x256", "4x1024", "ragged16"], default=["8x256", "4x1024"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--contenders", nargs="+", choices=[name for name, *_ in CONTENDERS], default=None)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a child is killed")
    args = parser.parse_args()
    pair = MODELS[args.family]
    sizes = {"family": args.family, "active_millions": [round(active(config), 1) for config in pair]}
    print(json.dumps(machine() | sizes))
    with tempfile.TemporaryDirectory() as temporary:
        models = [write(Path(temporary) / str(i), config) for i, config in enumerate(pair)]
        for dtype in args.dtypes:
            for row in args.rows:
                report(dtype, row, models, args)


def report(dtype: str, row: str, models: list[Path], args: argparse.Namespace) -> None:
    """Measure one row, and print its line."""
    planned = [c for c in CONTENDERS if args.contenders is None or c[0] in args.contenders]
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for name, contender, model in planned if repeat % 2 == 0 else planned[::-1]:
            job = Job(
                contender=contender,
                row=ROWS[row],
                dtype=dtype,
                model=str(models[model]),
                surface="client",
                steps=args.steps,
                budget_s=240,
                torch_compile=False,
                torch_group=4,
                torch_micro_tokens=4096,
            )
            found.setdefault(name, []).append(spawn(job, args.timeout))
    middle = {name: medians(results) for name, results in found.items()}
    for name, line in middle.items():
        shown = "; ".join(line["errors"]) or f"{line['tokens_per_s']:,.0f} tokens/s"
        print(f"{dtype} {row} {name}: {shown}")
    rate = {name: line["tokens_per_s"] for name, line in middle.items() if line.get("tokens_per_s")}
    for other in ("dense", "torch"):
        if "model" in rate and other in rate:
            bar = BARS[args.family].get(other)
            told = "" if bar is None else f" (bar: at least {bar})"
            print(f"{dtype} {row}: model / {other} {rate['model'] / rate[other]:.2f}{told}")


if __name__ == "__main__":
    main()
