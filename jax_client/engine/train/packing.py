"""How do ragged sequences become few rectangles with little padding, and how do results find their way back?

Several sequences share a row: positions restart and segment ids change at each, so packing changes no result. A
micro-batch is a rectangle of rows, all of one length out of `ROW_LENGTHS`; there are few rectangles, because each is
compiled once. Which ones a call takes depends on the call alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, islice

import numpy as np

from jax_client.values import TrainExample

# Tokens of a row. Small calls take small rows; beyond the usual ceiling the steps are finer, because there a row holds
# few sequences.
ROW_LENGTHS = (256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
# The cost of a micro-batch beside its tokens, in tokens: streaming the weights, adding up the gradients.
MICRO_BATCH_COST = 64
# The cost of a micro-batch that runs beside another one, as a share of its cost alone: measured, see docs/design.md.
CONCURRENT_COST = 0.75


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
class Limits:
    """The bounds of a micro-batch.

    Attributes:
        ways: ways that rows are split over the mesh; a micro-batch has a multiple of this many rows.
        tokens: ceiling of the tokens of a micro-batch, per way; a sequence that is longer has a row of its own length.
        row_length: longest row that several sequences are packed into, where attention costs by the row; None where it
            costs by the segment, so that one row per way is best.
        segments: most sequences of a row; None for any number.
        concurrent: micro-batches that run at the same time, see `in_rounds`.
    """

    ways: int
    tokens: int
    row_length: int | None = None
    segments: int | None = None
    concurrent: int = 1

    @property
    def tokens_at_once(self) -> int:
        """Return the ceiling of the tokens of all micro-batches that run at the same time, per way."""
        return self.tokens * self.concurrent

    def alone(self, plan: Plan) -> bool:
        """Return whether a micro-batch is above the ceiling, and runs alone: its size is then all that is in memory."""
        return plan.rows * plan.length > self.ways * self.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The arrays of one micro-batch.

    Attributes:
        tokens_BT, segments_BT, positions_BT: int32; segment 0 is padding.
        targets_BTC: int32; real_BTC: bool, False on padding.
        inputs: float32 (B, T, C) by name.
        order_BT, place_BT, with_gradient, scored: see `losses.logprob_head.Order`.
    """

    plan: Plan
    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BTC: np.ndarray
    real_BTC: np.ndarray
    inputs: dict[str, np.ndarray]
    order_BT: np.ndarray
    place_BT: np.ndarray
    with_gradient: np.int32
    scored: np.int32


def ladder(value: int, smallest: int) -> int:
    """Return the first rung at or above value: smallest times 1, 2, 3, 4, 6, 8 ..."""
    rung = smallest
    while rung < value:
        if rung * 3 // 2 >= value and rung > smallest:
            return rung * 3 // 2
        rung *= 2
    return rung


def row_length(tokens: int) -> int:
    """Return the shortest row length that holds `tokens` tokens."""
    return next((rung for rung in ROW_LENGTHS if rung >= tokens), ladder(tokens, ROW_LENGTHS[-1]))


