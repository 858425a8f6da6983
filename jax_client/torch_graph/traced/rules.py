"""What does each primitive compute where the end of a dimension is padding? The same as without, at every real place.

A rule takes arrays of padded sizes and returns such arrays. What lies in the padding is arbitrary: a rule that mixes
places first replaces it by what changes nothing, such as 0 in a sum. `NotPaddableError` says that there is no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.lax import GatherScatterMode

# A size of a traced program: a number, or an expression of the length.
Size = Any


class NotPaddableError(Exception):
    """A program needs arrays of exactly their length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """What the names in expressions of the length stand for.

    Attributes:
        padded: the sizes that arrays have.
        real: the sizes without padding, traced int64 scalars.
    """

    padded: Mapping[str, int]
    real: Mapping[str, jax.Array]
    _is_real: dict[Size, jax.Array] = field(default_factory=dict)

    def padded_size(self, size: Size) -> int:
        """Return the size that arrays have."""
        names: Any = dict(self.padded)
        return int(size._evaluate(names)) if is_symbolic_dim(size) else size

    def real_size(self, size: Size) -> Any:
        """Return the size without padding, an int64 scalar if it depends on the length."""
        return jnp.asarray(size._evaluate(dict(self.real)), jnp.int64) if is_symbolic_dim(size) else size

    def is_real(self, size: Size) -> jax.Array:
        """Return of each place of a padded dimension whether it is no padding, bool."""
        if size not in self._is_real:
            at = jax.lax.iota(jnp.int64, self.padded_size(size))
            self._is_real[size] = at < self.real_size(size)
        return self._is_real[size]

    def padded_shape(self, shape: Sequence[Size]) -> tuple[int, ...]:
        """Return the shape that an array has."""
        return tuple(map(self.padded_size, shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One equation: its primitive with parameters, operands, and the shapes before padding."""

    primitive: Any
    params: dict[str, Any]
    operands: list[Any]
    shapes: list[tuple[Size, ...]]
    out_shapes: list[tuple[Size, ...]]
    lengths: Lengths

    def bind(self, *operands: Any, **changed: Any) -> Any:
        """Run the primitive; `changed` replaces parameters."""
        return self.primitive.bind(*(operands or self.operands), **{**self.params, **changed})

    def masked(self, i: int, axes: Sequence[int], fill: Any) -> Any:
        """Return operand `i` with `fill` in the padding along these axes."""
        value, shape = self.operands[i], self.shapes[i]
        for axis in axes:
            if is_symbolic_dim(shape[axis]):
                is_real = jax.lax.broadcast_in_dim(self.lengths.is_real(shape[axis]), value.shape, (axis,))
                value = jax.lax.select(is_real, value, jnp.broadcast_to(jnp.asarray(fill, value.dtype), value.shape))
        return value


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return enter


def _lowest(dtype: np.dtype) -> Any:
    return False if dtype.kind == "b" else -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype) -> Any:
    return True if dtype.kind == "b" else np.inf if dtype.kind == "f" else np.iinfo(dtype).max


# What a reduction or a scan does not notice.
_NEUTRAL: dict[str, Callable[[np.dtype], Any]] = {
    "reduce_sum": lambda _: 0, "reduce_prod": lambda _: 1, "reduce_max": _lowest, "reduce_min": _highest,
    "reduce_and": lambda _: True, "reduce_or": lambda _: False, "argmax": _lowest, "argmin": _highest,
    "cumsum": lambda _: 0, "cumprod": lambda _: 1, "cummax": _lowest, "cummin": _highest, "cumlogsumexp": _lowest,
}  # fmt: skip


@_rule(
    "abs", "add", "add_any", "and", "atan2", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp",
    "exp2", "expm1", "floor", "ceil", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt",
    "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "sign", "sin", "sqrt", "square", "squeeze", "stack", "stop_gradient", "sub", "tanh", "transpose", "unstack",
    "xor",
)  # fmt: skip
def _as_it_is(call: Call) -> Any:
    return call.bind()


@_rule("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin")
def _reduction(call: Call) -> Any:
    fill = _NEUTRAL[call.primitive.name](np.dtype(call.operands[0].dtype))
    return call.bind(call.masked(0, call.params["axes"], fill))


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _scan(call: Call) -> Any:
    if not call.params["reverse"]:
        return call.bind()
    fill = _NEUTRAL[call.primitive.name](np.dtype(call.operands[0].dtype))
    return call.bind(call.masked(0, [call.params["axis"]], fill))


@_rule("sort")
def _sort(call: Call) -> Any:
    axis, size = call.params["dimension"], call.shapes[0][call.params["dimension"]]
    if not is_symbolic_dim(size):
        return call.bind()
    # Real places first: whether a place is padding is the first key.
    is_real = jax.lax.broadcast_in_dim(call.lengths.is_real(size), call.operands[0].shape, (axis,))
    is_padding = jax.lax.convert_element_type(~is_real, jnp.int32)
    return call.bind(is_padding, *call.operands, num_keys=call.params["num_keys"] + 1)[1:]


@_rule("iota")
def _iota(call: Call) -> Any:
    return jax.lax.broadcasted_iota(
        call.params["dtype"], call.lengths.padded_shape(call.params["shape"]), call.params["dimension"]
    )


@_rule("broadcast_in_dim")
def _broadcast(call: Call) -> Any:
    shape = call.lengths.padded_shape(call.params["shape"])
    return jax.lax.broadcast_in_dim(call.operands[0], shape, call.params["broadcast_dimensions"])


@_rule("reshape")
def _reshape(call: Call) -> Any:
    before, after = ([size for size in shape if is_symbolic_dim(size) or size != 1] for shape in (call.shapes[0], call.out_shapes[0]))  # noqa: E501 # fmt: skip
    # The padding stays at the end where only the outermost dimension has some.
    outermost = all(not any(map(is_symbolic_dim, sizes[1:])) for sizes in (before, after))
    if call.params["dimensions"] is not None or not (before == after or outermost):
        raise NotPaddableError("a reshape that moves padding")
    return jnp.reshape(call.operands[0], call.lengths.padded_shape(call.out_shapes[0]))


@_rule("rev")
def _reverse(call: Call) -> Any:
    value = call.bind()
    for axis in call.params["dimensions"]:
        size = call.shapes[0][axis]
        if is_symbolic_dim(size):
            padded = value.shape[axis]
            twice = jnp.concatenate([value, value], axis)
            value = jax.lax.dynamic_slice_in_dim(twice, padded - call.lengths.real_size(size), padded, axis)
    return value


@_rule("dot_general")
def _dot(call: Call) -> Any:
    ((left, right), _) = call.params["dimension_numbers"]
    return call.bind(call.masked(0, left, 0), call.masked(1, right, 0))


@_rule("slice")
def _slice(call: Call) -> Any:
    value, lengths = call.operands[0], call.lengths
    starts, limits = call.params["start_indices"], call.params["limit_indices"]
    strides = call.params["strides"] or (1,) * len(starts)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if not is_symbolic_dim(start):
            value = jax.lax.slice_in_dim(value, start, lengths.padded_size(limit), stride, axis)
        elif stride == 1:
            value = _part(value, start, limit - start, axis, lengths)
        else:
            raise NotPaddableError("steps from a place that depends on the length")
    return value


def _part(value: Any, start: Size, size: Size, axis: int, lengths: Lengths) -> Any:
    """Return the part that starts at a place that depends on the length."""
    padded = lengths.padded_size(size)
    more = [(0, padded if d == axis else 0, 0) for d in range(value.ndim)]  # the part's own padding may end behind it
    value = jax.lax.pad(value, jnp.zeros((), value.dtype), more) if is_symbolic_dim(size) else value
    return jax.lax.dynamic_slice_in_dim(value, lengths.real_size(start), padded, axis)


@_rule("split")
def _split(call: Call) -> Any:
    axis, start, parts = call.params["axis"], 0, []
    for size in call.params["sizes"]:
        parts.append(_part(call.operands[0], start, size, axis, call.lengths))
        start = start + size
    return parts


@_rule("tile")
def _tile(call: Call) -> Any:
    value = call.operands[0]
    for axis, (size, count) in enumerate(zip(call.shapes[0], call.params["reps"], strict=True)):
        value = _joined([value] * count, [size] * count, axis, call.lengths)
    return value


def _start(call: Call, size: Size, part: Size, start: Any) -> Any:
    """Return where a part begins that lies inside of the real places, as jax moves it there."""
    if not is_symbolic_dim(size):
        return start
    if is_symbolic_dim(part):
        if part != size:
            raise NotPaddableError("a part that depends on the length")
        return 0
    last = call.lengths.real_size(size) - part
    return jnp.clip(jnp.asarray(start, jnp.int64), 0, last)


@_rule("dynamic_slice")
def _dynamic_slice(call: Call) -> Any:
    value, *starts = call.operands
    sizes = call.params["slice_sizes"]
    places = [_start(call, *each) for each in zip(call.shapes[0], sizes, starts, strict=True)]
    return jax.lax.dynamic_slice(value, _alike(places), call.lengths.padded_shape(sizes))


@_rule("dynamic_update_slice")
def _dynamic_update_slice(call: Call) -> Any:
    value, update, *starts = call.operands
    places = [_start(call, *each) for each in zip(call.shapes[0], call.shapes[1], starts, strict=True)]
    return jax.lax.dynamic_update_slice(value, update, _alike(places))


def _alike(places: Sequence[Any]) -> list[jax.Array]:
    return [jnp.asarray(place, jnp.int64) for place in places]


@_rule("pad")
def _pad(call: Call) -> Any:
    fill, lengths = call.operands[1], call.lengths
    value = call.masked(0, range(len(call.shapes[0])), fill)
    for axis, (low, _, interior) in enumerate(call.params["padding_config"]):
        before, after = call.shapes[0][axis], call.out_shapes[0][axis]
        padded = lengths.padded_size(after)
        if not is_symbolic_dim(low) and (is_symbolic_dim(after) or not is_symbolic_dim(before)):
            size = value.shape[axis]
            high = padded - low - size - interior * max(size - 1, 0)
            value = jax.lax.pad(value, fill, [(low, high, interior) if d == axis else (0, 0, 0) for d in range(value.ndim)])  # noqa: E501 # fmt: skip
        elif not interior:
            # With room for the value's own padding, which may end behind the result.
            shape = [padded + size if d == axis else size for d, size in enumerate(value.shape)]
            whole = jnp.full(shape, fill, value.dtype)
            whole = jax.lax.dynamic_update_slice_in_dim(whole, value, lengths.real_size(low), axis)
            value = jax.lax.slice_in_dim(whole, 0, padded, axis=axis)
        else:
            raise NotPaddableError("gaps from a place that depends on the length")
    return value


@_rule("concatenate")
def _concatenate(call: Call) -> Any:
    axis = call.params["dimension"]
    sizes = [shape[axis] for shape in call.shapes]
    if not any(map(is_symbolic_dim, sizes[:-1])):
        return call.bind()
    return _joined(call.operands, sizes, axis, call.lengths)


def _joined(parts: Sequence[Any], sizes: Sequence[Size], axis: int, lengths: Lengths) -> Any:
    """Return arrays after each other, each over the padding of the one before it."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    value, start = jnp.zeros(shape, parts[0].dtype), jnp.asarray(0, jnp.int64)
    for part, size in zip(parts, sizes, strict=True):
        value = jax.lax.dynamic_update_slice_in_dim(value, part, start, axis)
        start = start + lengths.real_size(size)
    return value


@_rule("gather")
def _gather(call: Call) -> Any:
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    taken = []
    for axis, (size, part) in enumerate(zip(call.shapes[0], sizes, strict=True)):
        if axis in numbers.operand_batching_dims or not is_symbolic_dim(size) or (is_symbolic_dim(part) and part == size):  # noqa: E501 # fmt: skip
            continue
        if is_symbolic_dim(part) or part != 1:
            raise NotPaddableError("a gather of parts that depend on the length")
        taken.append(axis)
    value = call.operands[0]
    if taken:
        if call.params["mode"] != GatherScatterMode.FILL_OR_DROP:
            raise NotPaddableError("a gather that moves places inside")
        # A place in the padding is out of range: it gives what such a place gives.
        value = call.masked(0, taken, _missing(call.params["fill_value"], np.dtype(value.dtype)))
    return call.bind(value, call.operands[1], slice_sizes=call.lengths.padded_shape(sizes))


def _missing(fill: Any, dtype: np.dtype) -> Any:
    if fill is not None:
        return fill
    return np.nan if dtype.kind == "f" else _lowest(dtype) if dtype.kind == "i" else _highest(dtype)


@_rule("scatter-add", "scatter_add")
def _scatter_add(call: Call) -> Any:
    numbers = call.params["dimension_numbers"]
    outside = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [size for axis, size in enumerate(call.shapes[0]) if axis not in outside]
    parts = [call.shapes[2][axis] for axis in numbers.update_window_dims]
    for size, part in zip(windows, parts, strict=True):
        if is_symbolic_dim(size) and part not in (size, 1):
            raise NotPaddableError("a scatter of parts that depend on the length")
    if call.params["mode"] != GatherScatterMode.FILL_OR_DROP:
        raise NotPaddableError("a scatter that moves places inside")
    return call.bind(call.operands[0], call.operands[1], call.masked(2, range(len(call.shapes[2])), 0))
