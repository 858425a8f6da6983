"""Does packing lose, leak or reorder anything, and is little of what it computes padding?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.engine import packing
from jax_client.engine.packing import ladder, plan_call
from jax_client.engine.requests import Sequence

from golden_cases import CASES
from golden_engine import CROSS_ENTROPY, SPEC, open_engine

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=60)


def plans(lengths: list[int], *, multiple: int = 1, max_tokens: int = 2048) -> list[packing.Plan]:
    return plan_call(
        lengths, max_tokens=max_tokens, row_multiple=multiple, max_length=8192, attention_weight=1e-4
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, multiple=st.sampled_from([1, 4, 8]))
def test_every_sequence_lies_once_and_apart(lengths: list[int], multiple: int) -> None:
    seen: list[int] = []
    for plan in plans(lengths, multiple=multiple):
        taken = np.zeros((plan.rows, plan.length), int)
        assert plan.rows % multiple == 0
        assert plan.rows * plan.length <= 2048 or plan.rows == multiple
        for slot in plan.slots:
            assert slot.length == lengths[slot.index] and slot.start + slot.length <= plan.length
            taken[slot.row, slot.start : slot.start + slot.length] += 1
            seen.append(slot.index)
        assert taken.max() == 1
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, width=st.integers(1, 3), seed=st.integers(0, 99))
def test_unpack_undoes_fill(lengths: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(n,) if width == 1 else (n, width) for n in lengths]
    data = [
        Sequence(tokens_T=rng.integers(1, 99, n).astype(np.int32), targets=rng.integers(1, 99, shape).astype(np.int32))
        for n, shape in zip(lengths, shapes, strict=True)
    ]
    out: list[np.ndarray | None] = [None] * len(data)
    for plan in plans(lengths):
        batch = packing.fill(plan, data, {"weights": 1.0})
        assert (batch.real_BTC[..., 0] == (batch.segments_BT > 0)).all()
        packing.unpack(plan, data, batch.targets_BTC, out)
        np.testing.assert_array_equal(packing.scatter(plan, data, [s.targets for s in data]), batch.targets_BTC)
    for sequence, array in zip(data, out, strict=True):
        np.testing.assert_array_equal(array, sequence.targets)


def test_ladder() -> None:
    assert [ladder(n, 64) for n in (1, 64, 65, 129, 193, 257, 400, 8192)] == [64, 64, 128, 192, 256, 384, 512, 8192]


@pytest.mark.parametrize("count", [16, 256])
def test_little_padding_on_ragged_batches(count: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(32, 513, count)]
    computed = sum(plan.rows * plan.length for plan in plans(lengths))
    assert sum(lengths) / computed > 0.85


def test_packed_equals_alone(tmp_path: Path) -> None:
    """Sequences that share rows get the logprobs that each gets in a call of its own."""
    config = CASES["qwen3_tied"]
    engine = open_engine(tmp_path / "m", config)
    lane = engine.open_lane()
    adapter = engine.create_adapter(lane, SPEC).result()
    rng = np.random.default_rng(4)
    data = []
    for n in (5, 30, 17, 40, 3):
        tokens = rng.integers(0, config["vocab_size"], n + 1).astype(np.int32)
        data.append(Sequence(tokens_T=tokens[:-1], targets=tokens[1:]))
    together = engine.forward(lane, adapter, data, CROSS_ENTROPY).result().logprobs
    for sequence, packed in zip(data, together, strict=True):
        alone = engine.forward(lane, adapter, [sequence], CROSS_ENTROPY).result().logprobs[0]
        np.testing.assert_allclose(packed, alone, rtol=1e-6, atol=1e-6)
    engine.close()
