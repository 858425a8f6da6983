"""How do ragged sequences become few rectangles with little padding, and how do results find their way back?

The sequences of one call are packed best-fit into rows of one length. Length and row counts come from short ladders, so
that any mixture of lengths needs few compiled programs; which rung depends on the call alone. Positions restart and
segment ids change at each sequence, so packing changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from jax_client.engine.requests import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a sequence lies in a micro-batch."""

    index: int  # in the call
    row: int
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One micro-batch: its rectangle and what lies in it."""

    rows: int
    length: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The arrays of one micro-batch: int32 (B, T) and (B, T, C), float32 inputs (B, T, C), bool real_BTC."""

    plan: Plan
    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BTC: np.ndarray
    real_BTC: np.ndarray
    inputs: dict[str, np.ndarray]


def ladder(value: int, smallest: int) -> int:
    """Return the first rung at or above value: smallest times 1, 1.5, 2, 3, 4, 6, 8 ..."""
    rung = smallest
    while rung < value:
        if rung * 3 // 2 >= value and rung > smallest:
            return rung * 3 // 2
        rung *= 2
    return rung


def plan_call(
    lengths: Seq[int], *, max_tokens: int, row_multiple: int, max_length: int, attention_weight: float
) -> list[Plan]:
    """Lay out a call's sequences.

    Args:
        lengths: tokens of each sequence.
        max_tokens: ceiling of rows x length per micro-batch; one row may exceed it when a sequence does.
        row_multiple: rows come in multiples of this (the ways that rows are sharded).
        max_length: longest row.
        attention_weight: cost of one key per query, in units of all other work of a token.

    Returns:
        Plans that hold every sequence once, for the row length with the least computed work.
    """
    longest = max(lengths)
    candidates, rung = [], ladder(longest, 64)
    while not candidates or (rung <= min(max_length, max_tokens) and len(candidates) < 5):
        candidates.append(rung)
        rung = ladder(rung + 1, 64)

    def cost(length: int) -> tuple[float, int]:
        plans = _plans_of_length(lengths, length, max_tokens, row_multiple)
        tokens = sum(plan.rows * plan.length for plan in plans)
        return tokens * (1 + attention_weight * length / 2), length

    best = min(candidates, key=cost)
    return _plans_of_length(lengths, best, max_tokens, row_multiple)


def _plans_of_length(lengths: Seq[int], length: int, max_tokens: int, row_multiple: int) -> list[Plan]:
    rows = _best_fit(lengths, length)
    most = max(1, max_tokens // (length * row_multiple))
    most = max(m for m in _row_rungs() if m <= most) * row_multiple
    plans = []
    for first in range(0, len(rows), most):
        chunk = rows[first : first + most]
        count = next(m for m in _row_rungs() if m * row_multiple >= len(chunk)) * row_multiple
        slots = []
        for row, members in enumerate(chunk):
            start = 0
            for index in members:
                slots.append(Slot(index=index, row=row, start=start, length=lengths[index]))
                start += lengths[index]
        plans.append(Plan(rows=count, length=length, slots=tuple(slots)))
    return plans


def _row_rungs() -> list[int]:
    return [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


def _best_fit(lengths: Seq[int], length: int) -> list[list[int]]:
    """Put each sequence, longest first, into the row with the least room that still holds it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[index]]
        row = min(fits, key=room.__getitem__, default=len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def fill(plan: Plan, sequences: Seq[Sequence], input_defaults: Mapping[str, float]) -> MicroBatch:
    """Copy the planned sequences into arrays.

    Targets of [N] become C = 1; narrower K is padded to the widest. An input that a sequence lacks has its default.
    """
    B, T = plan.rows, plan.length
    C = max(_width(sequences[slot.index]) for slot in plan.slots)
    tokens_BT, segments_BT, positions_BT = (np.zeros((B, T), np.int32) for _ in range(3))
    targets_BTC, real_BTC = np.zeros((B, T, C), np.int32), np.zeros((B, T, C), bool)
    inputs = {name: np.zeros((B, T, C), np.float32) for name in input_defaults}
    for segment, slot in enumerate(plan.slots, start=1):
        sequence, width = sequences[slot.index], _width(sequences[slot.index])
        where = (slot.row, slice(slot.start, slot.start + slot.length))
        tokens_BT[where] = sequence.tokens_T
        segments_BT[where] = segment
        positions_BT[where] = np.arange(slot.length)
        targets_BTC[where][:, :width] = sequence.targets.reshape(slot.length, width)
        real_BTC[where][:, :width] = True
        for name, default in input_defaults.items():
            value = sequence.inputs.get(name)
            inputs[name][where][:, :width] = default if value is None else value.reshape(slot.length, width)
    return MicroBatch(
        plan=plan,
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        targets_BTC=targets_BTC,
        real_BTC=real_BTC,
        inputs=inputs,
    )


def scatter(plan: Plan, sequences: Seq[Sequence], arrays: Seq[np.ndarray]) -> np.ndarray:
    """Lay one float32 array per sequence of the call, in its targets' shape, into (B, T, C)."""
    C = max(_width(sequences[slot.index]) for slot in plan.slots)
    out_BTC = np.zeros((plan.rows, plan.length, C), np.float32)
    for slot in plan.slots:
        width = _width(sequences[slot.index])
        rows = out_BTC[slot.row, slot.start : slot.start + slot.length, :width]
        rows[:] = np.asarray(arrays[slot.index]).reshape(slot.length, width)
    return out_BTC


def unpack(plan: Plan, sequences: Seq[Sequence], values_BTC: np.ndarray, out: list[np.ndarray | None]) -> None:
    """Write each sequence's part of (B, T, C), in its targets' shape, to `out` at the sequence's index in the call."""
    for slot in plan.slots:
        targets = sequences[slot.index].targets
        part = values_BTC[slot.row, slot.start : slot.start + slot.length, : _width(sequences[slot.index])]
        out[slot.index] = np.array(part, np.float32).reshape(targets.shape)


def _width(sequence: Sequence) -> int:
    return 1 if sequence.targets.ndim == 1 else sequence.targets.shape[1]
