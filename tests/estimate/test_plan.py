"""Does an estimate say what an engine would choose and take, from a config alone, and what would help?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.engine.core.memory import PassMemory
from jax_client.engine.train.limits import Sizing
from jax_client.errors import BadRequestError
from jax_client.estimate.chips import machine_of, parse_machine
from jax_client.estimate.plan import Question, estimate, hints, lay_out
from jax_client.estimate.speed import speed
from jax_client.losses.logprob_head import Blocks
from jax_client.models.config import ModelConfig
from jax_client.models.parts.attention import blockwise
from jax_client.sharding import describe_mesh
from jax_client.values import LoraSpec
from support.golden_cases import CASES
from support.golden_engine import open_engine
from support.models.sizes import QWEN3

QWEN: dict[str, Any] = QWEN3 | {"n_kv_heads": 8}
QWEN_4B = ModelConfig(**QWEN, d_model=2560, d_ff=9728, n_layers=36, n_heads=32, tied_embeddings=True)
QWEN_8B = ModelConfig(**QWEN, d_model=4096, d_ff=12288, n_layers=36, n_heads=32, tied_embeddings=False)
QWEN_14B = ModelConfig(**QWEN, d_model=5120, d_ff=17408, n_layers=40, n_heads=40, tied_embeddings=False)
QWEN_32B = ModelConfig(**QWEN, d_model=5120, d_ff=25600, n_layers=64, n_heads=64, tied_embeddings=False)


def test_an_engine_chooses_and_takes_what_the_estimate_says(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "m", CASES["qwen3_tied"])
    said, lane = engine.monitor.describe(), engine.open_lane()
    adapter = engine.open_adapter(lane, LoraSpec(rank=4, seed=0)).result()
    cpu = machine_of("cpu", jax.devices()[0].device_kind, 1, None)
    found = estimate(Question(model=engine.model, machine=cpu, dtype="float32", spec=adapter.spec, rows=4, length=16))
    layout = found.layout
    assert layout.weights == said["memory_bytes"]["weights"]
    assert layout.adapter == sum(a.nbytes for a in jax.tree.leaves(adapter.weights))
    assert layout.limits == engine.trainer.limits
    assert found.training is not None and found.training.remat == said["remat"]
    assert layout.attention.name == said["attention"]
    assert layout.cache_bytes == engine.sampler.cache_bytes()
    engine.close()


@pytest.mark.parametrize(
    ("model", "machine", "length"),
    [(QWEN_14B, "h100", 4096), (QWEN_32B, "v5e-16", 2048), (QWEN_4B, "v5e-1", 4096), (QWEN_8B, "v5p-8", 8192)],
)
def test_models_train_and_sample_where_they_should(model: ModelConfig, machine: str, length: int) -> None:
    found = estimate(Question(model=model, machine=parse_machine(machine), length=length))
    assert found.fits, found


def test_what_does_not_fit_says_what_helps() -> None:
    question = Question(model=QWEN_32B, machine=parse_machine("v5e-4"))
    assert not estimate(question).fits
    found = hints(question)
    assert found and all("devices" in text for text in found), found
    assert estimate(replace(question, machine=parse_machine("v5e-16"), length=2048)).fits


@pytest.mark.parametrize(
    ("model", "machine", "axes"),
    [
        (QWEN_32B, "v5e-16", {"fsdp": 8, "tensor": 2}),  # sixteenths of 5,120 are two and a half tiles of 128 lanes
        (QWEN_32B, "v5e-8", {"fsdp": 8}),
        (QWEN_4B, "v5p-16", {"fsdp": 4, "tensor": 2}),
        (QWEN_8B, "v6e-32", {"fsdp": 32}),
        (QWEN_32B, "v5e-256", {"fsdp": 256}),  # 32 would be left for "tensor", and there are 8 heads
        (replace(QWEN_4B, d_ff=9729), "v5e-8", {"fsdp": 8}),
        (replace(QWEN_4B, vocab_size=151935), "v5e-8", {"fsdp": 8}),
        (replace(QWEN_4B, n_heads=28, n_kv_heads=7), "v5e-8", {"fsdp": 8}),
        (replace(QWEN_4B, d_model=2500), "v5e-8", {"fsdp": 8}),
        (QWEN_4B, "v5e-1", {}),
        (QWEN_32B, "h100-16", {"fsdp": 16}),
    ],
)
def test_on_tpus_auto_gives_each_way_whole_tiles_of_the_width(
    model: ModelConfig, machine: str, axes: dict[str, int]
) -> None:
    shape = lay_out(Question(model=model, machine=parse_machine(machine))).mesh.shape
    assert {axis: size for axis, size in shape.items() if size > 1} == axes


def test_tokens_and_remat_are_chosen_together() -> None:
    """More memory: less is recomputed. With little, fewer tokens are computed at once before anything is refused."""
    mesh = describe_mesh("auto", parse_machine("v5e-8").devices())
    passes = PassMemory(
        config=QWEN_8B, dtype=np.dtype("bfloat16"), mesh=mesh, attention="splash", blocks=Blocks.of("tpu")
    )
    chosen = []
    for gib in (2, 4, 6, 8, 12, 24, 48):
        sizing = Sizing(memory=passes, attention=blockwise(one_cpu=False), free=gib * 2**30, cache=0, setting="auto")
        limits = sizing.limits(None)
        chosen.append((limits.tokens, sizing.remat(limits.tokens)))
    work = [(("full", "selective", "none").index(remat), tokens) for tokens, remat in chosen]
    assert work == sorted(work), chosen
    assert chosen[0][0] < 8192 and chosen[-1] == (8192, "none"), chosen


def test_times_are_ranges_that_scale_with_the_machine() -> None:
    one, eight = (speed(estimate(Question(model=QWEN_4B, machine=parse_machine(name)))) for name in ("h100", "h100-8"))
    for each in (one, eight):
        for ends in (each.call_seconds, each.decode_seconds, each.download_seconds):
            assert ends is not None and 0 < ends[0] < ends[1]
    assert one.tokens_per_second is not None and eight.tokens_per_second is not None
    assert 4 < eight.tokens_per_second[0] / one.tokens_per_second[0] <= 8.5


def test_whole_weights_to_decode_with_are_counted_where_they_fit() -> None:
    """Eight ways of a v6e have room for a copy of 4B weights, and none for one of 32B; one device makes none."""
    small, large, alone = (
        estimate(Question(model=model, machine=parse_machine(f"v6e-{ways}"), mesh={"fsdp": ways}, length=1024))
        for model, ways in ((QWEN_4B, 8), (QWEN_32B, 8), (QWEN_4B, 1))
    )
    assert small.sampling is not None and large.sampling is not None and alone.sampling is not None
    assert small.sampling.whole > 7 * small.layout.weights and (large.sampling.whole, alone.sampling.whole) == (0, 0)
    assert small.sampling.fits and small.sampling.temporaries < large.sampling.temporaries
    gathered = replace(small, sampling=replace(small.sampling, whole=0))
    fast, slow = speed(small).decode_seconds, speed(gathered).decode_seconds
    assert fast is not None and slow is not None and fast[1] < slow[1]


@pytest.mark.parametrize(
    ("name", "chip", "count"), [("v5e-8", "v5e", 8), ("v5p-8", "v5p", 4), ("H100", "h100", 1), ("v6e-1", "v6e", 1)]
)
def test_names_count_as_the_clouds_do(name: str, chip: str, count: int) -> None:
    machine = parse_machine(name)
    assert (machine.chip.name, machine.count) == (chip, count)


@pytest.mark.parametrize("name", ["v9-8", "v5e-0", "v5p-7", "h100-x", ""])
def test_unknown_machines_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(BadRequestError, match=r"v5e-8 or h100-8|multiple of 2"):
        parse_machine(name)
