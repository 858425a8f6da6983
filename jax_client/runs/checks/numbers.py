"""Which values count as a number of a given range? The checks that every other check is made of."""

from __future__ import annotations

import math
import numbers
import operator

from jax_client.errors import BadRequestError, BadTypeError, shown

# The engine computes in float32: a larger number would be infinite there, a smaller one, or a subnormal one, zero.
FLOAT32_LARGEST = 3.4e38
FLOAT32_SMALLEST = 1.2e-38


def integer(field: str, value: object, low: int, high: int | None = None, hint: str = "") -> int:
    """Return `value` as an int in [low, high], None without limit; NumPy integers are fine, bool is not.

    Raises:
        BadTypeError: it is not an integer.
        BadRequestError: it is out of range.
    """
    # An int is told apart by its type alone: samples are checked by the hundred a second.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise BadTypeError(f"{field} is {shown(value)} ({type(value).__name__}); {_integers(low, high, hint)}")
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        raise BadRequestError(f"{field} is {shown(number)}; {_integers(low, high, hint)}")
    return number


def _integers(low: int, high: int | None, hint: str) -> str:
    interval = f"of at least {low}" if high is None else f"from {low} to {high}"
    return f"give an integer {interval}." + (f" {hint}" if hint else "")


def real(
    field: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    hint: str = "",
) -> float:
    """Return `value` as a finite float between the bounds; an open bound is itself refused.

    Raises:
        BadTypeError: it is not a real number; bool and numeric text are not.
        BadRequestError: it is NaN, infinite or out of range.
    """

    def wanted() -> str:
        interval = f"{'(' if low_open else '['}{low:g}, {high:.9g}{')' if high_open or math.isinf(high) else ']'}"
        return f"give a finite number in {interval}." + (f" {hint}" if hint else "")

    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise BadTypeError(f"{field} is {shown(value)} ({type(value).__name__}); {wanted()}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    above = low < number if low_open else low <= number
    below = number < high if high_open else number <= high
    if not (math.isfinite(number) and above and below):
        raise BadRequestError(f"{field} is {shown(value)}; {wanted()}")
    return number


def flag(field: str, value: object) -> bool:
    """Return `value` if it is True or False; raise BadTypeError otherwise."""
    if not isinstance(value, bool):
        raise BadTypeError(f"{field} is {shown(value)} ({type(value).__name__}); give True or False.")
    return value
