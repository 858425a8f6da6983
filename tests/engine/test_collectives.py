"""What do the devices of a mesh send each other in a training step, and is any of it larger than it has to be?

The compiled programs are read, not timed. Rows are split over "fsdp", so of a layer its weights travel, one layer at a
time inside the loop, and no activations; with "tensor" the outputs of o and down are summed, one row's tokens wide. The
sizes below tell layers, tokens, vocabulary and widths apart, so that what leaks shows in a result's shape. Without a
constraint on the residual stream XLA splits it by width, computes every row on every device and sums [tokens, D] in
each layer and [tokens, vocabulary] in the head: right results and, measured on eight devices, five times the memory.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest

from support.meshes.collectives import Collective, collectives
from support.meshes.devices import run_on

L, D, F, V, R = 3, 64, 128, 9472, 4
T = 1024  # of a row; each device has one row, so they are a device's tokens, too
BLOCK = 2048  # vocabulary entries of a block of scores on a CPU: V is some whole ones and a rest, on both meshes
CHILD = f"""
import json, sys
from pathlib import Path
import numpy as np
from support.golden_engine import ADAM, CROSS_ENTROPY, open_engine
from jax_client.engine.core.requests import AdamSettings
from jax_client.values import LoraSpec, TrainExample
from support.golden_cases import CASES

mesh, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
config = CASES["llama_untied"] | dict(
    vocab_size={V}, hidden_size={D}, intermediate_size={F}, num_hidden_layers={L}, head_dim=16,
    max_position_embeddings={T},
)
engine = open_engine(directory / "m", config, mesh=mesh, remat="none")
lane = engine.open_lane()
adapter = engine.open_adapter(lane, LoraSpec(rank={R}, seed=0)).result()
tokens = np.arange({T}, dtype=np.int32)
engine.train_batch(
    lane, adapter, [TrainExample(tokens_T=tokens, targets=tokens)] * mesh["fsdp"], CROSS_ENTROPY
).result()
engine.optim_step(lane, adapter, AdamSettings(**ADAM)).result()
programs = engine.trainer.programs
for program in (programs.forward, programs.backward, programs.optim_step):
    (compiled,) = program._compiled.values()
    (directory / program.name).write_text(compiled.future.result().as_text())
