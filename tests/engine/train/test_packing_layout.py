"""Which plan does packing choose for a given call, and which arrays come of it? Every number is written out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from jax_client.engine.train import packing
from jax_client.engine.train.packing import Limits, MicroBatch, Plan, Slot, plan_call
from jax_client.values import TrainExample


def shown(plans: list[Plan]) -> list[str]:
    """Each plan as `ROWSxLENGTH: indices of a row, joined by + | the next row`; - is an empty row."""
    texts = []
    for plan in plans:
        rows: list[list[str]] = [[] for _ in range(plan.rows)]
        for slot in plan.slots:
            rows[slot.row].append(str(slot.index))
        texts.append(f"{plan.rows}x{plan.length}: " + " | ".join("+".join(row) or "-" for row in rows))
    return texts


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [
        pytest.param([], Limits(ways=1, tokens=2048), [], id="nothing"),
        pytest.param(
            [100, 200, 50, 150, 256, 60],
            Limits(ways=1, tokens=256),
            ["1x256: 4", "1x256: 1+2", "1x256: 3+0", "1x256: 5"],
            id="the fullest row that still has room",
        ),
        pytest.param(
            [1000] * 9,
            Limits(ways=1, tokens=2048),
            ["1x2048: 0+1", "1x2048: 2+3", "1x2048: 4+5", "1x1024: 6", "1x2048: 7+8"],
            id="the end of a call in two micro-batches",
        ),
        pytest.param(
            [500] * 20,
            Limits(ways=1, tokens=2048, concurrent=2),
            [
                "1x2048: 0+1+2+3", "1x2048: 4+5+6+7",
                "1x1024: 8+9", "1x1024: 10+11", "1x2048: 12+13+14+15", "1x2048: 16+17+18+19",
            ],
            id="two at once",
        ),
        pytest.param(
            [300, 200, 100, 400, 50, 60, 70],
            Limits(ways=2, tokens=512),
            ["2x256: 6+5+4 | -", "2x512: 3+2 | 0+1"],
            id="a row for every way",
        ),
        pytest.param(
            [2000] * 11 + [100] * 4,
            Limits(ways=1, tokens=8192, row_length=2048),
            ["4x2048: 0 | 1 | 2 | 3", "4x2048: 4 | 5 | 6 | 7", "4x2048: 8 | 9 | 10 | 11+12+13+14"],
            id="several rows to a micro-batch, at the end, too",
        ),
        pytest.param(
            [5000, 300, 20, 2100, 40],
            Limits(ways=2, tokens=2048),
            ["2x6144: 0+1+4+2 | 3"],
            id="short ones beside a long one",
        ),
        pytest.param(
            [9000, 9000, 100],
            Limits(ways=1, tokens=4096, row_length=2048),
            ["1x16384: 0+2", "1x16384: 1"],
            id="a row longer than the ceiling is alone",
        ),
        pytest.param(
            [10] * 10,
            Limits(ways=1, tokens=2048, segments=3),
            ["1x2048: 0+1+2", "1x2048: 3+4+5", "1x256: 6+7+8", "1x256: 9"],
            id="at most three segments to a row",
        ),
        pytest.param(
            [10] * 20 + [200],
            Limits(ways=2, tokens=1024, segments=2),
            [
                "2x1024: 20+0 | 1+2", "2x1024: 3+4 | 5+6", "2x1024: 7+8 | 9+10", "2x1024: 11+12 | 13+14",
                "2x256: 15+16 | 17+18", "2x256: 19 | -",
            ],
            id="at most two segments to a row, two ways",
        ),
        pytest.param(
            [60, 50, 40, 90],
            Limits(ways=1, tokens=100),
            ["1x100: 3", "1x100: 0+2", "1x100: 1"],
            id="a ceiling below the shortest row",
        ),
        pytest.param(
            [2048, 1024, 512, 256],
            Limits(ways=1, tokens=2048),
            ["1x2048: 0", "1x2048: 1+2+3"],
            id="at most three micro-batches at the end, though four would compute less",
        ),
        pytest.param(
            [30, 1500, 700, 900, 40, 300, 500],
            Limits(ways=1, tokens=2048),
            ["1x2048: 1+6+4", "1x2048: 3+2+5+0"],
            id="the longest first, at the end, too",
        ),
        pytest.param([700, 300, 260], Limits(ways=1, tokens=2048), ["1x512: 2", "1x1024: 0+1"], id="two for less"),
        pytest.param([256], Limits(ways=1, tokens=2048), ["1x256: 0"], id="one that fills its row"),
        pytest.param(
            [2100, 5000, 10],
            Limits(ways=1, tokens=2048),
            ["1x6144: 1", "1x3072: 0+2"],
            id="longer rows first",
        ),
        pytest.param(
            [10] * 16,
            Limits(ways=1, tokens=512, row_length=2048, segments=2),
            [
                "1x512: 0+1", "1x512: 2+3", "1x512: 4+5", "1x512: 6+7",
                "1x512: 8+9", "1x512: 10+11", "1x256: 12+13", "1x256: 14+15",
            ],
            id="an end with too many segments is halved",
        ),
        pytest.param(
            [300, 40, 1, 40, 256, 300, 300, 100, 256, 512, 256, 300, 1, 900, 256, 40, 256, 100, 1, 900],
            Limits(ways=1, tokens=2048, row_length=512, segments=2),
            [
                "1x1024: 13+7", "1x1024: 19+17", "4x512: 9 | 0+1 | 5+3 | 6+15", "1x512: 11+2",
                "4x512: 4+8 | 10+14 | 16+12 | 18",
            ],
            id="a full one at the end, where rows may not have as many segments",
        ),
        pytest.param(
            [256, 300, 40, 100, 300, 100, 40, 512, 900, 300, 40, 512],
            Limits(ways=1, tokens=2048, row_length=512),
            ["1x1024: 8+3", "1x512: 7", "1x512: 11", "4x512: 1+5+2+6 | 4+10 | 9 | 0"],
            id="an end is sorted by length",
        ),
        pytest.param(
            [200, 10], Limits(ways=1, tokens=4096, row_length=1024), ["1x512: 0+1"], id="no smallest row if wide"
        ),
    ],
)  # fmt: skip
def test_a_call_is_laid_out_so(lengths: list[int], limits: Limits, expected: list[str]) -> None:
    plans = plan_call(lengths, limits)
    assert shown(plans) == expected
    for plan in plans:
        ends: dict[int, int] = {}
        for slot in plan.slots:
            assert slot.start == ends.get(slot.row, 0) and slot.length == lengths[slot.index]
            ends[slot.row] = slot.start + slot.length


def test_rows_have_few_lengths() -> None:
    rungs = [256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 16384, 24576, 32768, 49152, 65536]
    below = [0, *rungs]
    assert [packing.row_length(rung) for rung in rungs] == rungs
    assert [packing.row_length(end + 1) for end in below[:-1]] == rungs


@pytest.mark.parametrize("smallest", [1, 2, 3, 64])
def test_a_ladder_has_one_rung_between_two_doublings(smallest: int) -> None:
    rungs = sorted({smallest * 2**n for n in range(12)} | {smallest * 3 * 2**n // 2 for n in range(1, 12)})
    values = [value for value in range(1, 2000) if value <= rungs[-1]]
    assert [packing.ladder(v, smallest) for v in values] == [next(r for r in rungs if r >= v) for v in values]


@pytest.mark.parametrize(
    ("limits", "rows", "length"),
    [
        (Limits(ways=1, tokens=2048), 1, 2048),
        (Limits(ways=2, tokens=5000), 2, 4096),
        (Limits(ways=1, tokens=16384, row_length=4096), 2, 4096),
        (Limits(ways=8, tokens=8192, row_length=2048), 32, 2048),
        (Limits(ways=3, tokens=100), 3, 100),
        (Limits(ways=1, tokens=256, row_length=2048), 1, 256),
    ],
)
def test_a_full_plan_has_the_rows_that_the_ceiling_allows(limits: Limits, rows: int, length: int) -> None:
    plan = packing.full_plan(limits)
    assert plan == Plan(rows=rows, length=length, slots=())
    assert type(plan.rows) is int


def test_a_plan_above_the_ceiling_runs_alone() -> None:
    limits = Limits(ways=2, tokens=1000, concurrent=3)
    assert limits.tokens_at_once == 3000
    plans = [Plan(rows=rows, length=length, slots=()) for rows, length in ((2, 1000), (2, 1001), (1, 2000), (2, 500))]
    assert [limits.alone(plan) for plan in plans] == [False, True, False, False]
    one, two, three, four = plans
    assert packing.in_rounds([four, one, two, three], limits) == [[two], [one, three, four]]
    assert packing.in_rounds([four, one, three, one, two], limits) == [[two], [one, three, one], [four]]


def test_a_micro_batch_costs_its_tokens_and_a_fixed_part_less_beside_another() -> None:
    assert packing._cost([256, 512], Limits(ways=1, tokens=512)) == 256 + 512 + 2 * 64
    assert packing._cost([256, 512], Limits(ways=2, tokens=512)) == 256 + 512 + 2 * 32
    assert packing._cost([256], Limits(ways=3, tokens=512)) == 256 + 64 / 3
    assert packing._cost([256, 512, 1024], Limits(ways=1, tokens=512, concurrent=2)) == 1088 + 0.75 * 576 + 320


def batch_of(lengths: list[int]) -> Any:
    """A micro-batch of one row with segments of these lengths, for `chained`, which reads only its plan."""
    slots = tuple(Slot(index=i, row=0, start=0, length=length) for i, length in enumerate(lengths))
    empty = np.zeros(0)
    zero = np.int32(0)
    return MicroBatch(
        plan=Plan(rows=1, length=2048, slots=slots), tokens_BT=empty, segments_BT=empty, positions_BT=empty,
        targets_BTC=empty, real_BTC=empty, inputs={}, order_BT=empty, place_BT=empty, with_gradient=zero, scored=zero,
    )  # fmt: skip


def test_the_last_round_follows_the_chains_with_the_least_attention() -> None:
    """Attention costs the square of a segment: two halves cost less than a whole."""
    a, b, c, d, e = (batch_of(lengths) for lengths in ([1000], [600, 600], [700], [600], [10]))
    assert packing.chained([[batch_of([800]), b], [c]])[0][0][0].plan.slots[0].length == 800, "not the cube"
    assert packing.chained([[a, b], [c, d]]) == [[[b, c], [a, d]]]
    assert packing.chained([[a, b], [c]]) == [[[b, c], [a]]]
    assert packing.chained([[a, b]]) == [[[a], [b]]]
    assert packing.chained([]) == []
    assert packing.chained([[a], [b]]) == [[[a]], [[b]]], "not behind one that runs alone"
    assert packing.chained([[e], [a, b], [c]]) == [[[e]], [[b, c], [a]]]


def test_a_micro_batch_has_these_arrays() -> None:
    data = [
        TrainExample(tokens_T=np.arange(7, 10), targets=np.arange(8, 11), inputs={"w": np.array([0.0, 1.0, -2.0])}),
        TrainExample(tokens_T=np.array([1, 2]), targets=np.array([[2, 3], [4, 5]])),
        TrainExample(tokens_T=np.array([5]), targets=np.array([6]), inputs={"w": np.array([0.0])}),
    ]  # fmt: skip
    slots = tuple(Slot(index=i, row=r, start=s, length=n) for i, r, s, n in ((0, 0, 0, 3), (2, 0, 3, 1), (1, 1, 0, 2)))
    plan = Plan(rows=3, length=5, slots=slots)
    batch = packing.fill(plan, data, {"w": 0.5, "v": 3.0}, "w")
    assert batch.plan is plan
    expected: dict[str, Any] = {
        "tokens_BT": [[7, 8, 9, 5, 0], [1, 2, 0, 0, 0], [0] * 5],
        "segments_BT": [[1, 1, 1, 2, 0], [3, 3, 0, 0, 0], [0] * 5],
        "positions_BT": [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0], [0] * 5],
        "order_BT": [[1, 2, 0, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
        "place_BT": [[2, 0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    }
    for name, rows in expected.items():
        assert getattr(batch, name).dtype == np.int32 and getattr(batch, name).tolist() == rows, name
    assert batch.targets_BTC.tolist()[:2] == [
        [[8, 0], [9, 0], [10, 0], [6, 0], [0, 0]],
        [[2, 3], [4, 5], [0, 0], [0, 0], [0, 0]],
    ]
    yes, no, both = [True, False], [False, False], [True, True]
    assert batch.real_BTC.tolist() == [[yes, yes, yes, yes, no], [both, both, no, no, no], [no] * 5]
    zero = [0.0, 0.0]
    assert batch.inputs["w"].tolist()[:2] == [
        [zero, [1.0, 0.0], [-2.0, 0.0], zero, zero],
        [[0.5, 0.5], [0.5, 0.5], zero, zero, zero],
    ]
    assert batch.inputs["v"].tolist()[1] == [[3.0, 3.0], [3.0, 3.0], zero, zero, zero]
    assert all(array.dtype == np.float32 for array in batch.inputs.values())
    assert (batch.with_gradient, batch.scored) == (2, 4)
    everything = packing.fill(plan, data, {"w": 0.5})
    assert (everything.with_gradient, everything.scored) == (4, 4)
    assert everything.order_BT.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_gradient_input_of_zeros_orders_nothing_before_the_rest() -> None:
    """Padding lies first in this row of targets, and still comes last in the order of work."""
    data = [TrainExample(tokens_T=np.array([1, 2]), targets=np.array([1, 2]), inputs={"w": np.zeros(2)})]
    slots = (Slot(index=0, row=0, start=2, length=2),)
    batch = packing.fill(Plan(rows=1, length=4, slots=slots), data, {"w": 1.0}, "w")
    assert (batch.with_gradient, batch.scored) == (0, 2)
    assert batch.order_BT.tolist() == [[2, 3, 0, 1]] and batch.place_BT.tolist() == [[2, 3, 0, 1]]
    assert batch.place_BT.dtype == np.int32


@pytest.mark.parametrize(("width", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (100, 128)])
def test_targets_are_padded_to_few_widths(width: int, expected: int) -> None:
    wide = TrainExample(tokens_T=np.zeros(1, np.int32), targets=np.ones((1, width), np.int32))
    narrow = TrainExample(tokens_T=np.zeros(1, np.int32), targets=np.ones(1, np.int32))
    (plan,) = plan_call([1, 1], Limits(ways=1, tokens=256))
    batch = packing.fill(plan, [wide, narrow], {})
    assert batch.targets_BTC.shape == (1, 256, expected)
    assert batch.real_BTC.sum() == width + 1
    assert packing.fill(Plan(rows=1, length=4, slots=()), [], {}).targets_BTC.shape == (1, 4, 1)


def test_values_go_out_and_come_back_in_the_shape_of_the_targets() -> None:
    data = [
        TrainExample(tokens_T=np.zeros(2, np.int32), targets=np.zeros((2, 2), np.int32)),
        TrainExample(tokens_T=np.zeros(1, np.int32), targets=np.zeros(1, np.int32)),
        TrainExample(tokens_T=np.zeros(1, np.int32), targets=np.zeros((1, 1), np.int32)),
    ]
    slots = tuple(Slot(index=i, row=i // 2, start=s, length=n) for i, s, n in ((0, 0, 2), (1, 2, 1), (2, 1, 1)))
    plan = Plan(rows=2, length=3, slots=slots)
    arrays = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5.0]), np.array([[6.0]])]
    values_BTC = packing.scatter(plan, data, arrays)
    assert values_BTC.dtype == np.float32
    assert values_BTC.tolist() == [[[1, 2], [3, 4], [5, 0]], [[0, 0], [6, 0], [0, 0]]]
    out: list[np.ndarray | None] = [None] * 4
    packing.unpack(plan, data, values_BTC, out)
    assert out[3] is None
    for got, want in zip(out[:3], arrays, strict=True):
        assert got is not None and got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_padding_waste_is_a_share_of_the_computed_tokens() -> None:
    slots = (Slot(index=0, row=0, start=0, length=30), Slot(index=1, row=1, start=0, length=20))
    plans = [Plan(rows=2, length=100, slots=slots), Plan(rows=1, length=50, slots=slots[:1])]
    assert packing.padding_waste(iter(plans)) == pytest.approx(1 - 80 / 250)


def test_plans_are_values() -> None:
    slot = Slot(index=0, row=0, start=0, length=1)
    for value in (slot, Plan(rows=1, length=1, slots=(slot,)), Limits(ways=1, tokens=1), batch_of([1])):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, 2)
        assert not hasattr(value, "__dict__")
        with pytest.raises(TypeError):
            type(value)(*(getattr(value, field.name) for field in fields(value)))


def test_only_rectangles_that_are_allowed_are_planned() -> None:
    limits = Limits(ways=1, tokens=2048, concurrent=2)
    for count in (1, 9, 32, 100):
        lengths = [78] * count
        freely = {plan.length for plan in packing.plan_call(lengths, limits)}
        plans = packing.plan_call(lengths, limits, {(1, max(freely))})
        assert {plan.length for plan in plans} == {max(freely)}
        assert sorted(slot.index for plan in plans for slot in plan.slots) == list(range(count))
        # Where none of them may be used, all are.
        assert packing.plan_call(lengths, limits, {(1, 7)}) == packing.plan_call(lengths, limits)
