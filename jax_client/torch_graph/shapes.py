"""What do torch's operations on shapes return?

They return tensors of the same elements in another shape or order, and the sizes, which are numbers known before the
loss runs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.torch_graph.values import (
    Pair,
    Place,
    Table,
    Value,
    axis_of,
    dimension,
    dimensions,
    fits,
    integer,
    integers,
    is_tensor,
    positional_or_named,
    result_dtype,
    tensor,
)

OPERATIONS = Table()


@OPERATIONS.add("getattr", "builtins.getattr")
def attribute(input: Value, name: Value) -> Value:
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
def size(input: Value, dim: Value = None) -> Value:
    """Return the shape, or one size."""
    x = tensor(input)
    return x.shape if dim is None else x.shape[axis_of(dim, x)]


@OPERATIONS.add(".dim", ".ndimension", stops=True)
def ndim(input: Value) -> int:
    """Return the number of dimensions."""
    return tensor(input).ndim


@OPERATIONS.add(".numel", ".nelement", "torch.numel", stops=True)
def numel(input: Value) -> int:
    """Return the number of elements."""
    return tensor(input).size


@OPERATIONS.add(".view", ".reshape")
def reshape(input: Value, *sizes: Value, shape: Value = None) -> jax.Array:
    """Give the elements another shape."""
    return jnp.reshape(tensor(input), positional_or_named(sizes, shape))


OPERATIONS.add("torch.reshape")(lambda input, shape: reshape(input, shape))


@OPERATIONS.add(".view_as", ".reshape_as")
def reshape_as(input: Value, other: Value) -> jax.Array:
    """Give the elements another tensor's shape."""
    return jnp.reshape(tensor(input), tensor(other).shape)


