"""Does packing lose, leak or reorder anything, and is little of what it computes padding?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.engine.train import packing
from jax_client.engine.train.packing import Limits, ladder, padding_waste, plan_call
from jax_client.values import TrainExample

LENGTHS = st.lists(st.integers(1, 9000), min_size=1, max_size=60)
SHORT = st.lists(st.integers(1, 300), min_size=1, max_size=60)
LIMITS = st.sampled_from(
    [
        Limits(ways=1, tokens=2048),
        Limits(ways=8, tokens=2048, row_length=2048),
        Limits(ways=1, tokens=16384, row_length=4096, segments=3),
        Limits(ways=2, tokens=8192, row_length=2048),
        Limits(ways=1, tokens=100),
        Limits(ways=1, tokens=2048, concurrent=2),
    ]
)


@settings(max_examples=120, deadline=None)
@given(lengths=st.one_of(LENGTHS, SHORT), limits=LIMITS)
def test_every_sequence_lies_once_and_apart(lengths: list[int], limits: Limits) -> None:
    seen: list[int] = []
    plans = plan_call(lengths, limits)
    rounds = packing.in_rounds(plans, limits)
    assert sorted(map(id, plans)) == sorted(id(plan) for together in rounds for plan in together)
    for together in rounds:
        assert len(together) <= limits.concurrent
        assert len(together) == 1 or all(p.rows * p.length <= limits.ways * limits.tokens for p in together)
    for plan in plans:
        taken = np.zeros((plan.rows, plan.length), int)
        assert plan.rows % limits.ways == 0
        longest = max(slot.length for slot in plan.slots)
        assert plan.rows * plan.length <= limits.ways * max(limits.tokens, packing.row_length(longest))
        for slot in plan.slots:
            assert slot.length == lengths[slot.index] and slot.start + slot.length <= plan.length
            taken[slot.row, slot.start : slot.start + slot.length] += 1
            seen.append(slot.index)
        assert taken.max() == 1
        assert limits.segments is None or max(np.bincount([slot.row for slot in plan.slots])) <= limits.segments
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=30, deadline=None)
@given(lengths=SHORT, width=st.integers(1, 3), seed=st.integers(0, 99))
def test_unpack_undoes_fill(lengths: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(n,) if width == 1 else (n, width) for n in lengths]
    data = [
        TrainExample(
            tokens_T=rng.integers(1, 99, n).astype(np.int32),
            targets=rng.integers(1, 99, shape).astype(np.int32),
            inputs={"weights": (rng.random(shape) < 0.5).astype(np.float32)},
        )
        for n, shape in zip(lengths, shapes, strict=True)
    ]
    out: list[np.ndarray | None] = [None] * len(data)
    for plan in plan_call(lengths, Limits(ways=2, tokens=512)):
        batch = packing.fill(plan, data, {"weights": 1.0}, "weights")
        assert (batch.real_BTC[..., 0] == (batch.segments_BT > 0)).all()
        for row in range(plan.rows):
            order, gradient = batch.order_BT[row], (batch.inputs["weights"][row] != 0).any(axis=-1)
            assert (order[batch.place_BT[row]] == np.arange(plan.length)).all()
            assert not gradient[order[batch.with_gradient :]].any()
            assert not batch.real_BTC[row][order[batch.scored :]].any()
        packing.unpack(plan, data, batch.targets_BTC, out)
        np.testing.assert_array_equal(packing.scatter(plan, data, [s.targets for s in data]), batch.targets_BTC)
    for sequence, array in zip(data, out, strict=True):
        np.testing.assert_array_equal(array, sequence.targets)


def test_ladder() -> None:
    assert [ladder(n, 64) for n in (1, 64, 65, 129, 193, 257, 400, 8192)] == [64, 64, 128, 192, 256, 384, 512, 8192]
    assert [packing.row_length(n) for n in (1, 257, 2049, 8192, 8193, 17000)] == [256, 512, 3072, 8192, 16384, 24576]


@pytest.mark.parametrize("concurrent", [1, 2])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("count", "most"), [(16, 0.15), (256, 0.1)])
def test_little_padding_on_ragged_batches(count: int, most: float, seed: int, concurrent: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(seed).integers(32, 513, count)]
    assert padding_waste(plan_call(lengths, Limits(ways=1, tokens=2048, concurrent=concurrent))) < most


def test_a_call_is_shared_out_to_what_runs_at_once() -> None:
    """Two halves rather than a whole, without a round for which little is left."""
    limits = Limits(ways=1, tokens=2048, concurrent=2)
    for lengths, rounds in (([256] * 8, [[1024, 1024]]), ([1024] * 4, [[2048, 2048]]), ([300], [[512]])):
        plans = packing.in_rounds(plan_call(lengths, limits), limits)
        assert [[plan.length for plan in together] for together in plans] == rounds


def test_the_last_round_follows_without_waiting() -> None:
    """Its largest micro-batch goes after the one whose attention is over first."""
    limits = Limits(ways=1, tokens=2048, concurrent=2)

    def chains(lengths: list[int]) -> list[list[list[list[int]]]]:
        sequences = [TrainExample(tokens_T=np.zeros(n, np.int32), targets=np.zeros(n, np.int32)) for n in lengths]
        rounds = packing.in_rounds(plan_call(lengths, limits), limits)
        filled = [[packing.fill(plan, sequences, {}) for plan in together] for together in rounds]
        kept = sorted(slot.index for together in filled for batch in together for slot in batch.plan.slots)
        assert kept == list(range(len(lengths)))
        return [
            [[[slot.length for slot in batch.plan.slots] for batch in chain] for chain in together]
            for together in packing.chained(filled)
        ]

    assert chains([2048, *[256] * 8, 500, 250]) == [[[[256] * 7 + [250], [500]], [[2048], [256]]]]
    assert chains([256] * 8) == [[[[256] * 4], [[256] * 4]]]
    assert chains([4000, 300]) == [[[[4000]]], [[[300]]]], "the first had all of the memory"
    first, second = chains([2000] * 5)
    assert [len(chain) for chain in first] == [1, 1] and sorted(len(chain) for chain in second) == [1, 2]


@pytest.mark.parametrize("tokens", [2048, 16384])
@pytest.mark.parametrize("seed", range(10))
def test_little_padding_on_a_long_tailed_batch(seed: int, tokens: int) -> None:
    """Such as reinforcement learning gives: half of the answers are short, a few run to the limit."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(5.5, 1.0, 256), 16, 8192).astype(int).tolist()
    assert padding_waste(plan_call(lengths, Limits(ways=1, tokens=tokens))) < 0.1


@pytest.mark.parametrize(
    "limits",
    [
        Limits(ways=1, tokens=2048),
        Limits(ways=1, tokens=2048, concurrent=2),
        Limits(ways=8, tokens=2048, row_length=2048),
        Limits(ways=1, tokens=16384, row_length=4096),
        Limits(ways=4, tokens=8192, row_length=2048),
    ],
)
def test_few_rectangles_for_any_mixture(limits: Limits) -> None:
    """Forward and backward are compiled for each: eight are sixteen programs."""
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(300):
        top = int(2 ** rng.uniform(3, 13))
        lengths = rng.integers(1, top + 1, int(2 ** rng.uniform(0, 7))).tolist()
        shapes |= {(plan.rows, plan.length) for plan in plan_call(lengths, limits)}
    assert len(shapes) <= 8
