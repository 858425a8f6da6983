"""How fast does a mixture of experts train here, against a dense model that computes as much, and against torch?

Three contenders take turns, each measurement in a fresh child process: the mixture here, a dense model of the same
active size here, and the mixture in transformers + peft (its default, grouped_mm). Weights are random. The table shows
medians over repeats, and the ratios to the bars. Needs the extras torch, demo and dev; 3 GB of disk for the models.
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
MODELS: dict[str, dict[str, Any]] = {
    "mixture": SHARED
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
    "dense": SHARED | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
# Name, contender, model.
CONTENDERS = (("mixture", OURS, "mixture"), ("dense", OURS, "dense"), ("torch", TORCH, "mixture"))


def write(directory: Path, config: dict[str, Any]) -> Path:
    """Write a model with random weights of the scale that training starts from, and return its directory."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else rng.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in expected_tensors(config_from_hf(config, str(directory))).items()
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def active(config: dict[str, Any]) -> float:
    """Return the millions of weights that a token is multiplied with."""
    c = config_from_hf(config, "the mixture")
    return (sum(kind.multiply_adds(c)[0] for layer in layers(c) for kind in layer.kinds) + VOCABULARY * WIDTH) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=["8x256", "4x1024", "ragged16"], default=["8x256", "4x1024"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--contenders", nargs="+", choices=[name for name, *_ in CONTENDERS], default=None)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a child is killed")
    args = parser.parse_args()
    print(json.dumps(machine() | {"active_millions": round(active(MODELS["mixture"]), 1), "experts": [EXPERTS, EACH]}))
    with tempfile.TemporaryDirectory() as temporary:
        models = {name: write(Path(temporary) / name, config) for name, config in MODELS.items()}
        for dtype in args.dtypes:
            for row in args.rows:
                report(dtype, row, models, args)


def report(dtype: str, row: str, models: dict[str, Path], args: argparse.Namespace) -> None:
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
    for other, bar in (("dense", 0.7), ("torch", 1.3)):
        if "mixture" in rate and other in rate:
            print(f"{dtype} {row}: mixture / {other} {rate['mixture'] / rate[other]:.2f} (bar: at least {bar})")


if __name__ == "__main__":
    main()
