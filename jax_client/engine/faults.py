"""What does a device failure look like to the user?"""

from __future__ import annotations

import jax

from jax_client.errors import JaxClientError, RequestFailedError


def named_error(error: BaseException) -> BaseException:
    """Return the error that a future shows: device trouble by name with what to do, anything else as it is."""
    if isinstance(error, JaxClientError) or not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    first_line = (str(error).splitlines() or [""])[0]
    if "RESOURCE_EXHAUSTED" in first_line:
        return RequestFailedError(
            f"the device ran out of memory; the client's state is intact. {first_line} Lower "
            "EngineConfig.max_tokens_per_micro_batch, set remat='full', or send shorter sequences."
        )
    return RequestFailedError(f"the device failed; the client's state is intact. {first_line}")
