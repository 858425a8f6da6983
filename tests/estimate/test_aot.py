"""Does XLA's compiler for TPUs agree with the estimate, pad nothing, and copy no stack of layers?

It compiles for TPUs that are not here. Two layers of Qwen3-8B's widths: what grows with depth is arguments and results.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from jax_client.engine.sample.pages import PAGE
from jax_client.estimate.chips import parse_machine
from jax_client.estimate.compile import compile_programs
from jax_client.estimate.plan import Question, estimate
from jax_client.models.config import ModelConfig

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra 'aot'"),
]
L, D, F = 2, 4096, 12288
MODEL = ModelConfig(
    family="qwen3",
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    max_context=4096,
    vocab_size=151936,
    head_dim=128,
    n_kv_heads=8,
    d_model=D,
    d_ff=F,
    n_layers=L,
    n_heads=32,
    tied_embeddings=False,
)


@pytest.fixture(scope="module", params=["v5e-8", "v5p-8"])
def compiled(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The accounts of the programs of a topology, by name."""
    question = Question(model=MODEL, machine=parse_machine(request.param), length=2048, remat="full")
    accounts = list(compile_programs(estimate(question), ("forward", "backward", "decode")))
    assert not [account for account in accounts if "error" in account]
    return {account["program"]: account for account in accounts}


def test_arguments_are_not_padded(compiled: dict[str, dict[str, Any]]) -> None:
    for name, account in compiled.items():
        assert account["padding"] <= 0.01 * account["arguments"], name


def test_temporaries_are_near_the_estimate(compiled: dict[str, dict[str, Any]]) -> None:
    ratios = {name: each["temporaries"] / each["estimated"] for name, each in compiled.items()}
    # Of a training pass the larger program counts: the two follow each other.
    training = {name: compiled[name] for name in ("forward", "backward")}
    largest = max(each["temporaries"] for each in training.values())
    ratios["training"] = largest / max(each["estimated"] for each in training.values())
    assert all(0.8 <= ratios[name] <= 1.25 for name in ("training", "decode")), ratios


def test_no_stack_of_layers_is_copied(compiled: dict[str, dict[str, Any]]) -> None:
    for name, account in compiled.items():
        wrong = [shape for shape in account["copies"] if f"[{L}," in shape]
        assert not wrong, f"{name}: {wrong}"


def test_no_activations_travel(compiled: dict[str, dict[str, Any]]) -> None:
    """In the layers, weights and adapters are gathered and gradients summed; nothing there has a token's axis."""
    for name, account in compiled.items():
        inner = [each for each in account["collectives"] if each["loops"]]
        wrong = [each for each in inner if each["kind"] == "all-gather" and each["bytes"] > 2 * 2 * D * F]
        assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize(
    ("machine", "mesh", "heads", "dtype", "programs"),
    [
        ("v5e-8", {"tensor": 8}, 8, "bfloat16", ("decode", "prefill")),
        ("v5e-1", {}, 2, "bfloat16", ("prefill",)),
        ("v5e-4", {"tensor": 4}, 8, "float32", ("prefill",)),  # without the kernel
    ],
    ids=str,
)
def test_sampling_has_no_second_cache(
    machine: str, mesh: dict[str, int], heads: int, dtype: str, programs: tuple[str, ...]
) -> None:
    """Neither at the ends of a program nor in a layer, also where a device has one or two heads of a page."""
    model = replace(MODEL, d_model=1024, d_ff=3072, vocab_size=8192, n_kv_heads=heads, max_context=512)
    sizes: Any = {"dtype": dtype, "length": 512, "sampled_rows": 16, "sampled_tokens": 512}
    found = estimate(Question(model=model, machine=parse_machine(machine), mesh=mesh or "auto", **sizes))
    pages = found.layout.pages + 2
    for account in compile_programs(found, programs):
        assert "error" not in account, account
        wrong = [
            shape for shape in account["copies"] if f",{pages},{PAGE}," in shape or f"[{L * pages},{PAGE}" in shape
        ]
        assert not wrong, f"{account['program']}: {wrong}"
        assert account["temporaries"] < found.layout.cache_bytes / 8, account["program"]
