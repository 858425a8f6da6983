"""What do torch's operations on shapes, places and whole tensors return?

Sizes are numbers known before the loss runs. What would give a shape that depends on values (a mask as an index) is
refused; multiply by the mask, or take `torch.where`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.torch_graph.values import (
    BOOL,
    DTYPES,
    FLOAT,
    INT,
    MAX_PARTS,
    Pair,
    Place,
    Table,
    dimension,
    dimensions,
    fits,
    integer,
    integers,
    is_tensor,
    numbers,
    result_dtype,
    tensor,
)

OPERATIONS = Table()


@OPERATIONS.add("getattr", "builtins.getattr")
def attribute(input: Any, name: Any) -> Any:
    """Return one of the few attributes that a loss may read."""
    if isinstance(input, Pair):
        if name in ("values", "indices"):
            return input.values if name == "values" else input.indices
    elif is_tensor(input):
        x = tensor(input)
        if name == "shape":
            return x.shape
        if name == "ndim":
            return x.ndim
        if name == "dtype":
            return np.dtype(x.dtype)
        if name == "device":
            return Place(kind="device", name="cpu")
        if name == "data":
            return jax.lax.stop_gradient(x)
        if name == "T":
            return jnp.transpose(x)
        if name == "mT" and x.ndim > 1:
            return jnp.swapaxes(x, -1, -2)
    raise ValueError(f"there is no attribute {str(name)[:40]!r}; known are shape, ndim, dtype, device, data, T and mT")


@OPERATIONS.add(".size", stops=True)
def size(input: Any, dim: Any = None) -> Any:
    """Return the shape, or one size."""
    return tensor(input).shape if dim is None else input.shape[_axis(dim, input)]


def _axis(dim: Any, x: jax.Array) -> int:
    if not x.ndim:
        raise ValueError("a scalar has no dimensions")
    return dimension(dim, x.ndim)


@OPERATIONS.add(".dim", ".ndimension", stops=True)
def ndim(input: Any) -> int:
    """Return the number of dimensions."""
    return tensor(input).ndim


@OPERATIONS.add(".numel", ".nelement", "torch.numel", stops=True)
def numel(input: Any) -> int:
    """Return the number of elements."""
    return tensor(input).size


@OPERATIONS.add("operator.getitem")
def getitem(input: Any, index: Any) -> Any:
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
    return x.at[items].get(mode="fill")


def _check_item(item: Any, size: int, skipped: int) -> int:
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


@OPERATIONS.add("torch.gather", ".gather")
def gather(input: Any, dim: Any, index: Any) -> jax.Array:
    """Take along a dimension; what lies outside is NaN, and the loss is then refused."""
    x, index = tensor(input), tensor(index)
    if index.dtype.kind != "i" or index.ndim != x.ndim or not x.ndim:
        raise ValueError(f"the index has dtype {index.dtype} and {index.ndim} dimensions, the tensor {x.ndim}")
    axis = _axis(dim, x)
    if any(index.shape[d] > x.shape[d] for d in range(x.ndim) if d != axis):
        raise ValueError(f"the index has shape {list(index.shape)}, more than the tensor's {list(x.shape)}")
    part = x[tuple(slice(None) if d == axis else slice(index.shape[d]) for d in range(x.ndim))]
    return jnp.take_along_axis(part, _from_the_front(index, x.shape[axis]), axis=axis, mode="fill")


@OPERATIONS.add("torch.index_select", ".index_select")
def index_select(input: Any, dim: Any, index: Any) -> jax.Array:
    """Take whole slices; what lies outside is NaN, and the loss is then refused."""
    x, index = tensor(input), tensor(index)
    if index.dtype.kind != "i" or index.ndim > 1:
        raise ValueError(f"the index has dtype {index.dtype} and {index.ndim} dimensions; give integers in one")
    axis = _axis(dim, x)
    return jnp.take(x, _from_the_front(index.reshape(-1), x.shape[axis]), axis=axis, mode="fill")


def _from_the_front(index: jax.Array, size: int) -> jax.Array:
    # torch refuses negative places here; numpy would count them from the end.
    return jnp.where(index < 0, size, index)


@OPERATIONS.add("torch.select", ".select")
def select(input: Any, dim: Any, index: Any) -> jax.Array:
    """Take one slice."""
    x = tensor(input)
    axis, index = _axis(dim, x), integer(index)
    if not -x.shape[axis] <= index < x.shape[axis]:
        raise ValueError(f"index {index} is out of range for a dimension of size {x.shape[axis]}")
    return jax.lax.index_in_dim(x, index, axis, keepdims=False)


@OPERATIONS.add("torch.narrow", ".narrow")
def narrow(input: Any, dim: Any, start: Any, length: Any) -> jax.Array:
    """Take a range."""
    x = tensor(input)
    axis, start, length = _axis(dim, x), integer(start), integer(length)
    start += x.shape[axis] if start < 0 else 0
    if not 0 <= start <= start + length <= x.shape[axis]:
        raise ValueError(f"{length} from {start} on is out of range for a dimension of size {x.shape[axis]}")
    return jax.lax.slice_in_dim(x, start, start + length, axis=axis)


def _one_by_one(each: tuple[Any, ...], named: Any) -> tuple[int, ...]:
    """Return sizes or dimensions that were given in places, or under their name."""
    if each and named is not None:
        raise ValueError("sizes or dimensions are given twice")
    return integers(each if named is None else [named])


@OPERATIONS.add(".view", ".reshape")
def reshape(input: Any, *sizes: Any, shape: Any = None) -> jax.Array:
    """Give the elements another shape."""
    return jnp.reshape(tensor(input), _one_by_one(sizes, shape))


OPERATIONS.add("torch.reshape")(lambda input, shape: reshape(input, shape))


@OPERATIONS.add(".view_as", ".reshape_as")
def reshape_as(input: Any, other: Any) -> jax.Array:
    """Give the elements another tensor's shape."""
    return jnp.reshape(tensor(input), tensor(other).shape)


