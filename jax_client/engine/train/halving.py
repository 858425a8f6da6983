"""How does a training call that ran out of memory get smaller, and what can the user do?

A second run has micro-batches of half the size, where a smaller one still holds the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jax_client.engine.train.packing import ROW_LENGTHS, Limits, MicroBatch, plan_call, row_length


def halved(batches: Sequence[MicroBatch], limits: Limits) -> Limits | None:
    """Return limits under which a call's largest micro-batch is half as large; None if it cannot be smaller."""
    largest = max(batch.plan.rows * batch.plan.length for batch in batches) // limits.ways
    if largest <= ROW_LENGTHS[0]:
        return None
    smaller = replace(limits, tokens=largest // 2)
    plans = plan_call([slot.length for batch in batches for slot in batch.plan.slots], smaller)
    fits = max(plan.rows * plan.length for plan in plans) < largest * limits.ways
    return smaller if fits else None


def shape_and_remedy(batches: Sequence[MicroBatch], limits: Limits) -> tuple[str, str]:
    """Return where the memory ran out and what to do, as `device_errors.named_error` takes them."""
    largest = max(batches, key=lambda batch: batch.tokens_BT.size)
    B, T = largest.tokens_BT.shape
    longest = max(slot.length for slot in largest.plan.slots)
    # No setting makes a micro-batch smaller than its longest sequence's row.
    smallest = limits.ways * row_length(longest)
    where = f" in a micro-batch of {B} x {T} tokens"
    if smallest < B * T:
        fits = max(smallest, B * T // 2) * limits.concurrent
        return where, f"Set EngineConfig.max_tokens_per_micro_batch to {fits}, or set remat='full'."
    return where, f"A smaller one cannot hold a sequence of {longest} tokens: send shorter ones, or set remat='full'."
