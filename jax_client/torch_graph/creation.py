"""What do torch's operations that make a tensor return? A constant or a range, of a size known before the loss runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.torch_graph.values import (
    DTYPES,
    FLOAT,
    INT,
    Table,
    Value,
    dtype_or,
    fits,
    integers,
    is_size,
    is_tensor,
    number,
    positional_or_named,
    result_dtype,
    tensor,
)

OPERATIONS = Table()


def _filled(shape: Sequence[int], value: Value, dtype: np.dtype) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value if is_tensor(value) else number(value), dtype), fits(shape))


@OPERATIONS.add("torch.full_like", stops=True)
def full_like(input: Value, fill_value: Value, dtype: Value = None) -> jax.Array:
    """Fill a tensor of this shape and type."""
    x = tensor(input)
    return _filled(x.shape, fill_value, dtype_or(dtype, x.dtype))


@OPERATIONS.add("torch.full", stops=True)
def full(size: Value, fill_value: Value, dtype: Value = None) -> jax.Array:
    """Fill a tensor of a shape."""
    return _filled(integers([size]), fill_value, dtype_or(dtype, result_dtype(fill_value)))


@OPERATIONS.add(".new_full", stops=True)
def new_full(input: Value, size: Value, fill_value: Value, dtype: Value = None) -> jax.Array:
    """Fill a tensor of a shape and this type."""
    return _filled(integers([size]), fill_value, dtype_or(dtype, tensor(input).dtype))


def _constants(name: str, value: int) -> None:
    def like(input: Value, dtype: Value = None) -> jax.Array:
        return full_like(input, value, dtype)

    def of_size(*each: Value, size: Value = None, dtype: Value = None) -> jax.Array:
        return _filled(positional_or_named(each, size), value, dtype_or(dtype, FLOAT))

    def new(input: Value, *each: Value, size: Value = None, dtype: Value = None) -> jax.Array:
        return _filled(positional_or_named(each, size), value, dtype_or(dtype, tensor(input).dtype))

    OPERATIONS.add(f"torch.{name}_like", stops=True)(like)
    OPERATIONS.add(f"torch.{name}", stops=True)(of_size)
    OPERATIONS.add(f".new_{name}", stops=True)(new)


_constants("zeros", 0)
_constants("ones", 1)


@OPERATIONS.add("torch.arange", stops=True)
def arange(start: Value, end: Value = None, step: Value = 1, dtype: Value = None) -> jax.Array:
    """Count from start to end."""
    first, last = (0, start) if end is None else (start, end)
    if is_size(first) and is_size(last) and is_size(step) and step == 1:
        count = last - first
        return (first + jax.lax.iota(INT, fits((max(0, count),))[0])).astype(dtype_or(dtype, INT))
    first, last = number(first), number(last)
    by = number(step)
    if by == 0 or not all(map(math.isfinite, (first, last, by))):
        raise ValueError(f"a range from {first} to {last} in steps of {by}")
    count = max(0, math.ceil((last - first) / by))
    whole = all(isinstance(each, int) for each in (first, last, by))
    at = jax.lax.iota(INT if whole else DTYPES["float64"], fits((count,))[0])
    return (first + at * by).astype(dtype_or(dtype, INT if whole else FLOAT))
