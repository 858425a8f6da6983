"""What does a device failure look like to the user? A RequestFailedError that names it and says what to do."""

from __future__ import annotations

import jax

from jax_client.errors import JaxClientError, RequestFailedError

SEND_LESS = "Send less at a time (fewer samples, shorter prompts), or close clients that are not used."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in _first_line(error)


def is_device_failure(error: BaseException) -> bool:
    """Return whether a device failed, other than by running out of memory; the error may be named already."""
    cause: BaseException | None = error if isinstance(error, jax.errors.JaxRuntimeError) else error.__cause__
    return cause is not None and isinstance(cause, jax.errors.JaxRuntimeError) and not is_out_of_memory(cause)


def named_error(error: BaseException, where: str = "", remedy: str = SEND_LESS) -> BaseException:
    """Return the error that a future shows: device trouble by name with what to do, anything else as it is.

    Args:
        error: what the task raised.
        where: in which micro-batch the memory ran out, such as " in a micro-batch of 2 x 512 tokens"; "" for requests
            that have none.
        remedy: what to do when the memory ran out.
    """
    if isinstance(error, JaxClientError) or not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    first_line = _first_line(error)
    if not is_out_of_memory(error):
        return RequestFailedError(f"the device failed; the client's state is intact. {first_line}")
    return RequestFailedError(
        f"the device ran out of memory{where}; the client's state is intact. {first_line.rstrip('.')}. {remedy}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
