"""Which values does an uploaded loss compute with, and what are torch's rules for their types, dimensions and sizes?

Tensors are jax arrays, of the types in `DTYPES`; sizes, settings and what comes of them are Python numbers. An
operation that cannot do what it is asked raises ValueError; the graph adds which node it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int64", "int32", "bool")}
FLOAT, INT, BOOL = DTYPES["float32"], DTYPES["int64"], DTYPES["bool"]
# Elements of one tensor: 4,096 x 4,096, so that all pairs of 8,192 tokens are refused.
MAX_ELEMENTS = 2**24
# Parts of a tuple: a tensor is not taken apart token by token.
MAX_PARTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One entry of the table.

    Attributes:
        call: takes what torch's takes, under torch's names.
        stops: whether no gradient passes through it.
    """

    call: Callable[..., Any]
    stops: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A device, a layout or a memory format; there is only one of each."""

    kind: str
    name: str


class Pair(NamedTuple):
    """What torch returns of a reduction, a sort or a top-k along one dimension."""

    values: jax.Array
    indices: jax.Array


class Table(dict[str, Operation]):
    """Operations by wire name; a method's has a dot before it."""

    def add(self, *names: str, stops: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that enters a function under all of these names."""

        def enter(call: Callable[..., Any]) -> Callable[..., Any]:
            self.update(dict.fromkeys(names, Operation(call=call, stops=stops)))
            return call

        return enter


def is_tensor(value: Any) -> bool:
    """Return whether this is a tensor, and not a number or a setting."""
    return isinstance(value, jax.Array)


def tensor(value: Any) -> jax.Array:
    """Return a tensor as it is. Raises ValueError for anything else."""
    if not is_tensor(value):
        raise ValueError(f"a tensor is needed, got {type(value).__name__}")
    return value


def numbers(*values: Any) -> None:
    """Refuse whatever is not a Python number."""
    for value in values:
        if not isinstance(value, bool | int | float):
            raise ValueError(f"a number or a tensor is needed, got {type(value).__name__}")


def integer(value: Any) -> int:
    """Return a size, a place or a count that is known before the loss runs."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"a whole number is needed that follows from shapes alone, got {type(value).__name__}")
    return value


def integers(values: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes or dimensions that were given one by one, or as one tuple or list."""
    if len(values) == 1 and isinstance(values[0], tuple | list):
        values = values[0]
    return tuple(integer(value) for value in values)


def fits(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that a tensor may have. Raises ValueError beyond `MAX_ELEMENTS`."""
    if any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"a tensor of shape {list(shape)[:8]} was asked for; the limit is {MAX_ELEMENTS} elements")
    return tuple(shape)


def _rank_of_type(dtype: np.dtype) -> int:
    return "bif".index(dtype.kind)


def result_dtype(*values: Any) -> np.dtype:
    """Return the type that torch computes in.

    Tensors with dimensions come first, then scalar tensors, then numbers. Each group counts only if it is of a higher
    kind (bool, integer, float) than those before it.
    """
    tensors = [value for value in values if is_tensor(value)]
    kinds = {bool: BOOL, int: INT, float: FLOAT}
    groups = (
        [t.dtype for t in tensors if t.ndim],
        [t.dtype for t in tensors if not t.ndim],
        [kinds[type(value)] for value in values if type(value) in kinds],
    )
    found: np.dtype | None = None
    for group in groups:
        if not group:
            continue
        dtype = max(group, key=lambda d: (_rank_of_type(d), d.itemsize))
        if found is None or _rank_of_type(dtype) > _rank_of_type(found):
            found = dtype
    if found is None:
        raise ValueError("a number or a tensor is needed")
    return found


def together(*values: Any) -> list[jax.Array]:
    """Return numbers and tensors as tensors of one type, whose common shape is not too large."""
    dtype = result_dtype(*values)
    for value in values:
        if not is_tensor(value):
            numbers(value)
    fits(np.broadcast_shapes(*(value.shape for value in values if is_tensor(value))))
    return [jnp.asarray(value, dtype) for value in values]


def floats(value: Any) -> jax.Array:
    """Return a tensor that is of a floating type: integers become float32, as torch's functions do."""
    value = tensor(value)
    return value if value.dtype.kind == "f" else value.astype(FLOAT)


def cast(value: jax.Array, dtype: Any) -> jax.Array:
    """Return the tensor in a type, or as it is for None."""
    if dtype is None:
        return value
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"a dtype is needed, got {type(dtype).__name__}")
    return value.astype(dtype)


def dimension(dim: Any, ndim: int) -> int:
    """Return a dimension counted from the front."""
    dim, limit = integer(dim), max(ndim, 1)
    if not -limit <= dim < limit:
        raise ValueError(f"dimension {dim} does not exist; the tensor has {ndim}")
    return dim % limit


def dimensions(dim: Any, ndim: int) -> tuple[int, ...]:
    """Return the dimensions to reduce: all of them for None and for an empty list."""
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(ndim))
    listed = dim if isinstance(dim, tuple | list) else (dim,)
    found = tuple(dimension(d, ndim) for d in listed)
    if len(set(found)) < len(found):
        raise ValueError(f"dimensions {list(found)} are named twice")
    # A scalar has no dimension, but torch lets it be reduced over its first.
    return found if ndim else ()


def absolute(value: jax.Array) -> jax.Array:
    """Return the absolute value, with gradient 0 at 0, where jax has 1."""
    return value * jax.lax.stop_gradient(jnp.sign(value))


def safe_sqrt(value: jax.Array) -> jax.Array:
    """Return the root, with gradient 0 where it is 0, as torch's norm and std have it."""
    zero = value == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, value)))
