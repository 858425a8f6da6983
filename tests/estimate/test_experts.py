"""Does an estimate count what mixtures of experts and layers with windows take, and the table of models all of them?"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.engine.core.memory import PassMemory
from jax_client.estimate.chips import parse_machine
from jax_client.estimate.plan import Question, estimate
from jax_client.estimate.speed import speed
from jax_client.losses.logprob_head import Blocks
from jax_client.models.config import Experts, ModelConfig, Windows
from jax_client.models.parts.kind import Remat
from jax_client.sharding import describe_mesh
from jax_client.values import LoraSpec
from jax_client.weights.read.source import COMMON_MODELS
from support.models.sizes import QWEN3

MIB = 2**20
SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES: dict[str, Any] = QWEN3 | {
    "family": "qwen3_moe",
    "n_kv_heads": 4,
    "d_model": 2048,
    "d_ff": 6144,
    "n_heads": 32,
    "n_layers": 48,
    "tied_embeddings": False,
}
QWEN_30B = ModelConfig(**SIZES, experts=Experts(count=128, per_token=8, d_ff=768, normalized=True))
DENSE = ModelConfig(**SIZES)
SPEC = LoraSpec(rank=32, seed=0)


def passes(c: ModelConfig, machine: str) -> PassMemory:
    mesh = describe_mesh("auto", parse_machine(machine).devices(), c)
    platform = parse_machine(machine).chip.platform
    attention = "splash" if platform == "tpu" else "blockwise"
    return PassMemory(config=c, dtype=np.dtype("bfloat16"), mesh=mesh, attention=attention, blocks=Blocks.of(platform))


# What XLA's compilers said of a row a way: MiB of temporaries. libtpu 0.0.42.1, jax-cuda13-pjrt 0.10.2.
@pytest.mark.parametrize(
    ("machine", "layers", "vocab", "tokens", "remat", "forward", "backward"),
    [
        ("v5p-8", 48, 151936, 4096, "none", 1781, 2030),
        ("v5p-8", 4, 151936, 4096, "selective", 1505, 1769),
        ("v5p-8", 4, 151936, 4096, "full", 1391, 1895),
        ("v5p-8", 4, 151936, 2048, "none", 720, 894),
        ("v5p-2", 4, 151936, 4096, "none", 750, 704),
        ("h100-2", 2, 32000, 4096, "none", 750, 607),
        ("h100-2", 2, 32000, 4096, "selective", 750, 607),
        ("h100-2", 2, 32000, 4096, "full", 742, 772),
    ],
)
def test_buffers_of_rows_by_expert_are_near_the_compilers_account(
    machine: str, layers: int, vocab: int, tokens: int, remat: Remat, forward: int, backward: int
) -> None:
    c = replace(QWEN_30B, n_layers=layers, vocab_size=vocab)
    found = passes(c, machine).temporaries(remat, tokens, SPEC)
    assert 0.8 <= found["forward"] / MIB / forward <= 1.25, found
    assert 0.8 <= found["backward"] / MIB / backward <= 1.25, found


def test_the_rank_counts_where_experts_are_trained() -> None:
    found = passes(QWEN_30B, "v5p-8")
    none, small, large = (
        sum(found.temporaries("none", 4096, spec).values())
        for spec in (replace(SPEC, train_mlp=False), SPEC, replace(SPEC, rank=256))
    )
    assert none < small < large


def test_experts_are_neither_gathered_nor_all_read() -> None:
    """Beside a dense model of as many weights a mixture sends less, and a step of few rows reads less."""
    hidden = 128 * 768
    dense = replace(DENSE, d_ff=hidden)
    question = Question(model=QWEN_30B, machine=parse_machine("v5p-8"))
    few = replace(question, sampled_rows=4)
    mixed, all_read, large = (speed(estimate(q)) for q in (few, question, replace(question, model=dense)))
    assert mixed.decode_seconds is not None and all_read.decode_seconds is not None
    assert mixed.decode_seconds[0] < all_read.decode_seconds[0] / 2
    assert all_read.call_seconds is not None and large.call_seconds is not None
    assert all_read.call_seconds[0] < large.call_seconds[0] / 4


def test_a_window_bounds_what_a_step_reads() -> None:
    machine = parse_machine("v5p-8")

    def seconds(windows: Windows | None, tokens: int) -> float:
        c = replace(DENSE, d_ff=1024, n_kv_heads=32, windows=windows)
        q = Question(model=c, machine=machine, sampled_rows=4, sampled_tokens=tokens)
        found = speed(estimate(q)).decode_seconds
        assert found is not None
        return found[0]

    all_layers, half = (Windows(size=512, layers=tuple(range(0, 48, each))) for each in (1, 2))
    assert seconds(all_layers, 512) == seconds(None, 512)
    assert seconds(all_layers, 16384) == pytest.approx(seconds(None, 512))
    long = seconds(None, 16384)
    assert seconds(half, 16384) == pytest.approx((long + seconds(None, 512)) / 2)


def test_the_table_of_models_has_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    table = importlib.import_module("make_support_table")
    try:
        assert set(COMMON_MODELS) <= set(table.MODELS)
        page = table.PAGE.read_text()
        written = page.partition(table.BEGIN)[2].partition(table.END)[0]
        for name in ("Qwen/Qwen3-4B", "google/gemma-3-1b-it", "openai/gpt-oss-20b"):
            assert table.row(name) in written.splitlines(), f"run {table.__file__} --write"
        assert [line.split(" | ")[0].strip("| ") for line in written.splitlines()[4:-1]] == list(table.MODELS)
    finally:
        sys.modules.pop("make_support_table")