print(json.dumps([c["shapes"] for c in engine.monitor.describe()["compiled"] if c["program"] == "forward"]))
engine.close()
"""
MESHES: list[dict[str, int]] = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}]
# The most arrays that each program may send, by where and how (scalars left out); equal on jax 0.10.2 and 0.12.0. In
# the layers: q|k|v, o, gate, up and down, to gather; the gradients of the adapters and, with "tensor", the outputs of
# row-parallel matmuls, to sum. In the head: blocks of the table, and
# twice (tokens with a gradient, and without) the ids and rows of the targets. In between: ids and rows of the
# embedding, and in the backward pass of the targets; gradients of the head's adapter.
EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    ("fsdp", "forward"): {
        "layers all-gather": 5,
        "head all-gather": 6,
        "head all-to-all": 2,
        "once all-gather": 3,
        "once all-to-all": 1,
    },
    ("fsdp", "backward"): {
        "layers all-gather": 5,
        "layers all-reduce": 11,
        "head all-gather": 1,
        "once all-gather": 3,
        "once all-reduce": 3,
        "once all-to-all": 1,
    },
    ("fsdp tensor", "forward"): {
        "layers all-gather": 5,
        "layers all-reduce": 4,
        "head all-gather": 8,
        "head all-reduce": 10,
        "head all-to-all": 2,
        "head collective-permute": 2,
        "once all-gather": 5,
        "once all-reduce": 1,
        "once all-to-all": 1,
        "once collective-permute": 1,
    },
    ("fsdp tensor", "backward"): {
        "layers all-gather": 5,
        "layers all-reduce": 19,
        "head all-gather": 1,
        "once all-gather": 4,
        "once all-reduce": 5,
        "once all-to-all": 1,
        "once collective-permute": 1,
    },
}


def place(c: Collective) -> str:
    """Return "layers" once per layer; "attention" in a loop within a layer; "head" in another loop; "once"."""
    where = "once"
    for carried in c.loops:
        # Only the loop over the layers carries stacks of them.
        stacks = any(shape[:1] == (L,) and len(shape) > 2 for shape in carried)
        where = "layers" if stacks else "attention" if where in ("layers", "attention") else "head"
    return where


Step = tuple[dict[str, int], dict[str, list[Collective]]]  # a mesh, and what its programs send, by name


@pytest.fixture(scope="module", params=[pytest.param(MESHES[0], marks=pytest.mark.full), *MESHES[1:]], ids=str)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    mesh, directory = request.param, tmp_path_factory.mktemp("mesh")
    (shape,) = run_on(mesh, CHILD, directory)
    assert shape.startswith(f"{mesh['fsdp']}x{T}x1"), shape  # else T is not what a device has
    programs = ("forward", "backward", "optim_step")
    return mesh, {name: list(collectives((directory / name).read_text())) for name in programs}


def report(found: list[Collective]) -> str:
    return "\n".join(f"{place(c)}: {c.line[:300]}" for c in found)


def test_no_stack_of_layers_travels(step: Step) -> None:
    for name, found in step[1].items():
        wrong = [c for c in found if any(shape[:1] == (L,) for shape in c.shapes)]
        assert not wrong, f"{name}:\n{report(wrong)}"


def test_nothing_is_larger_than_a_block_of_the_table(
    step: Step,
) -> None:
    """Neither the table (an embedding lookup sends rows, the head gathers blocks) nor all devices' activations are.

    The head does need all of the table on each device in the course of a pass, as the layers do of each weight; it has
    one block of it at a time.
    """
    for name, found in step[1].items():
        wrong = [c for c in found if any(math.prod(shape) > BLOCK * D for shape in c.shapes)]
        assert not wrong, f"{name}:\n{report(wrong)}"


def test_no_scores_travel(step: Step) -> None:
    mesh, programs = step
    shard = V // mesh.get("tensor", 1)
    vocabulary = {V, shard, BLOCK, shard % BLOCK}
    for name, found in programs.items():
        wrong = [
            c
            for c in found
            for shape in c.shapes
            if (axes := vocabulary & set(shape)) and math.prod(shape) > max(axes) * D
        ]
        assert not wrong, f"{name}:\n{report(wrong)}"


def test_layers_gather_weights_and_sum_only_what_tensor_splits(
    step: Step,
) -> None:
    mesh, programs = step
    for name in ("forward", "backward"):
        layers = [c for c in programs[name] if place(c) == "layers"]
        # No width of the model has this size: such an axis counts tokens.
        with_tokens = [c for c in layers if any(max(shape, default=0) >= T // 2 for shape in c.shapes)]
        wrong = [c for c in with_tokens if c.kind != "all-reduce" or "tensor" not in mesh]
        assert not wrong, f"{name}: activations are sent\n{report(wrong)}"
        sums = [shape for c in with_tokens for shape in c.shapes if max(shape) >= T // 2]
        # A device's own tokens, as wide as the residual stream or as an adapter's rank (q, k, v side by side).
        assert all(shape in {(T, D), (T, R), (T, 2 * R), (T, 3 * R)} for shape in sums), report(with_tokens)
        if "tensor" in mesh:
            # Forwards o and down; backwards q|k|v, gate and up, of which compilers may add the last two first.
            assert sums.count((T, D)) in ((2,) if name == "forward" else (2, 3)), report(with_tokens)


def test_attention_sends_nothing(step: Step) -> None:
    for name, found in step[1].items():
        wrong = [c for c in found if place(c) == "attention"]
        assert not wrong, f"{name}:\n{report(wrong)}"


def test_the_optimizer_sends_scalars(step: Step) -> None:
    wrong = [c for c in step[1]["optim_step"] if any(c.shapes)]
    assert not wrong, report(wrong)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_nothing_new_is_sent(step: Step, name: str) -> None:
    mesh, programs = step
    counts: Counter[str] = Counter()
    for c in programs[name]:
        counts[f"{place(c)} {c.kind}"] += sum(1 for shape in c.shapes if shape)
    most = EXPECTED[" ".join(mesh), name]
    more = {key: n for key, n in counts.items() if n > most.get(key, 0)}
    assert not more, f"more than expected: {more}\nall: {dict(counts)}\n{report(programs[name])}"