def full_plan(limits: Limits) -> Plan:
    """Return the rectangle of a micro-batch of a large call, with nothing in it."""
    ceiling, usual = _usual_rows(limits)
    return Plan(rows=limits.ways * (ceiling // usual), length=usual, slots=())


def _usual_rows(limits: Limits) -> tuple[int, int]:
    """Return the tokens of a full micro-batch per way, and the length of its rows."""
    ceiling = max((rung for rung in ROW_LENGTHS if rung <= limits.tokens), default=limits.tokens)
    return ceiling, min(ceiling, limits.row_length or ceiling)


def plan_call(
    lengths: Sequence[int], limits: Limits, rectangles: Collection[tuple[int, int]] | None = None
) -> list[Plan]:
    """Lay out a call's sequences of these lengths; return plans that hold each sequence once.

    Rows are filled best-fit, longest sequence first. The rest, too little for a full micro-batch, goes into the few
    smaller ones that cost least.

    Args:
        lengths: in tokens.
        limits: of a micro-batch.
        rectangles: (rows, length) of the smaller micro-batches that may be used, the largest that is used without this
            among them; None is any.
    """
    ceiling, usual = _usual_rows(limits)
    bins = _Bins(lengths, limits.segments)
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not bins.put(index):
            if lengths[index] <= usual:
                bins.open(usual)
            else:  # every way of the mesh computes such a row, so others may as well lie there
                for _ in range(limits.ways):
                    bins.open(max(usual, row_length(lengths[index])))
            bins.put(index)

    plans, rest = [], []
    for length in sorted(set(bins.lengths), reverse=True):
        rows = [members for members, own in zip(bins.members, bins.lengths, strict=True) if own == length]
        # A longer row is large enough alone; two of them would be one more rectangle.
        most = limits.ways * (ceiling // length if length == usual else 1)
        # The fullest rows come first; up to two rounds of micro-batches are held back: the last one is seldom full.
        turn = most * limits.concurrent
        keep = max(0, (len(rows) - 1) // turn - 1) * turn if length == usual else len(rows)
        plans += [_plan(rows[i : i + most], most, length, lengths) for i in range(0, keep, most)]
        rest += [index for members in rows[keep:] for index in members]
    return plans + _plan_tail(rest, lengths, limits, rectangles)


def _plan_tail(
    indices: list[int], lengths: Sequence[int], limits: Limits, allowed: Collection[tuple[int, int]] | None = None
) -> list[Plan]:
    """Lay out sequences that fill at most a few micro-batches at the least cost.

    A micro-batch has one row per way, at most of the usual length, or is a full one: a longer row would cost more where
    attention costs by the row.
    """
    if not indices:
        return []
    indices = sorted(indices, key=lengths.__getitem__, reverse=True)
    ceiling, usual = _usual_rows(limits)
    rungs = [rung for rung in ROW_LENGTHS if rung <= usual] or [usual]
    if (full := ceiling // usual * usual) > usual:
        rungs.append(full)
    if ceiling > usual:  # many rows at once: such a device gains nothing from the smallest
        rungs = rungs[1:]
    if allowed is not None:
        rungs = [rung for rung in rungs if _rectangle(rung, limits) in allowed] or rungs
    total = sum(lengths[i] for i in indices)
    most = 2 * limits.concurrent + 1
    choices = [c for n in range(1, most + 1) for c in combinations_with_replacement(rungs, n)]
    choices = [c for c in choices if sum(c) * limits.ways >= total and c[-1] >= lengths[indices[0]]]
    for choice in sorted(choices, key=lambda c: (_cost(c, limits), len(c))):
        bins, shapes = _Bins(lengths, limits.segments), [_rectangle(rung, limits) for rung in sorted(choice)]
        for rows, length in shapes:
            for _ in range(rows):
                bins.open(length)
        if all(bins.put(index) for index in indices):
            members = iter(bins.members)
            return [_plan(list(islice(members, rows)), rows, length, lengths) for rows, length in shapes]
    half = len(indices) // 2  # a row may not have as many segments
    return [plan for part in (indices[:half], indices[half:]) for plan in _plan_tail(part, lengths, limits, allowed)]


def _rectangle(tokens: int, limits: Limits) -> tuple[int, int]:
    """Return the rows and the length of a micro-batch that holds `tokens` tokens of each way."""
    usual = _usual_rows(limits)[1]
    return limits.ways * max(1, tokens // usual), min(tokens, usual)


def _cost(choice: Sequence[int], limits: Limits) -> float:
    """Return what micro-batches of these tokens per way, in ascending order, cost, in tokens of a way."""
    costs = [length + MICRO_BATCH_COST / limits.ways for length in reversed(choice)]
    return sum(cost * (CONCURRENT_COST if i % limits.concurrent else 1) for i, cost in enumerate(costs))


def in_rounds(plans: Iterable[Plan], limits: Limits) -> list[list[Plan]]:
    """Return the plans in rounds of up to `limits.concurrent` that run at the same time, the largest first."""
    ordered = sorted(plans, key=lambda plan: -plan.rows * plan.length)
    large = [plan for plan in ordered if limits.alone(plan)]
    usual, n = ordered[len(large) :], limits.concurrent
    return [[plan] for plan in large] + [usual[i : i + n] for i in range(0, len(usual), n)]


def chained(rounds: Sequence[list[MicroBatch]]) -> list[list[list[MicroBatch]]]:
    """Return the rounds, each as chains: a chain runs its micro-batches in turn, beside the other chains of its round.

    All have one micro-batch, except that those of the last round, often an uneven one, follow those of the round before
    without waiting for all of them: the largest of the last goes to the chain that has least to do. Not behind a
    micro-batch that runs alone.
    """
    chains = [[[batch] for batch in together] for together in rounds]
    if len(chains) > 1 and len(chains[-2]) > 1:
        *_, before, last = chains
        before.sort(key=lambda chain: sum(slot.length**2 for slot in chain[0].plan.slots))
        for chain, (batch,) in zip(before, last, strict=False):
            chain.append(batch)
        chains.pop()
    return chains


class _Bins:
    """Rows being filled."""

    def __init__(self, sizes: Sequence[int], most_members: int | None):
        self._sizes = sizes
        self._most = most_members
        self.lengths: list[int] = []
        self.members: list[list[int]] = []
        self._room: list[int] = []

    def open(self, length: int) -> None:
        """Add an empty row."""
        self.lengths.append(length)
        self.members.append([])
        self._room.append(length)

    def put(self, index: int) -> bool:
        """Put a sequence into the row with the least room that still holds it; return whether there is one."""
        size = self._sizes[index]
        best = None
        for row, room in enumerate(self._room):
            full = self._most is not None and len(self.members[row]) >= self._most
            if room >= size and not full and (best is None or room < self._room[best]):
                best = row
        if best is None:
            return False
        self.members[best].append(index)
        self._room[best] -= size
        return True


def _plan(rows: Sequence[list[int]], count: int, length: int, lengths: Sequence[int]) -> Plan:
    slots = []
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            slots.append(Slot(index=index, row=row, start=start, length=lengths[index]))
            start += lengths[index]
    return Plan(rows=count, length=length, slots=tuple(slots))


def fill(
    plan: Plan,
    sequences: Sequence[TrainExample],
    input_defaults: Mapping[str, float],
    gradient_input: str | None = None,
) -> MicroBatch:
    """Copy the planned sequences into arrays.

    Args:
        plan: the micro-batch.
        sequences: of the whole call. Targets of [N] become C = 1; other K are padded to a rung above the widest.
        input_defaults: the inputs to lay out; one that a sequence lacks has its default.
        gradient_input: the input whose zeros mark targets that cannot have a gradient; None if all can.
    """
    B, T = plan.rows, plan.length
    C = _targets(plan, sequences)
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
    scored_BT = real_BTC.any(axis=-1)
    gradient_BT = scored_BT if gradient_input is None else (real_BTC & (inputs[gradient_input] != 0)).any(axis=-1)
    order_BT = np.argsort(2 - scored_BT.astype(np.int8) - gradient_BT, axis=1, kind="stable").astype(np.int32)
    return MicroBatch(
        plan=plan,
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        targets_BTC=targets_BTC,
        real_BTC=real_BTC,
        inputs=inputs,
        order_BT=order_BT,
        place_BT=np.argsort(order_BT, axis=1).astype(np.int32),
        with_gradient=np.int32(gradient_BT.sum(axis=1).max()),
        scored=np.int32(scored_BT.sum(axis=1).max()),
    )


def padding_waste(plans: Iterable[Plan]) -> float:
    """Return the share of the computed tokens that are padding."""
    plans = list(plans)
    return 1 - sum(slot.length for plan in plans for slot in plan.slots) / sum(p.rows * p.length for p in plans)


def scatter(plan: Plan, sequences: Sequence[TrainExample], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Lay one float32 array per sequence of the call, in its targets' shape, into (B, T, C)."""
    C = _targets(plan, sequences)
    out_BTC = np.zeros((plan.rows, plan.length, C), np.float32)
    for slot in plan.slots:
        width = _width(sequences[slot.index])
        rows = out_BTC[slot.row, slot.start : slot.start + slot.length, :width]
        rows[:] = np.asarray(arrays[slot.index]).reshape(slot.length, width)
    return out_BTC


def unpack(plan: Plan, sequences: Sequence[TrainExample], values_BTC: np.ndarray, out: list[np.ndarray | None]) -> None:
    """Write each sequence's part of (B, T, C), in its targets' shape, to `out` at the sequence's index in the call."""
    for slot in plan.slots:
        targets = sequences[slot.index].targets
        part = values_BTC[slot.row, slot.start : slot.start + slot.length, : _width(sequences[slot.index])]
        out[slot.index] = np.array(part, np.float32).reshape(targets.shape)


def _width(sequence: TrainExample) -> int:
    return 1 if sequence.targets.ndim == 1 else sequence.targets.shape[1]


def _targets(plan: Plan, sequences: Sequence[TrainExample]) -> int:
    """Return C of a micro-batch: a rung of a ladder, so that not every K compiles programs of its own."""
    return targets_of([sequences[slot.index] for slot in plan.slots])


def targets_of(sequences: Iterable[TrainExample]) -> int:
    """Return the targets per position of a micro-batch of these sequences, which its programs are compiled for."""
    return ladder(max((_width(sequence) for sequence in sequences), default=1), 1)
