"""How long may a checkpoint live? From one hour to ten years, or for ever; the command line asks without the SDK."""

from __future__ import annotations

import numbers

from jax_client.errors import BadRequestError, BadTypeError, shown

MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600


def ttl(ttl_seconds: object, field: str = "ttl_seconds") -> int | None:
    """Return a time to live in seconds, from one hour to ten years; None is for ever. `field` is its name in messages.

    Raises:
        BadTypeError: not an integer.
        BadRequestError: out of range.
    """
    if ttl_seconds is None:
        return None
    advice = f"give an integer from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS}. None never expires."
    if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, numbers.Integral):
        raise BadTypeError(f"{field} is {shown(ttl_seconds)} ({type(ttl_seconds).__name__}); {advice}")
    seconds = int(ttl_seconds)
    if not MIN_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        raise BadRequestError(f"{field} is {seconds}; {advice}")
    return seconds
