"""Does a mesh decode with weights that each way has whole, where they fit, and do they go when memory is needed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.meshes.collectives import collectives
from support.meshes.devices import run_on

D, F, V = 96, 160, 9472
CHILD = f"""
import jax, json, sys
from pathlib import Path
import numpy as np
from support.golden_cases import CASES
from support.golden_engine import open_engine
from jax_client.engine.core.programs import Program
from jax_client.engine.core.requests import GenerationRequest

mesh, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
config = CASES["llama_untied"] | dict(
    vocab_size={V}, hidden_size={D}, intermediate_size={F}, num_hidden_layers=3, head_dim=16,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
)
engine = open_engine(directory / "m", config, mesh=mesh)
request = GenerationRequest(tokens_T=np.arange(3, 50, dtype=np.int32), max_tokens=12, temperature=1.0, seed=3)
sampler, found = engine.sampler, []

def sample():
    row = engine.generate(None, request).result().rows[0]
    size = engine.monitor.describe()["memory_bytes"]["decode_weights"]
    found.append((row.tokens.tolist(), row.logprobs.tolist(), size))

sample()
lowered = Program._lowered

def out_of_memory(self, args, static):
    if self.name == "prefill" and "whole" in args[0]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM.")
    return lowered(self, args, static)

for Program._lowered in (out_of_memory, lowered):
    sampler.release_cache()
    sampler._weights.allowed = True
    sample()
sampler.release_cache()  # as the trainer does where memory is short
sampler._weights.choose(1000)  # where it does not fit
found.append((None, None, engine.monitor.describe()["memory_bytes"]["decode_weights"]))
for i, entry in enumerate(sampler._programs.decode._compiled.values()):
    (directory / f"decode.{{i}}").write_text(entry.future.result().as_text())
layers = engine.params["layers"].values()
stored = sum(a.nbytes for kind in layers for a in kind.values()) + engine.params["unembed_VD"].nbytes
print(json.dumps({{"found": found, "stored": stored}}))
engine.close()
"""


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("mesh")
    return run_on({"fsdp": 4, "tensor": 2}, CHILD, directory), directory


def test_whole_weights_draw_the_same(sampled: tuple[Any, Path]) -> None:
    stored, _, whole, _ = sampled[0]["found"]
    assert stored[0] == whole[0]
    assert stored[1] == pytest.approx(whole[1], abs=1e-5)


def test_they_are_counted_while_they_are_there(sampled: tuple[Any, Path]) -> None:
    sizes = [size for _, _, size in sampled[0]["found"]]
    assert sizes[0] == 0 and sizes[3] == 0
    # Each of the four ways has all, where the stored weights are a quarter each; norms are whole anyway.
    assert 3.5 * sampled[0]["stored"] < sizes[2] <= 4 * sampled[0]["stored"]


def test_a_program_that_does_not_fit_beside_them_runs_without_them(sampled: tuple[Any, Path]) -> None:
    stored, without, _, _ = sampled[0]["found"]
    assert without[0] == stored[0] and without[2] == 0


def test_a_step_gathers_no_weights(sampled: tuple[Any, Path]) -> None:
    before, after = ((sampled[1] / f"decode.{i}").read_text() for i in range(2))
    gathers = lambda text: [c for c in collectives(text) if c.kind == "all-gather" and c.loops]  # noqa: E731
    wide = lambda c: any({D, F, 2 * F, V // 2} & set(s[:-1]) for s in c.shapes)  # noqa: E731
    assert any(map(wide, gathers(before)))
    assert not any(map(wide, gathers(after)))