@OPERATIONS.add("torch.flatten", ".flatten")
def flatten(input: Any, start_dim: Any = 0, end_dim: Any = -1) -> jax.Array:
    """Merge dimensions."""
    x = tensor(input)
    first, last = dimension(start_dim, x.ndim), dimension(end_dim, x.ndim)
    if first > last:
        raise ValueError(f"start_dim {start_dim} comes after end_dim {end_dim}")
    return x.reshape(*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


@OPERATIONS.add("torch.ravel", ".ravel")
def ravel(input: Any) -> jax.Array:
    """Merge all dimensions."""
    return tensor(input).reshape(-1)


@OPERATIONS.add("torch.squeeze", ".squeeze")
def squeeze(input: Any, dim: Any = None) -> jax.Array:
    """Drop dimensions of size 1; others stay."""
    x = tensor(input)
    return jnp.squeeze(x, tuple(d for d in dimensions(dim, x.ndim) if x.shape[d] == 1))


@OPERATIONS.add("torch.unsqueeze", ".unsqueeze")
def unsqueeze(input: Any, dim: Any) -> jax.Array:
    """Add a dimension of size 1."""
    x = tensor(input)
    return jnp.expand_dims(x, dimension(dim, x.ndim + 1))


@OPERATIONS.add("torch.transpose", ".transpose", "torch.swapaxes", ".swapaxes")
def transpose(input: Any, dim0: Any, dim1: Any) -> jax.Array:
    """Swap two dimensions."""
    x = tensor(input)
    return jnp.swapaxes(x, dimension(dim0, x.ndim), dimension(dim1, x.ndim)) if x.ndim else x


@OPERATIONS.add("torch.t", ".t")
def t(input: Any) -> jax.Array:
    """Transpose a matrix."""
    if tensor(input).ndim > 2:
        raise ValueError(f"the tensor has {input.ndim} dimensions; t takes two at most")
    return jnp.transpose(input)


@OPERATIONS.add(".permute")
def permute(input: Any, *axes: Any, dims: Any = None) -> jax.Array:
    """Reorder the dimensions."""
    x = tensor(input)
    return jnp.transpose(x, tuple(dimension(d, x.ndim) for d in _one_by_one(axes, dims)))


OPERATIONS.add("torch.permute")(lambda input, dims: permute(input, dims))


@OPERATIONS.add(".expand")
def expand(input: Any, *each: Any, size: Any = None) -> jax.Array:
    """Repeat along dimensions of size 1; -1 keeps a size."""
    x, sizes = tensor(input), _one_by_one(each, size)
    extra = len(sizes) - x.ndim
    if extra < 0:
        raise ValueError(f"{len(sizes)} sizes are given for a tensor of {x.ndim} dimensions")
    return jnp.broadcast_to(x, fits([own if s == -1 else s for s, own in zip(sizes, (-1,) * extra + x.shape, strict=True)]))  # noqa: E501 # fmt: skip


@OPERATIONS.add("torch.broadcast_to", ".broadcast_to")
def broadcast_to(input: Any, size: Any) -> jax.Array:
    """Repeat to a shape."""
    return expand(input, size)


@OPERATIONS.add(".expand_as")
def expand_as(input: Any, other: Any) -> jax.Array:
    """Repeat to another tensor's shape."""
    return jnp.broadcast_to(tensor(input), tensor(other).shape)


@OPERATIONS.add(".repeat")
def repeat(input: Any, *each: Any, repeats: Any = None) -> jax.Array:
    """Lay copies side by side."""
    x, counts = tensor(input), _one_by_one(each, repeats)
    if len(counts) < x.ndim:
        raise ValueError(f"{len(counts)} counts are given for a tensor of {x.ndim} dimensions")
    shape = (1,) * (len(counts) - x.ndim) + x.shape
    fits([count * size for count, size in zip(counts, shape, strict=True)])
    return jnp.tile(x, counts)


@OPERATIONS.add("torch.repeat_interleave", ".repeat_interleave")
def repeat_interleave(input: Any, repeats: Any, dim: Any = None) -> jax.Array:
    """Repeat each element, or slice, the same number of times."""
    x, count = tensor(input), integer(repeats)
    fits((x.size, count))
    return jnp.repeat(x, count, axis=None if dim is None else _axis(dim, x))


@OPERATIONS.add("torch.stack")
def stack(tensors: Any, dim: Any = 0) -> jax.Array:
    """Put tensors of one shape beside each other along a new dimension."""
    parts = _parts(tensors)
    return jnp.stack(parts, axis=dimension(dim, parts[0].ndim + 1))


@OPERATIONS.add("torch.cat", "torch.concat", "torch.concatenate")
def cat(tensors: Any, dim: Any = 0) -> jax.Array:
    """Put tensors after each other."""
    parts = _parts(tensors)
    return jnp.concatenate(parts, axis=_axis(dim, parts[0]))


def _parts(tensors: Any) -> list[jax.Array]:
    if not isinstance(tensors, tuple | list) or not tensors:
        raise ValueError("a list of tensors is needed")
    dtype = result_dtype(*map(tensor, tensors))
    return [part.astype(dtype) for part in tensors]


@OPERATIONS.add("torch.functional.split", "torch.split", ".split")
def split(tensor: Any, split_size: Any, dim: Any = 0) -> tuple[jax.Array, ...]:
    """Cut into pieces of a size, or of the sizes in a list."""
    if not is_tensor(tensor):
        raise ValueError(f"a tensor is needed, got {type(tensor).__name__}")
    length = tensor.shape[_axis(dim, tensor)]
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
def chunk(input: Any, chunks: Any, dim: Any = 0) -> tuple[jax.Array, ...]:
    """Cut into `chunks` pieces, the last perhaps smaller."""
    x = tensor(input)
    if integer(chunks) < 1:
        raise ValueError(f"chunks is {chunks}; give 1 or more")
    return split(x, max(1, -(-x.shape[_axis(dim, x)] // chunks)), dim)


@OPERATIONS.add("torch.unbind", ".unbind")
def unbind(input: Any, dim: Any = 0) -> tuple[jax.Array, ...]:
    """Take a tensor apart."""
    x = tensor(input)
    count = x.shape[_axis(dim, x)]
    if count > MAX_PARTS:
        raise ValueError(f"a dimension of size {count} is taken apart; the limit is {MAX_PARTS} pieces")
    return tuple(select(x, dim, i) for i in range(count))


@OPERATIONS.add("torch.flip", ".flip")
def flip(input: Any, *axes: Any, dims: Any = None) -> jax.Array:
    """Reverse dimensions."""
    x = tensor(input)
    return jnp.flip(x, tuple(_axis(d, x) for d in _one_by_one(axes, dims)))


@OPERATIONS.add("torch.roll", ".roll")
def roll(input: Any, shifts: Any, dims: Any = None) -> jax.Array:
    """Shift around."""
    x = tensor(input)
    if dims is None:
        return jnp.roll(x, integer(shifts))
    return jnp.roll(x, integers([shifts]), tuple(_axis(d, x) for d in integers([dims])))


@OPERATIONS.add("torch.tril", ".tril")
def tril(input: Any, diagonal: Any = 0) -> jax.Array:
    """Keep the lower triangle."""
    return jnp.tril(tensor(input), integer(diagonal))


@OPERATIONS.add("torch.triu", ".triu")
def triu(input: Any, diagonal: Any = 0) -> jax.Array:
    """Keep the upper triangle."""
    return jnp.triu(tensor(input), integer(diagonal))


@OPERATIONS.add("torch.outer", ".outer")
def outer(input: Any, vec2: Any) -> jax.Array:
    """Multiply each with each."""
    a, b = tensor(input), tensor(vec2)
    if (a.ndim, b.ndim) != (1, 1):
        raise ValueError(f"outer takes two vectors, got {a.ndim} and {b.ndim} dimensions")
    fits((a.size, b.size))
    return a[:, None] * b[None, :]


def _filled(shape: Any, value: Any, dtype: Any) -> jax.Array:
    if not is_tensor(value):
        numbers(value)
    return jnp.broadcast_to(jnp.asarray(value, dtype), fits(shape))


@OPERATIONS.add("torch.full_like", stops=True)
def full_like(input: Any, fill_value: Any, dtype: Any = None) -> jax.Array:
    """Fill a tensor of this shape and type."""
    return _filled(tensor(input).shape, fill_value, input.dtype if dtype is None else dtype)


@OPERATIONS.add("torch.full", stops=True)
def full(size: Any, fill_value: Any, dtype: Any = None) -> jax.Array:
    """Fill a tensor of a shape."""
    return _filled(integers([size]), fill_value, result_dtype(fill_value) if dtype is None else dtype)


@OPERATIONS.add(".new_full", stops=True)
def new_full(input: Any, size: Any, fill_value: Any, dtype: Any = None) -> jax.Array:
    """Fill a tensor of a shape and this type."""
    return _filled(integers([size]), fill_value, tensor(input).dtype if dtype is None else dtype)


def _constants(name: str, value: int) -> None:
    def like(input: Any, dtype: Any = None) -> jax.Array:
        return full_like(input, value, dtype)

    def of_size(*each: Any, size: Any = None, dtype: Any = None) -> jax.Array:
        return _filled(_one_by_one(each, size), value, FLOAT if dtype is None else dtype)

    def new(input: Any, *each: Any, size: Any = None, dtype: Any = None) -> jax.Array:
        return _filled(_one_by_one(each, size), value, tensor(input).dtype if dtype is None else dtype)

    OPERATIONS.add(f"torch.{name}_like", stops=True)(like)
    OPERATIONS.add(f"torch.{name}", stops=True)(of_size)
    OPERATIONS.add(f".new_{name}", stops=True)(new)


_constants("zeros", 0)
_constants("ones", 1)


@OPERATIONS.add("torch.arange", stops=True)
def arange(start: Any, end: Any = None, step: Any = 1, dtype: Any = None) -> jax.Array:
    """Count from start to end."""
    first, last = (0, start) if end is None else (start, end)
    numbers(first, last, step)
    if step == 0 or not all(map(math.isfinite, (first, last, step))):
        raise ValueError(f"a range from {first} to {last} in steps of {step}")
    count = max(0, math.ceil((last - first) / step))
    whole = all(isinstance(number, int) for number in (first, last, step))
    at = jax.lax.iota(INT if whole else DTYPES["float64"], fits((count,))[0])
    return (first + at * step).astype((INT if whole else FLOAT) if dtype is None else dtype)
