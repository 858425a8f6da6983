"""Which values does an uploaded loss compute with, and what are torch's rules for their types, dimensions and sizes?

Tensors are jax arrays, of the types in `DTYPES`. Sizes and settings, and numbers computed from them, are Python's.
While a loss is traced for every length, a size may be an expression of the length (`jax.export.symbolic_shape`). An
operation raises ValueError for arguments that it cannot compute; the graph adds which node it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int64", "int32", "bool")}
FLOAT, INT, BOOL = DTYPES["float32"], DTYPES["int64"], DTYPES["bool"]
# Elements of one tensor: 4,096 x 4,096, so that all pairs of 8,192 tokens are refused.
MAX_ELEMENTS = 2**24
# Parts of a tuple: a tensor is not taken apart token by token.
MAX_PARTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A device, a layout or a memory format; there is only one of each."""

    kind: str
    name: str


class Pair(NamedTuple):
    """What torch returns of a reduction, a sort or a top-k along one dimension."""

    values: jax.Array
    indices: jax.Array


Number: TypeAlias = bool | int | float
# An argument of an operation, or its result.
Value: TypeAlias = (
    "jax.Array | Number | str | np.dtype | Place | EllipsisType | slice | tuple[Value, ...] | list[Value] | None"
)
Call = TypeVar("Call", bound=Callable[..., Value])


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One entry of the table.

    Attributes:
        call: takes what torch's takes, under torch's names.
        stops: whether no gradient passes through it.
    """

    call: Callable[..., Value]
    stops: bool = False


class Table(dict[str, Operation]):
    """Operations by wire name; a method's has a dot before it."""

    def add(self, *names: str, stops: bool = False) -> Callable[[Call], Call]:
        """Return a decorator that enters a function under all of these names."""

        def enter(call: Call) -> Call:
            self.update(dict.fromkeys(names, Operation(call=call, stops=stops)))
            return call

        return enter


def is_tensor(value: object) -> TypeGuard[jax.Array]:
    """Return whether this is a tensor, and not a number or a setting."""
    return isinstance(value, jax.Array)


def tensor(value: object) -> jax.Array:
    """Return a tensor as it is. Raises ValueError for anything else."""
    if not is_tensor(value):
        raise ValueError(f"a tensor is needed, got {type(value).__name__}")
    return value


def number(value: object) -> Number:
    """Return a Python number as it is. Raises ValueError for anything else."""
    if not isinstance(value, bool | int | float):
        raise ValueError(f"a number or a tensor is needed, got {type(value).__name__}")
    return value


def depends_on_length(value: Any) -> bool:
    """Return whether this is an expression of a length that is not known yet."""
    return is_symbolic_dim(value)


def is_size(value: object) -> TypeGuard[int]:
    """Return whether this is a whole number that follows from shapes, an expression of the length among them."""
    return (isinstance(value, int) and not isinstance(value, bool)) or depends_on_length(value)


def integer(value: object) -> int:
    """Return a size, a place or a count that is known before the loss runs."""
    if not is_size(value):
        raise ValueError(f"a whole number is needed that follows from shapes alone, got {type(value).__name__}")
    return value


def integers(values: Sequence[object]) -> tuple[int, ...]:
    """Return sizes or dimensions that were given one by one, or as one tuple or list."""
    if len(values) == 1 and isinstance(values[0], tuple | list):
        values = values[0]
    return tuple(integer(value) for value in values)


def positional_or_named(each: Sequence[object], named: object) -> tuple[int, ...]:
    """Return sizes or dimensions that were given one by one, or under their name."""
    if each and named is not None:
        raise ValueError("sizes or dimensions are given twice")
    return integers(each if named is None else [named])


@dataclass(kw_only=True, slots=True)
class SizeChecks:
    """What is checked once the length is known: of each expression of the length, where it came up and its limit.

    Attributes:
        where: what is being traced.
    """

    where: str = ""
    limits: dict[object, tuple[str, int]] = field(default_factory=dict)


_deferred: ContextVar[SizeChecks | None] = ContextVar("jax_client_size_checks", default=None)


@contextmanager
def deferred_checks() -> Iterator[SizeChecks]:
    """Collect, in this thread, the checks of sizes that depend on the length."""
    token = _deferred.set(checks := SizeChecks())
    try:
        yield checks
    finally:
        _deferred.reset(token)


def trace_node(where: str) -> None:
    """Note which node the sizes that are checked from now on belong to."""
    if (checks := _deferred.get()) is not None:
        checks.where = where


