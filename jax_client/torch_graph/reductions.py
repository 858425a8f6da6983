"""What do torch's reductions, scans, softmaxes and sorts compute, their gradients at ties and zeros included?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jax_client.torch_graph.values import (
    BOOL,
    INT,
    Pair,
    Table,
    Value,
    absolute,
    cast,
    dimension,
    dimensions,
    fits,
    floats,
    integer,
    is_tensor,
    number,
    safe_sqrt,
    tensor,
    together,
)

OPERATIONS = Table()


def _summable(input: Value, dtype: Value) -> jax.Array:
    """Return the tensor in the type that its sums have: that of integers and truth values is int64."""
    x = cast(tensor(input), dtype)
    return x if x.dtype.kind == "f" else x.astype(INT)


@OPERATIONS.add("torch.sum", ".sum")
def total(input: Value, dim: Value = None, keepdim: bool = False, dtype: Value = None) -> jax.Array:
    """Add up."""
    x = _summable(input, dtype)
    return jnp.sum(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.mean", ".mean")
def mean(input: Value, dim: Value = None, keepdim: bool = False, dtype: Value = None) -> jax.Array:
    """Average; of floats only, as torch."""
    x = cast(tensor(input), dtype)
    if x.dtype.kind != "f":
        raise ValueError(f"the mean of {x.dtype} is not defined; convert with .float() first")
    return jnp.mean(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.prod", ".prod")
def product(input: Value, dim: Value = None, keepdim: bool = False, dtype: Value = None) -> jax.Array:
    """Multiply up."""
    x = _summable(input, dtype)
    return jnp.prod(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.max", ".max")
def maximum(input: Value, dim: Value = None, keepdim: bool = False, other: Value = None) -> jax.Array | Pair:
    """Return the largest of all, along a dimension, or of two tensors.

    Ties share the gradient, but for a dimension, where the first gets it.
    """
    return _extreme(input, dim, keepdim, other, jnp.max, jnp.argmax, jnp.maximum)


@OPERATIONS.add("torch.min", ".min")
def minimum(input: Value, dim: Value = None, keepdim: bool = False, other: Value = None) -> jax.Array | Pair:
    """Return the smallest, as `maximum` the largest."""
    return _extreme(input, dim, keepdim, other, jnp.min, jnp.argmin, jnp.minimum)


def _extreme(
    input: Value,
    dim: Value,
    keepdim: bool,
    other: Value,
    whole: Callable[[jax.Array], jax.Array],
    place: Callable[..., jax.Array],
    of_two: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array | Pair:
    x, second = tensor(input), dim if is_tensor(dim) else other
    if second is not None:
        return of_two(*together(x, tensor(second)))
    if dim is None:
        return whole(x)
    return _picked(x, place, dim, keepdim)


def _picked(x: jax.Array, place: Callable[..., jax.Array], dim: Value, keepdim: bool) -> Pair:
    if not x.ndim:
        dimension(dim, 0)
        return Pair(x, jnp.zeros((), INT))
    axis = dimension(dim, x.ndim)
    at = place(x, axis=axis, keepdims=True).astype(INT)
    values = jnp.take_along_axis(x, at, axis=axis)
    return Pair(values, at) if keepdim else Pair(jnp.squeeze(values, axis), jnp.squeeze(at, axis))


@OPERATIONS.add("torch.amax", ".amax")
def amax(input: Value, dim: Value = (), keepdim: bool = False) -> jax.Array:
    """Return the largest; ties share the gradient."""
    x = tensor(input)
    return jnp.max(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.amin", ".amin")
def amin(input: Value, dim: Value = (), keepdim: bool = False) -> jax.Array:
    """Return the smallest; ties share the gradient."""
    x = tensor(input)
    return jnp.min(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.argmax", ".argmax", stops=True)
def argmax(input: Value, dim: Value = None, keepdim: bool = False) -> jax.Array:
    """Return the place of the first largest."""
    return _place(jnp.argmax, input, dim, keepdim)


@OPERATIONS.add("torch.argmin", ".argmin", stops=True)
def argmin(input: Value, dim: Value = None, keepdim: bool = False) -> jax.Array:
    """Return the place of the first smallest."""
    return _place(jnp.argmin, input, dim, keepdim)


def _place(place: Callable[..., jax.Array], input: Value, dim: Value, keepdim: bool) -> jax.Array:
    x = tensor(input)
    if dim is None:
        return place(x.reshape(-1)).astype(INT)
    return _picked(x, place, dim, keepdim).indices


@OPERATIONS.add("torch.all", ".all", stops=True)
def every(input: Value, dim: Value = None, keepdim: bool = False) -> jax.Array:
    """Return whether all are true."""
    x = tensor(input)
    return jnp.all(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.any", ".any", stops=True)
def some(input: Value, dim: Value = None, keepdim: bool = False) -> jax.Array:
    """Return whether any is true."""
    x = tensor(input)
    return jnp.any(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


@OPERATIONS.add("torch.var", ".var")
def variance(
    input: Value, dim: Value = None, unbiased: bool = True, keepdim: bool = False, *, correction: Value = None
) -> jax.Array:
    """Return the variance, divided by n - 1 unless told otherwise."""
    x = floats(input)
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    axes = dimensions(dim, x.ndim)
    less = int(unbiased) if correction is None else number(correction)
    count = math.prod(x.shape[axis] for axis in axes)
    away = x - jnp.mean(x, axis=axes, keepdims=True)
    return jnp.sum(away * away, axis=axes, keepdims=bool(keepdim)) / jnp.asarray(max(count - less, 0), x.dtype)


@OPERATIONS.add("torch.std", ".std")
def deviation(
    input: Value, dim: Value = None, unbiased: bool = True, keepdim: bool = False, *, correction: Value = None
) -> jax.Array:
    """Return the standard deviation; where it is 0 it has gradient 0."""
    return safe_sqrt(variance(input, dim, unbiased, keepdim, correction=correction))


@OPERATIONS.add("torch.functional.norm", "torch.norm", ".norm")
def norm(input: Value, p: Value = 2, dim: Value = None, keepdim: bool = False, dtype: Value = None) -> jax.Array:
    """Return the vector norm of order 1, 2 or infinity; where it is 0 it has gradient 0."""
    x = floats(cast(tensor(input), dtype))
    axes, keep = dimensions(dim, x.ndim), bool(keepdim)
    if p in ("fro", 2, None):
        return safe_sqrt(jnp.sum(x * x, axis=axes, keepdims=keep))
    if p == 1:
        return jnp.sum(absolute(x), axis=axes, keepdims=keep)
    if p == math.inf:
        return jnp.max(absolute(x), axis=axes, keepdims=keep)
    raise ValueError(f"the norm's order is {p!r}; known are 1, 2 and inf")


@OPERATIONS.add("torch._C._linalg.linalg_vector_norm")
def vector_norm(x: Value, ord: Value = 2, dim: Value = None, keepdim: bool = False, dtype: Value = None) -> jax.Array:
    """Return the vector norm."""
    return norm(x, ord, dim, keepdim, dtype)


@OPERATIONS.add("torch._C._linalg.linalg_norm")
def linalg_norm(
    A: Value, ord: Value = None, dim: Value = None, keepdim: bool = False, dtype: Value = None
) -> jax.Array:
    """Return the norm of a vector, or of all elements."""
    two = tensor(A).ndim == 2 if dim is None else isinstance(dim, tuple | list) and len(dim) == 2
    if ord is not None and two:
        raise ValueError("norms of matrices are not known; give one dim, or no ord")
    return norm(A, 2 if ord is None else ord, dim, keepdim, dtype)


@OPERATIONS.add("torch.logsumexp", ".logsumexp", "torch._C._special.special_logsumexp")
def logsumexp(input: Value, dim: Value, keepdim: bool = False) -> jax.Array:
    """Return log sum exp."""
    x = floats(input)
    return jax.nn.logsumexp(x, axis=dimensions(dim, x.ndim), keepdims=bool(keepdim))


def _scan(name: str, call: Callable[..., jax.Array], prepare: Callable[[Value, Value], jax.Array]) -> None:
    def scan(input: Value, dim: Value, dtype: Value = None) -> jax.Array:
        x = prepare(input, dtype)
        axis = dimension(dim, x.ndim)
        return call(x, axis=axis) if x.ndim else x

    OPERATIONS.add(f"torch.{name}", f".{name}")(scan)


_scan("cumsum", jnp.cumsum, _summable)
_scan("cumprod", jnp.cumprod, _summable)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _logcumsumexp(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.cumlogsumexp(x, axis=axis)


def _logcumsumexp_pullback(axis: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    # As torch's: two more scans, of the cotangents' logarithms. jax's own gradient is hundreds of equations.
    x, y = saved
    size, none = jnp.log(jnp.abs(g)), jnp.asarray(jnp.finfo(g.dtype).min, g.dtype)

    def share(chosen: jax.Array) -> jax.Array:
        scanned = jax.lax.cumlogsumexp(jnp.where(chosen, size, none) - y, axis=axis, reverse=True)
        return jnp.exp(scanned + x)

    return (share(g > 0) - share(g < 0),)


def _logcumsumexp_forward(x: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = jax.lax.cumlogsumexp(x, axis=axis)
    return y, (x, y)


_logcumsumexp.defvjp(_logcumsumexp_forward, _logcumsumexp_pullback)
_scan("logcumsumexp", lambda x, axis: _logcumsumexp(x, axis), lambda input, dtype: floats(cast(tensor(input), dtype)))


def _implicit(dim: Value, ndim: int) -> int:
    """Return the dimension that torch takes where none is given."""
    return dimension((0 if ndim in (0, 1, 3) else 1) if dim is None else dim, ndim)


@OPERATIONS.add("torch.softmax", ".softmax", "torch.nn.functional.softmax", "torch._C._special.special_softmax")
def softmax(input: Value, dim: Value = None, dtype: Value = None) -> jax.Array:
    """Return exp(x) / sum exp(x)."""
    x = floats(cast(tensor(input), dtype))
    axis = _implicit(dim, x.ndim)
    return jax.nn.softmax(x, axis=axis) if x.ndim else jnp.ones_like(x)


@OPERATIONS.add(
    "torch.log_softmax", ".log_softmax", "torch.nn.functional.log_softmax", "torch._C._special.special_log_softmax"
)
def log_softmax(input: Value, dim: Value = None, dtype: Value = None) -> jax.Array:
    """Return x - log sum exp(x)."""
    x = floats(cast(tensor(input), dtype))
    axis = _implicit(dim, x.ndim)
    return jax.nn.log_softmax(x, axis=axis) if x.ndim else jnp.zeros_like(x)


@OPERATIONS.add("torch.sort", ".sort")
def sort(input: Value, dim: Value = -1, descending: bool = False, stable: Value = None) -> Pair:
    """Sort; equal values keep their order."""
    x = tensor(input)
    axis = dimension(dim, x.ndim)
    at = argsort(x, axis, descending, stable)
    return Pair(jnp.take_along_axis(x, at, axis=axis) if x.ndim else x, at)


@OPERATIONS.add("torch.argsort", ".argsort", stops=True)
def argsort(input: Value, dim: Value = -1, descending: bool = False, stable: Value = None) -> jax.Array:
    """Return where the sorted values come from."""
    x = tensor(input)
    axis = dimension(dim, x.ndim)
    if not x.ndim:
        return jnp.zeros((), INT)
    return jnp.argsort(x, axis=axis, stable=True, descending=bool(descending)).astype(INT)


@OPERATIONS.add("torch.topk", ".topk")
def topk(input: Value, k: Value, dim: Value = -1, largest: bool = True, sorted: bool = True) -> Pair:
    """Return the k largest, or smallest, in order."""
    ordered = sort(input, dim, descending=bool(largest))
    axis, count = dimension(dim, ordered.values.ndim), integer(k)
    if not ordered.values.ndim or not 0 <= count <= ordered.values.shape[axis]:
        raise ValueError(f"k is {count}; the tensor has shape {list(ordered.values.shape)}")
    return Pair(*(jax.lax.slice_in_dim(part, 0, count, axis=axis) for part in ordered))


@OPERATIONS.add("operator.matmul", "torch.matmul", ".matmul", "torch.mm", ".mm", "torch.mv", ".mv", "torch.dot", ".dot")
def matmul(input: Value, other: Value) -> jax.Array:
    """Multiply vectors and matrices."""
    a, b = tensor(input), tensor(other)
    if a.dtype != b.dtype or a.dtype == BOOL:
        raise ValueError(f"the operands have dtypes {a.dtype} and {b.dtype}; make them one")
    # As many multiplications as a tensor may have elements.
    fits((*a.shape, b.shape[-1] if b.ndim > 1 else 1))
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@OPERATIONS.add("torch.diff", ".diff")
def diff(input: Value, n: Value = 1, dim: Value = -1) -> jax.Array:
    """Return differences of neighbours."""
    x = tensor(input)
    times = integer(n)
    if not 0 <= times <= 16:
        raise ValueError(f"n is {times}; the limit is 16")
    axis = dimension(dim, x.ndim)
    if x.dtype == BOOL or not x.ndim:
        return jnp.diff(x, n=times, axis=axis)
    for _ in range(times):
        last = x.shape[axis]
        x = jax.lax.slice_in_dim(x, min(1, last), last, axis=axis) - jax.lax.slice_in_dim(x, 0, max(0, last - 1), axis=axis)  # noqa: E501 # fmt: skip
    return x
