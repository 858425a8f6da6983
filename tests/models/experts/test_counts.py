"""Has an adapter as many parameters as the hosted service's has, for each model and each train_* flag?

The figures are those that tinker-cookbook 0.6.1 publishes, per unit of rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from jax_client.models.config import Experts, GatedDelta, ModelConfig
from jax_client.models.lora_arrays import array_shapes
from jax_client.values import LoraSpec


def model(D: int, L: int, N: int, K: int, F: int, V: int, H: int = 128, E: int = 0) -> ModelConfig:
    experts = Experts(count=E, per_token=8, d_ff=F, normalized=True) if E else None
    return ModelConfig(
        family="llama", vocab_size=V, d_model=D, d_ff=F, n_layers=L, n_heads=N, n_kv_heads=K, head_dim=H,
        norm_eps=1e-6, rope_theta=1e6, tied_embeddings=False, max_context=4096, experts=experts,
    )  # fmt: skip


def hybrid(c: ModelConfig, *, value_heads: int) -> ModelConfig:
    """Return a Qwen3.5: of four layers one has attention with a gate, and experts have one that tokens share."""
    layers = tuple(i for i in range(c.n_layers) if (i + 1) % 4)
    delta = GatedDelta(layers=layers, key_heads=16, value_heads=value_heads, key_dim=128, value_dim=128, taps=4)
    experts = c.experts and replace(c.experts, shared_d_ff=c.experts.d_ff)
    return replace(c, delta=delta, output_gate=True, experts=experts)


# Model, then mlp, attn and unembed.
PUBLISHED = {
    "Llama-3.2-1B": (model(2048, 16, 32, 8, 8192, 128256, H=64), 491_520, 212_992, 130_304),
    "Llama-3.2-3B": (model(3072, 28, 24, 8, 8192, 128256), 946_176, 573_440, 131_328),
    "Llama-3.1-8B": (model(4096, 32, 32, 8, 14336, 128256), 1_769_472, 851_968, 132_352),
    "Llama-3.3-70B-Instruct": (model(8192, 80, 64, 8, 28672, 128256), 8_847_360, 4_096_000, 136_448),
    "Qwen3-4B-Instruct-2507": (model(2560, 36, 32, 8, 9728, 151936), 1_327_104, 737_280, 154_496),
    "Qwen3-8B": (model(4096, 36, 32, 8, 12288, 151936), 1_769_472, 958_464, 156_032),
    "Qwen3-32B": (model(5120, 64, 64, 8, 25600, 151936), 5_898_240, 2_490_368, 157_056),
    # The text parts of Qwen3-VL-30B-A3B and Qwen3-VL-235B-A22B have these sizes, and are published with these counts.
    "Qwen3-30B-A3B": (model(2048, 48, 32, 4, 768, 151936, E=128), 14_450_688, 835_584, 153_984),
    "Qwen3-235B-A22B": (model(4096, 94, 64, 4, 1536, 151936, E=128), 56_598_528, 3_176_448, 156_032),
    "Qwen3.5-4B": (hybrid(model(2560, 32, 16, 4, 9216, 248320, H=256), value_heads=32), 1_130_496, 897_024, 250_880),
    "Qwen3.5-9B": (hybrid(model(4096, 32, 16, 4, 12288, 248320, H=256), value_heads=32), 1_572_864, 1_130_496, 252_416),
    # Qwen3.6-27B and Qwen3.8-27B have these sizes, and are published with these counts.
    "Qwen3.5-27B": (
        hybrid(model(5120, 64, 24, 4, 17408, 248320, H=256), value_heads=48),
        4_325_376,
        2_965_504,
        253_440,
    ),
    "gpt-oss-20b": (model(2880, 24, 64, 8, 2880, 201088, H=64, E=32), 6_842_880, 497_664, 203_968),
    "gpt-oss-120b": (model(2880, 36, 64, 8, 2880, 201088, H=64, E=128), 40_124_160, 746_496, 203_968),
    "Qwen3.5-35B-A3B": (
        hybrid(model(2048, 40, 16, 2, 512, 248320, H=256, E=256), value_heads=32),
        16_281_600,
        1_013_760,
        250_368,
    ),
    "Qwen3.5-397B-A17B": (
        hybrid(model(4096, 60, 32, 2, 1024, 248320, H=256, E=512), value_heads=64),
        96_030_720,
        2_841_600,
        252_416,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_published(name: str) -> None:
    c, *published = PUBLISHED[name]
    for flag, count in zip(("train_mlp", "train_attn", "train_unembed"), published, strict=True):
        off = {"train_mlp": False, "train_attn": False, "train_unembed": False}
        shapes = array_shapes(c, LoraSpec(rank=4, seed=0, **off | {flag: True}))
        assert sum(map(math.prod, shapes.values())) == 4 * count