@OPERATIONS.add("torch.flatten", ".flatten")
def flatten(input: Value, start_dim: Value = 0, end_dim: Value = -1) -> jax.Array:
    """Merge dimensions."""
    x = tensor(input)
    first, last = dimension(start_dim, x.ndim), dimension(end_dim, x.ndim)
    if first > last:
        raise ValueError(f"start_dim {start_dim} comes after end_dim {end_dim}")
    return x.reshape(*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


@OPERATIONS.add("torch.ravel", ".ravel")
def ravel(input: Value) -> jax.Array:
    """Merge all dimensions."""
    return tensor(input).reshape(-1)


@OPERATIONS.add("torch.squeeze", ".squeeze")
def squeeze(input: Value, dim: Value = None) -> jax.Array:
    """Drop dimensions of size 1; others stay."""
    x = tensor(input)
    return jnp.squeeze(x, tuple(d for d in dimensions(dim, x.ndim) if x.shape[d] == 1))


@OPERATIONS.add("torch.unsqueeze", ".unsqueeze")
def unsqueeze(input: Value, dim: Value) -> jax.Array:
    """Add a dimension of size 1."""
    x = tensor(input)
    return jnp.expand_dims(x, dimension(dim, x.ndim + 1))


@OPERATIONS.add("torch.transpose", ".transpose", "torch.swapaxes", ".swapaxes")
def transpose(input: Value, dim0: Value, dim1: Value) -> jax.Array:
    """Swap two dimensions."""
    x = tensor(input)
    return jnp.swapaxes(x, dimension(dim0, x.ndim), dimension(dim1, x.ndim)) if x.ndim else x


@OPERATIONS.add("torch.t", ".t")
def t(input: Value) -> jax.Array:
    """Transpose a matrix."""
    x = tensor(input)
    if x.ndim > 2:
        raise ValueError(f"the tensor has {x.ndim} dimensions; t takes two at most")
    return jnp.transpose(x)


@OPERATIONS.add(".permute")
def permute(input: Value, *axes: Value, dims: Value = None) -> jax.Array:
    """Reorder the dimensions."""
    x = tensor(input)
    return jnp.transpose(x, tuple(dimension(d, x.ndim) for d in positional_or_named(axes, dims)))


OPERATIONS.add("torch.permute")(lambda input, dims: permute(input, dims))


@OPERATIONS.add(".expand")
def expand(input: Value, *each: Value, size: Value = None) -> jax.Array:
    """Repeat along dimensions of size 1; -1 keeps a size."""
    x, sizes = tensor(input), positional_or_named(each, size)
    extra = len(sizes) - x.ndim
    if extra < 0:
        raise ValueError(f"{len(sizes)} sizes are given for a tensor of {x.ndim} dimensions")
    return jnp.broadcast_to(x, fits([own if s == -1 else s for s, own in zip(sizes, (-1,) * extra + x.shape, strict=True)]))  # noqa: E501 # fmt: skip


@OPERATIONS.add("torch.broadcast_to", ".broadcast_to")
def broadcast_to(input: Value, size: Value) -> jax.Array:
    """Repeat to a shape."""
    return expand(input, size)


@OPERATIONS.add(".expand_as")
def expand_as(input: Value, other: Value) -> jax.Array:
    """Repeat to another tensor's shape."""
    return jnp.broadcast_to(tensor(input), tensor(other).shape)


@OPERATIONS.add(".repeat")
def repeat(input: Value, *each: Value, repeats: Value = None) -> jax.Array:
    """Lay copies side by side."""
    x, counts = tensor(input), positional_or_named(each, repeats)
    if len(counts) < x.ndim:
        raise ValueError(f"{len(counts)} counts are given for a tensor of {x.ndim} dimensions")
    shape = (1,) * (len(counts) - x.ndim) + x.shape
    fits([count * size for count, size in zip(counts, shape, strict=True)])
    return jnp.tile(x, counts)


@OPERATIONS.add("torch.repeat_interleave", ".repeat_interleave")
def repeat_interleave(input: Value, repeats: Value, dim: Value = None) -> jax.Array:
    """Repeat each element, or slice, the same number of times."""
    x, count = tensor(input), integer(repeats)
    fits((x.size, count))
    return jnp.repeat(x, count, axis=None if dim is None else axis_of(dim, x))


@OPERATIONS.add("torch.stack")
def stack(tensors: Value, dim: Value = 0) -> jax.Array:
    """Put tensors of one shape beside each other along a new dimension."""
    parts = _parts(tensors)
    return jnp.stack(parts, axis=dimension(dim, parts[0].ndim + 1))


@OPERATIONS.add("torch.cat", "torch.concat", "torch.concatenate")
def cat(tensors: Value, dim: Value = 0) -> jax.Array:
    """Put tensors after each other."""
    parts = _parts(tensors)
    return jnp.concatenate(parts, axis=axis_of(dim, parts[0]))


def _parts(tensors: Value) -> list[jax.Array]:
    if not isinstance(tensors, tuple | list) or not tensors:
        raise ValueError("a list of tensors is needed")
    parts = [tensor(part) for part in tensors]
    dtype = result_dtype(*parts)
    return [part.astype(dtype) for part in parts]


@OPERATIONS.add("torch.flip", ".flip")
def flip(input: Value, *axes: Value, dims: Value = None) -> jax.Array:
    """Reverse dimensions."""
    x = tensor(input)
    return jnp.flip(x, tuple(axis_of(d, x) for d in positional_or_named(axes, dims)))


@OPERATIONS.add("torch.roll", ".roll")
def roll(input: Value, shifts: Value, dims: Value = None) -> jax.Array:
    """Shift around."""
    x = tensor(input)
    if dims is None:
        return _rolled(x.reshape(-1), integer(shifts), 0).reshape(x.shape)
    for shift, dim in zip(integers([shifts]), integers([dims]), strict=True):
        x = _rolled(x, shift, axis_of(dim, x))
    return x


def _rolled(x: jax.Array, shift: int, axis: int) -> jax.Array:
    size = x.shape[axis]
    if size == 0:
        return x
    by = shift if abs(shift) < size else shift % size
    at = -by if by < 0 else size - by
    parts = jax.lax.slice_in_dim(x, at, size, axis=axis), jax.lax.slice_in_dim(x, 0, at, axis=axis)
    return jnp.concatenate(parts, axis)


@OPERATIONS.add("torch.outer", ".outer")
def outer(input: Value, vec2: Value) -> jax.Array:
    """Multiply each with each."""
    a, b = tensor(input), tensor(vec2)
    if (a.ndim, b.ndim) != (1, 1):
        raise ValueError(f"outer takes two vectors, got {a.ndim} and {b.ndim} dimensions")
    fits((a.size, b.size))
    return a[:, None] * b[None, :]
