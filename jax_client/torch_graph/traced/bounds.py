"""Is a traced loss small enough to be compiled? Its equations, its scans and the bytes that they write have limits.

A graph of few nodes can be a large program: an operation, and its gradient, may be hundreds of equations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.export import is_symbolic_dim

from jax_client.errors import BadRequestError

# Equations of the loss with its gradient; about 1 s of compiling for each 2,500. The losses of papers have up to 200.
MAX_EQUATIONS = 6000
# Scans and sorts, with those of the gradient.
MAX_SCANS = 64
# What all equations write, in bytes: nothing of it is kept in registers, and much of it at the same time.
MAX_BYTES = 4 * 2**30
INSTEAD = (
    "Write the loss as a function of (data, logprobs) and pass that to forward_backward_custom: it runs in your own "
    "process, with any operation of torch."
)
_SCANS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort")


class LimitError(BadRequestError):
    """A loss is too large a program."""


def check(jaxpr: Any, name: str, *, padded: bool = False) -> int:
    """Check a traced loss, and return its equations.

    Args:
        jaxpr: of the loss, or of the loss with its gradient.
        name: the loss's, for the message.
        padded: whether it has the operations, too, that keep padding out of sums; then twice as many are allowed.

    Raises:
        LimitError: it is over a limit, which the message names.
    """
    equations = scans = total = 0
    for inner in jaxprs(jaxpr):
        for equation in inner.eqns:
            written = [variable.aval for variable in equation.outvars]
            elements = [math.prod(aval.shape) for aval in written]
            equations += _weight(equation, elements)
            scans += equation.primitive.name in _SCANS
            total += sum(
                size * aval.dtype.itemsize
                for size, aval in zip(elements, written, strict=True)
                if not is_symbolic_dim(size)
            )
    for found, limit, noun in (
        (scans, MAX_SCANS, "scans and sorts"),
        (equations, MAX_EQUATIONS * (2 if padded else 1), "operations"),
        (total, MAX_BYTES, "bytes of intermediate values"),
    ):
        if found > limit:
            raise LimitError(
                f"loss {name} is too large to be compiled: with its gradient it has {found:,} {noun}; the limit is "
                f"{limit:,}. Use fewer of them, or shorter sequences. {INSTEAD}"
            )
    return equations


def _weight(equation: Any, elements: list[Any]) -> int:
    """Return for how many equations one counts: a scan becomes a tree of steps, with few operations in each."""
    name = equation.primitive.name
    if name not in _SCANS:
        return 0 if name in ("jit", "pjit") else 1
    size = elements[0]
    steps = 12 if is_symbolic_dim(size) else max(1, int(size).bit_length())
    return steps * (20 if name == "cumlogsumexp" else 2)


def jaxprs(jaxpr: Any) -> Iterator[Any]:
    """Yield a program and those inside of it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for each in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from jaxprs(inner)
