"""Does a mesh sample what one device samples, and what do its devices send each other while they do?

The compiled programs are read, not timed. Rows are split over "data" and "fsdp", heads and the vocabulary over
"tensor". What may travel: of a layer its weights, one layer at a time, and with "tensor" two sums, as wide as the
residual stream; of the head blocks of its weights, and each row's logits to the device that draws for the row. The
cache, other ways' rows and whatever the attention computes stay where they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jax_client.engine.sample.pages import PAGE
from support.meshes.collectives import Collective, collectives
from support.meshes.devices import run_on

# Sizes that tell layers, rows, vocabulary and widths apart.
L, D, F, V, K, H, R = 3, 96, 160, 9472, 8, 16, 4
ROWS, TILES = 8, 4  # of the smaller decode block and the smaller prefill, per way
MESHES = [
    pytest.param({"fsdp": 8}, marks=pytest.mark.full),
    pytest.param({"tensor": 8}, marks=pytest.mark.full),
    {"fsdp": 4, "tensor": 2},
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.full),
]
CHILD = f"""
import json, sys
from pathlib import Path
import numpy as np
from support.golden_cases import CASES
from support.golden_engine import open_engine
from jax_client.engine.core.requests import GenerationRequest
from jax_client.models.lora_arrays import array_shapes
from jax_client.values import AdapterState, LoraSpec

mesh, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
config = CASES["llama_untied"] | dict(
    vocab_size={V}, hidden_size={D}, intermediate_size={F}, num_hidden_layers={L}, head_dim={H},
    num_attention_heads={2 * K}, num_key_value_heads={K}, max_position_embeddings=256,
)
engine = open_engine(directory / "m", config, mesh=mesh)
rng, spec = np.random.default_rng(0), LoraSpec(rank={R}, seed=0)
shapes = array_shapes(engine.model, spec)
weights = {{name: rng.normal(0, 0.03, shape).astype(np.float32) for name, shape in shapes.items()}}
trained = engine.snapshot(engine.open_lane(), AdapterState(spec=spec, step=1, weights=weights)).result()
tokens = np.arange(3, 80, dtype=np.int32)
ask = lambda **more: GenerationRequest(tokens_T=tokens[: more.pop("length", 70)], **more)
requests = [
    (trained, ask(max_tokens=40, temperature=0.0, prompt_logprobs=True, topk_prompt=3, topk_sample=2)),
    (None, ask(max_tokens=12, temperature=1.0, num_samples=3, seed=5, length=9)),
    (trained, ask(max_tokens=12, temperature=0.8, top_p=0.9, top_k=50, num_samples=2, seed=6, length=33)),
]
answers = []
for future in [engine.generate(*each) for each in requests]:
    found = future.result()
    for row in found.rows:
        answers.append({{"tokens": row.tokens.tolist(), "logprobs": row.logprobs.tolist()}})
    if found.prompt_logprobs_T is not None:
        answers.append({{"tokens": [], "logprobs": np.asarray(found.prompt_logprobs_T)[1:].tolist()}})
for name in ("prefill", "decode"):
    for i, entry in enumerate(getattr(engine.sampler._programs, name)._compiled.values()):
        (directory / f"{{name}}.{{i}}").write_text(entry.future.result().as_text())
pages = engine.sampler._pool["k"].shape[2]
print(json.dumps({{"answers": answers, "pages": pages}}))
engine.close()
"""


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on({"data": 1}, CHILD, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module", params=MESHES, ids=str)
def sampled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A mesh, what it answered, and what its programs send, by name."""
    directory = tmp_path_factory.mktemp("mesh")
    found = run_on(request.param, CHILD, directory)
    programs = {path.name: list(collectives(path.read_text())) for path in sorted(directory.glob("*.[0-9]"))}
    assert {name.split(".")[0] for name in programs} == {"prefill", "decode"}
    return request.param, found, programs


def test_a_mesh_samples_what_one_device_samples(sampled: Any, one_device: dict[str, Any]) -> None:
    for mine, its in zip(sampled[1]["answers"], one_device["answers"], strict=True):
        assert mine["tokens"] == its["tokens"]
        np.testing.assert_allclose(mine["logprobs"], its["logprobs"], rtol=1e-5, atol=1e-5)


def report(found: list[Collective]) -> str:
    return "\n".join(c.line[:300] for c in found)


def in_layers(c: Collective) -> int:
    """Return how many loops, with that over the layers, are around it; 0 outside of that.

    The loop over the steps carries the stacks of the layers, too; the one over the layers has a number for each.
    """
    numbers = [(L,) in carried for carried in c.loops]
    return len(numbers) - numbers.index(True) if True in numbers else 0


def test_no_part_of_the_cache_travels(sampled: Any) -> None:
    _, found, programs = sampled
    for name, sent in programs.items():
        wrong = [c for c in sent for s in c.shapes if found["pages"] in s or s[-3:-2] == (PAGE,)]
        assert not wrong, f"{name}:\n{report(wrong)}"


def test_attention_sends_nothing(sampled: Any) -> None:
    for name, sent in sampled[2].items():
        wrong = [c for c in sent if in_layers(c) > 1]
        assert not wrong, f"{name}:\n{report(wrong)}"


def test_a_layer_gathers_weights_and_sums_twice(sampled: Any) -> None:
    mesh, _, programs = sampled
    for name, sent in programs.items():
        layers = [c for c in sent if in_layers(c)]
        sums = [c for c in layers if c.kind == "all-reduce"]
        tokens = {TILES * PAGE, 16 * PAGE} if name.startswith("prefill") else {ROWS, 32}
        assert len(sums) == (2 if mesh.get("tensor", 1) > 1 else 0), report(sums)
        assert all(s[0] in tokens and s[1:] == (D,) for c in sums for s in c.shapes), report(sums)
        # q|k|v, o, gate|up and down; nothing where the layers are whole.
        gathered = [c for c in layers if c.kind == "all-gather"]
        assert len(gathered) == (4 if mesh.get("fsdp", 1) > 1 else 0), report(gathered)
        assert len(layers) == len(sums) + len(gathered), report(layers)


def test_logits_go_only_to_the_device_that_draws(sampled: Any) -> None:
    mesh, _, programs = sampled
    parts = mesh.get("tensor", 1)
    for name, sent in programs.items():
        wide = [c for c in sent if any({V, V // parts} & set(s) for s in c.shapes)]
        for c in wide:
            rows = 64 if name.startswith("prefill") else 32  # a chunk of positions; rows of the larger block
            exchanged = c.kind == "all-to-all" and all(s[0] <= rows // parts and s[1] == V // parts for s in c.shapes)
            table = c.kind == "all-gather" and all(D in s for s in c.shapes)
            adapter = not c.loops and all(R in s for s in c.shapes)
            assert exchanged or table or adapter, f"{name}: {report([c])}"


def test_ways_agree_on_a_scalar_only(sampled: Any) -> None:
    mesh, _, programs = sampled
    for name, sent in programs.items():
        scalars = [c for c in sent if c.kind == "all-reduce" and not any(c.shapes)]
        steps = name.startswith("decode") and mesh.get("fsdp", 1) > 1
        assert len(scalars) == (2 if steps else 0), report(scalars)  # before the first step, and after each