def exceeds(elements: int, limit: int, noun: str = "a tensor of it has") -> bool:
    """Return whether a number of elements is over a limit; for an expression of the length that is checked later."""
    checks = _deferred.get()
    if checks is not None and depends_on_length(elements):
        checks.limits.setdefault(elements, (f"{checks.where} cannot be computed: {noun}", limit))
        return False
    return elements > limit


def fits(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that a tensor may have. Raises ValueError beyond `MAX_ELEMENTS`."""
    if any(size < 0 for size in shape) or exceeds(math.prod(shape), MAX_ELEMENTS):
        raise ValueError(f"a tensor of shape {list(shape)[:8]} was asked for; the limit is {MAX_ELEMENTS} elements")
    return tuple(shape)


def _rank_of_type(dtype: np.dtype) -> int:
    return "bif".index(dtype.kind)


def result_dtype(*values: object) -> np.dtype:
    """Return the type that torch computes in.

    Tensors with dimensions come first, then scalar tensors, then numbers. Each group counts only if it is of a higher
    kind (bool, integer, float) than those before it.
    """
    tensors = [value for value in values if is_tensor(value)]
    kinds = {bool: BOOL, int: INT, float: FLOAT}
    groups = (
        [t.dtype for t in tensors if t.ndim],
        [t.dtype for t in tensors if not t.ndim],
        [
            INT if depends_on_length(value) else kinds[type(value)]
            for value in values
            if type(value) in kinds or depends_on_length(value)
        ],
    )
    widest: np.dtype | None = None
    for group in groups:
        if not group:
            continue
        dtype = max(group, key=lambda d: (_rank_of_type(d), d.itemsize))
        if widest is None or _rank_of_type(dtype) > _rank_of_type(widest):
            widest = dtype
    if widest is None:
        raise ValueError("a number or a tensor is needed")
    return widest


def together(*values: object) -> list[jax.Array]:
    """Return numbers and tensors as tensors of one type, whose common shape is not too large."""
    dtype = result_dtype(*values)
    operands = [value if is_tensor(value) or depends_on_length(value) else number(value) for value in values]
    fits(jnp.broadcast_shapes(*(value.shape for value in operands if is_tensor(value))))
    return [jnp.asarray(value, dtype) for value in operands]


def floats(value: object) -> jax.Array:
    """Return a tensor that is of a floating type: integers become float32, as torch's functions do."""
    x = tensor(value)
    return x if x.dtype.kind == "f" else x.astype(FLOAT)


def dtype_or(dtype: object, default: np.dtype) -> np.dtype:
    """Return the type that was given, or the default for None."""
    if dtype is None:
        return default
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"a dtype is needed, got {type(dtype).__name__}")
    return dtype


def cast(value: jax.Array, dtype: object) -> jax.Array:
    """Return the tensor in a type, or as it is for None."""
    return value if dtype is None else value.astype(dtype_or(dtype, value.dtype))


def dimension(dim: object, ndim: int) -> int:
    """Return a dimension counted from the front."""
    given, limit = integer(dim), max(ndim, 1)
    if not -limit <= given < limit:
        raise ValueError(f"dimension {given} does not exist; the tensor has {ndim}")
    return given % limit


def axis_of(dim: object, x: jax.Array) -> int:
    """Return a dimension of the tensor counted from the front. Raises ValueError where it has none."""
    if not x.ndim:
        raise ValueError("a scalar has no dimensions")
    return dimension(dim, x.ndim)


def dimensions(dim: object, ndim: int) -> tuple[int, ...]:
    """Return the dimensions to reduce: all of them for None and for an empty list."""
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(ndim))
    listed = dim if isinstance(dim, tuple | list) else (dim,)
    axes = tuple(dimension(d, ndim) for d in listed)
    if len(set(axes)) < len(axes):
        raise ValueError(f"dimensions {list(axes)} are named twice")
    # A scalar has no dimension, but torch lets it be reduced over its first.
    return axes if ndim else ()


def absolute(value: jax.Array) -> jax.Array:
    """Return the absolute value, with gradient 0 at 0, where jax has 1."""
    return value * jax.lax.stop_gradient(jnp.sign(value))


def safe_sqrt(value: jax.Array) -> jax.Array:
    """Return the root, with gradient 0 where it is 0, as torch's norm and std have it."""
    zero = value == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, value)))
