"""What do torch's operations that take a part of a tensor return?

They return the part, whose shape follows from the arguments alone. A mask as an index would give a shape that depends
on values, and is refused: multiply by the mask, or take `torch.where`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.torch_graph.values import (
    BOOL,
    INT,
    MAX_PARTS,
    Table,
    Value,
    axis_of,
    integer,
    integers,
    is_tensor,
    tensor,
)

OPERATIONS = Table()


@OPERATIONS.add("operator.getitem")
def getitem(input: Value, index: Value) -> Value:
    """Return a part of a tensor or of a shape."""
    if isinstance(input, tuple):
        if isinstance(index, slice):
            return tuple(input)[index]
        return input[integer(index)]
    x, items = tensor(input), index if isinstance(index, tuple) else (index,)
    items = tuple(jnp.asarray(integers(item), INT) if isinstance(item, list) else item for item in items)
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if taken > x.ndim or sum(item is Ellipsis for item in items) > 1:
        raise ValueError(f"{taken} places are given for a tensor of {x.ndim} dimensions")
    axis = 0
    for item in items:
        axis += _check_item(item, x.shape[axis] if axis < x.ndim else 1, x.ndim - taken)
    return x.at[items].get(mode="fill") if any(map(is_tensor, items)) else _taken(x, items)


def _check_item(item: Value, size: int, skipped: int) -> int:
    """Check one place of an index; return how many dimensions it stands for."""
    if item is None:
        return 0
    if item is Ellipsis:
        return skipped
    if isinstance(item, slice):
        bounds = [bound for bound in (item.start, item.stop, item.step) if bound is not None]
        integers(bounds)
        if item.step is not None and item.step < 1:
            raise ValueError(f"a slice has step {item.step}; steps are 1 or more")
    elif is_tensor(item):
        if item.dtype == BOOL:
            raise ValueError("a mask as an index gives a shape that depends on values; multiply by it, or torch.where")
        if item.dtype.kind != "i":
            raise ValueError(f"an index has dtype {item.dtype}; it must be an integer")
    elif not -size <= integer(item) < size:
        raise ValueError(f"index {item} is out of range for a dimension of size {size}")
    return 1


def _taken(x: jax.Array, items: Sequence[Value]) -> jax.Array:
    """Return the part at whole numbers, slices, new dimensions and an ellipsis, all known before the loss runs."""
    skipped = x.ndim - sum(item is not None and item is not Ellipsis for item in items)
    axis = 0
    for item in items:
        if item is None:
            x = jnp.expand_dims(x, axis)
        elif item is Ellipsis:
            axis += skipped - 1
        elif isinstance(item, slice):
            first, last = _bound(item.start, x.shape[axis], 0), _bound(item.stop, x.shape[axis], x.shape[axis])
            x = jax.lax.slice_in_dim(x, first, max(first, last), item.step or 1, axis)
        else:
            at = integer(item)
            x = jax.lax.index_in_dim(x, at if at >= 0 else x.shape[axis] + at, axis, keepdims=False)
            axis -= 1
        axis += 1
    return x


def _bound(bound: Value, size: int, default: int) -> int:
    if bound is None:
        return default
    at = integer(bound)
    return min(at, size) if at >= 0 else max(at + size, 0)


@OPERATIONS.add("torch.gather", ".gather")
def gather(input: Value, dim: Value, index: Value) -> jax.Array:
    """Take along a dimension; what lies outside is NaN, and the loss is then refused."""
    x, at = tensor(input), tensor(index)
    if at.dtype.kind != "i" or at.ndim != x.ndim or not x.ndim:
        raise ValueError(f"the index has dtype {at.dtype} and {at.ndim} dimensions, the tensor {x.ndim}")
    axis = axis_of(dim, x)
    if any(at.shape[d] > x.shape[d] for d in range(x.ndim) if d != axis):
        raise ValueError(f"the index has shape {list(at.shape)}, more than the tensor's {list(x.shape)}")
    part = x[tuple(slice(None) if d == axis else slice(at.shape[d]) for d in range(x.ndim))]
    return jnp.take_along_axis(part, _from_the_front(at, x.shape[axis]), axis=axis, mode="fill")


@OPERATIONS.add("torch.index_select", ".index_select")
def index_select(input: Value, dim: Value, index: Value) -> jax.Array:
    """Take whole slices; what lies outside is NaN, and the loss is then refused."""
    x, at = tensor(input), tensor(index)
    if at.dtype.kind != "i" or at.ndim > 1:
        raise ValueError(f"the index has dtype {at.dtype} and {at.ndim} dimensions; give integers in one")
    axis = axis_of(dim, x)
    return jnp.take(x, _from_the_front(at.reshape(-1), x.shape[axis]), axis=axis, mode="fill")


def _from_the_front(index: jax.Array, size: int) -> jax.Array:
    # torch refuses negative places here; numpy would count them from the end.
    return jnp.where(index < 0, jnp.asarray(size, index.dtype), index)


@OPERATIONS.add("torch.select", ".select")
def select(input: Value, dim: Value, index: Value) -> jax.Array:
    """Take one slice."""
    x = tensor(input)
    axis, at = axis_of(dim, x), integer(index)
    if not -x.shape[axis] <= at < x.shape[axis]:
        raise ValueError(f"index {at} is out of range for a dimension of size {x.shape[axis]}")
    return jax.lax.index_in_dim(x, at, axis, keepdims=False)


@OPERATIONS.add("torch.narrow", ".narrow")
def narrow(input: Value, dim: Value, start: Value, length: Value) -> jax.Array:
    """Take a range."""
    x = tensor(input)
    axis, first, count = axis_of(dim, x), integer(start), integer(length)
    first += x.shape[axis] if first < 0 else 0
    if not 0 <= first <= first + count <= x.shape[axis]:
        raise ValueError(f"{count} from {first} on is out of range for a dimension of size {x.shape[axis]}")
    return jax.lax.slice_in_dim(x, first, first + count, axis=axis)


@OPERATIONS.add("torch.functional.split", "torch.split", ".split")
def split(tensor: Value, split_size: Value, dim: Value = 0) -> tuple[jax.Array, ...]:
    """Cut into pieces of a size, or of the sizes in a list."""
    if not is_tensor(tensor):  # torch's name for the argument hides the function that checks the others
        raise ValueError(f"a tensor is needed, got {type(tensor).__name__}")
    length = tensor.shape[axis_of(dim, tensor)]
    if isinstance(split_size, tuple | list):
        sizes = integers(split_size)
    else:
        piece = integer(split_size)
        if piece < 1 or length > piece * MAX_PARTS:
            raise ValueError(f"pieces of {piece} of a dimension of size {length}; the limit is {MAX_PARTS} pieces")
        sizes = tuple(min(piece, length - start) for start in range(0, length, piece)) or (0,)
    if min(sizes, default=-1) < 0 or sum(sizes) != length:
        raise ValueError(f"pieces of {list(sizes)[:8]} do not make up a dimension of size {length}")
    ends = np.cumsum(sizes).tolist()
    return tuple(narrow(tensor, dim, end - piece, piece) for end, piece in zip(ends, sizes, strict=True))


@OPERATIONS.add("torch.chunk", ".chunk")
def chunk(input: Value, chunks: Value, dim: Value = 0) -> tuple[jax.Array, ...]:
    """Cut into `chunks` pieces, the last perhaps smaller."""
    x = tensor(input)
    count = integer(chunks)
    if count < 1:
        raise ValueError(f"chunks is {count}; give 1 or more")
    return split(x, max(1, -(-x.shape[axis_of(dim, x)] // count)), dim)


@OPERATIONS.add("torch.unbind", ".unbind")
def unbind(input: Value, dim: Value = 0) -> tuple[jax.Array, ...]:
    """Take a tensor apart."""
    x = tensor(input)
    count = x.shape[axis_of(dim, x)]
    if count > MAX_PARTS:
        raise ValueError(f"a dimension of size {count} is taken apart; the limit is {MAX_PARTS} pieces")
    return tuple(select(x, dim, i) for i in range(count))


@OPERATIONS.add("torch.tril", ".tril")
def tril(input: Value, diagonal: Value = 0) -> jax.Array:
    """Keep the lower triangle."""
    return jnp.tril(tensor(input), integer(diagonal))


@OPERATIONS.add("torch.triu", ".triu")
def triu(input: Value, diagonal: Value = 0) -> jax.Array:
    """Keep the upper triangle."""
    return jnp.triu(tensor(input), integer(diagonal))
