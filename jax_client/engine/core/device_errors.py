"""What does a device failure look like to the user?"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jax_client.engine.train.packing import Limits, MicroBatch, row_length
from jax_client.errors import JaxClientError, RequestFailedError


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory."""
    first_line = (str(error).splitlines() or [""])[0]
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in first_line


def named_error(
    error: BaseException, batches: Sequence[MicroBatch] = (), limits: Limits | None = None
) -> BaseException:
    """Return the error that a future shows: device trouble by name with what to do, anything else as it is.

    Args:
        error: what the task raised.
        batches: the micro-batches of the training call that failed; empty for other requests.
        limits: under which they were laid out.
    """
    if isinstance(error, JaxClientError) or not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    first_line = (str(error).splitlines() or [""])[0]
    if not is_out_of_memory(error):
        return RequestFailedError(f"the device failed; the client's state is intact. {first_line}")
    where, remedy = "", "Send less at a time (fewer samples, shorter prompts), or close clients that are not used."
    if batches and limits is not None:
        where, remedy = _shape_and_remedy(batches, limits)
    return RequestFailedError(
        f"the device ran out of memory{where}; the client's state is intact. {first_line.rstrip('.')}. {remedy}"
    )


def _shape_and_remedy(batches: Sequence[MicroBatch], limits: Limits) -> tuple[str, str]:
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
