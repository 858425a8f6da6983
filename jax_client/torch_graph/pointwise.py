"""What do torch's element by element operations compute, their gradients at corners and ties included?"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.torch_graph.values import (
    BOOL,
    DTYPES,
    FLOAT,
    INT,
    Number,
    Place,
    Table,
    Value,
    absolute,
    cast,
    fits,
    floats,
    is_size,
    is_tensor,
    number,
    result_dtype,
    tensor,
    together,
)

OPERATIONS = Table()
# The largest exponent between whole numbers, which Python computes exactly.
MAX_EXPONENT = 64

_FLOAT_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exp": jnp.exp, "exp2": jnp.exp2, "expm1": jnp.expm1, "log": jnp.log, "log2": jnp.log2, "log10": jnp.log10,
    "log1p": jnp.log1p, "sqrt": jnp.sqrt, "rsqrt": jax.lax.rsqrt, "reciprocal": jnp.reciprocal, "sin": jnp.sin,
    "cos": jnp.cos, "tanh": jnp.tanh, "erf": jax.scipy.special.erf, "sigmoid": jax.nn.sigmoid,
}  # fmt: skip
_SAME_TYPE_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "neg": jnp.negative, "negative": jnp.negative, "abs": absolute, "absolute": absolute, "square": jnp.square,
    "sign": jnp.sign, "floor": jnp.floor, "ceil": jnp.ceil, "trunc": jnp.trunc, "round": jnp.round,
}  # fmt: skip
_TESTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "isnan": jnp.isnan, "isinf": jnp.isinf, "isfinite": jnp.isfinite, "logical_not": jnp.logical_not,
}  # fmt: skip
_MORE_NAMES = {"sigmoid": ("torch._C._special.special_expit",), "erf": ("torch._C._special.special_erf",)}


def _unary(
    name: str, call: Callable[[jax.Array], jax.Array], prepare: Callable[[Value], jax.Array], stops: bool
) -> None:
    OPERATIONS.add(f"torch.{name}", f".{name}", *_MORE_NAMES.get(name, ()), stops=stops)(
        lambda input: call(prepare(input))
    )


for _name, _call in _FLOAT_FUNCTIONS.items():
    _unary(_name, _call, floats, False)
for _name, _call in _SAME_TYPE_FUNCTIONS.items():
    _unary(_name, _call, tensor, _name in ("sign", "floor", "ceil", "trunc", "round"))
for _name, _call in _TESTS.items():
    _unary(_name, _call, tensor, True)


def _python_power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"the exponent is {exponent}; between whole numbers the limit is {MAX_EXPONENT}")
    return base**exponent


# Of sizes these give sizes, also of such as depend on the length.
_OF_SIZES = (operator.add, operator.sub, operator.mul, operator.mod, operator.floordiv)


def _binary(
    names: tuple[str, ...],
    call: Callable[[jax.Array, jax.Array], jax.Array],
    plain: Callable[[Number, Number], Number] | None = None,
    *,
    as_floats: bool = False,
    stops: bool = False,
) -> None:
    """Enter an operation of two operands, each a tensor or a number; `plain` is the same of two numbers."""

    def binary(input: Value, other: Value) -> Value:
        if not is_tensor(input) and not is_tensor(other):
            if plain is not None and plain in _OF_SIZES and is_size(input) and is_size(other):
                return plain(input, other)
            numbers = number(input), number(other)
            if plain is None:
                raise ValueError("a tensor is needed, got two numbers")
            return plain(*numbers)
        a, b = together(input, other)
        return call(floats(a), floats(b)) if as_floats else call(a, b)

    OPERATIONS.add(*names, stops=stops)(binary)


_binary(("operator.sub",), jnp.subtract, operator.sub)
_binary(("operator.mul", "torch.mul", ".mul", "torch.multiply", ".multiply"), jnp.multiply, operator.mul)
_binary(("operator.truediv",), jnp.true_divide, operator.truediv, as_floats=True)
_binary(("operator.mod", "torch.remainder", ".remainder"), jnp.remainder, operator.mod)
_binary(("torch.maximum", ".maximum"), jnp.maximum)
_binary(("torch.minimum", ".minimum"), jnp.minimum)
_binary(("torch.logaddexp", ".logaddexp"), jnp.logaddexp, as_floats=True)
_binary(("torch.xlogy", ".xlogy", "torch._C._special.special_xlogy"), jax.scipy.special.xlogy, as_floats=True)
_binary(
    ("operator.floordiv", "torch.floor_divide", ".floor_divide"),
    lambda a, b: jax.lax.stop_gradient(jnp.floor_divide(a, b)),
    operator.floordiv,
    stops=True,
)
for _name, _compare, _plain in (
    ("eq", jnp.equal, operator.eq),
    ("ne", jnp.not_equal, operator.ne),
    ("lt", jnp.less, operator.lt),
    ("le", jnp.less_equal, operator.le),
    ("gt", jnp.greater, operator.gt),
    ("ge", jnp.greater_equal, operator.ge),
):
    _binary((f"operator.{_name}", f"torch.{_name}", f".{_name}"), _compare, _plain, stops=True)
for _name, _logical, _bits in (
    ("and", jnp.logical_and, jnp.bitwise_and),
    ("or", jnp.logical_or, jnp.bitwise_or),
    ("xor", jnp.logical_xor, jnp.bitwise_xor),
):
    _binary((f"torch.logical_{_name}", f".logical_{_name}"), _logical, stops=True)
    _own = f"operator.{_name}" if _name == "xor" else f"operator.{_name}_"
    _binary((_own, f"torch.bitwise_{_name}", f".bitwise_{_name}"), _bits, stops=True)


@OPERATIONS.add("operator.add")
def operator_add(a: Value, b: Value) -> Value:
    """Add numbers and tensors, or join shapes."""
    if isinstance(a, tuple) and isinstance(b, tuple) and all(isinstance(size, int) for size in a + b):
        return a + b
    return add(a, b)


@OPERATIONS.add("torch.add", ".add")
def add(input: Value, other: Value, alpha: Value = 1) -> Value:
    """Return input + alpha other."""
    return _scaled_sum(jnp.add, operator.add, input, other, alpha)


@OPERATIONS.add("torch.sub", ".sub", "torch.subtract", ".subtract")
def subtract(input: Value, other: Value, alpha: Value = 1) -> Value:
    """Return input - alpha other."""
    return _scaled_sum(jnp.subtract, operator.sub, input, other, alpha)


@OPERATIONS.add("torch.rsub")
def reverse_subtract(input: Value, other: Value, alpha: Value = 1) -> Value:
    """Return other - alpha input."""
    return subtract(other, input, alpha)


def _scaled_sum(
    call: Callable[[jax.Array, jax.Array], jax.Array],
    plain: Callable[[Number, Number], Number],
    a: Value,
    b: Value,
    alpha: Value,
) -> jax.Array | Number:
    scale = number(alpha)
    if not is_tensor(a) and not is_tensor(b):
        if scale == 1 and is_size(a) and is_size(b):
            return plain(a, b)
        return plain(number(a), scale * number(b))
    x, y = together(a, b)
    return call(x, y if scale == 1 else y * jnp.asarray(scale, y.dtype))


@OPERATIONS.add("torch.div", ".div", "torch.divide", ".divide", "torch.true_divide", ".true_divide")
def divide(input: Value, other: Value, rounding_mode: Value = None) -> Value:
    """Divide; rounded quotients have no gradient."""
    a, b = together(input, other)
    if rounding_mode is None:
        return floats(a) / floats(b)
    if rounding_mode == "floor":
        return jax.lax.stop_gradient(jnp.floor_divide(a, b))
    if rounding_mode == "trunc":
        return jax.lax.stop_gradient(jnp.trunc(floats(a) / floats(b)).astype(a.dtype))
    raise ValueError(f"rounding_mode is {rounding_mode!r}; known are None, 'floor' and 'trunc'")


@OPERATIONS.add("operator.pow", "torch.pow", ".pow")
def power(input: Value, exponent: Value) -> Value:
    """Raise to a power."""
    if not is_tensor(input) and not is_tensor(exponent):
        return _python_power(number(input), number(exponent))
    if is_tensor(exponent):
        return jnp.power(*together(input, exponent))
    dtype = result_dtype(input, exponent)
    times = number(exponent)
    # A whole exponent is multiplied out, which is right for negative bases too.
    whole = isinstance(times, float) and times.is_integer() and abs(times) <= MAX_EXPONENT
    return jnp.power(tensor(input).astype(dtype), int(times) if whole else times)


@OPERATIONS.add("operator.neg")
def operator_neg(a: Value) -> jax.Array | Number:
    """Negate."""
    return -_operand(a)


@OPERATIONS.add("operator.pos")
def operator_pos(a: Value) -> jax.Array | Number:
    """Return the operand."""
    return _operand(a)


@OPERATIONS.add("operator.abs")
def operator_abs(a: Value) -> jax.Array | Number:
    """Return the absolute value."""
    return absolute(a) if is_tensor(a) else abs(number(a))


def _operand(a: Value) -> jax.Array | Number:
    return a if is_tensor(a) or is_size(a) else number(a)


@OPERATIONS.add("operator.invert", "torch.bitwise_not", ".bitwise_not", stops=True)
def invert(input: Value) -> jax.Array:
    """Invert truth values, or the bits of integers."""
    return jnp.invert(tensor(input))


@OPERATIONS.add("torch.where")
def where(condition: Value, input: Value, other: Value) -> jax.Array:
    """Choose element by element."""
    (a, b), holds = together(input, other), tensor(condition)
    if holds.dtype != BOOL:
        raise ValueError(f"the condition has dtype {holds.dtype}; it must be bool, such as mask != 0")
    fits(jnp.broadcast_shapes(holds.shape, a.shape, b.shape))
    return jnp.where(holds, a, b)


@OPERATIONS.add(".where")
def where_method(input: Value, condition: Value, other: Value) -> jax.Array:
    """Keep where the condition holds."""
    return where(condition, input, other)


@OPERATIONS.add("torch.masked_fill", ".masked_fill")
def masked_fill(input: Value, mask: Value, value: Value) -> jax.Array:
    """Replace where the mask holds; the type stays."""
    return cast(where(mask, value, input), tensor(input).dtype)


@OPERATIONS.add("torch.clamp", ".clamp", "torch.clip", ".clip")
def clamp(input: Value, min: Value = None, max: Value = None) -> jax.Array:
    """Limit to bounds, numbers or tensors; at a bound the gradient still passes."""
    if min is None and max is None:
        raise ValueError("at least one of min and max is needed")
    bounds = [bound for bound in (min, max) if bound is not None]
    x, *limits = together(tensor(input), *bounds)
    if min is not None:
        low = limits.pop(0)
        x = jnp.where(x < low, low, x)
    return x if max is None else jnp.where(x > limits[0], limits[0], x)


@OPERATIONS.add("torch.clamp_min", ".clamp_min")
def clamp_min(input: Value, min: Value) -> jax.Array:
    """Limit from below."""
    return clamp(input, min=min)


@OPERATIONS.add("torch.clamp_max", ".clamp_max")
def clamp_max(input: Value, max: Value) -> jax.Array:
    """Limit from above."""
    return clamp(input, max=max)


@OPERATIONS.add("torch.relu", ".relu", "torch.nn.functional.relu")
def relu(input: Value) -> jax.Array:
    """Return max(x, 0), with gradient 0 at 0."""
    x = tensor(input)
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


@OPERATIONS.add("torch.nn.functional.leaky_relu")
def leaky_relu(input: Value, negative_slope: float = 0.01) -> jax.Array:
    """Return x where it is positive, else a part of it."""
    x = floats(input)
    return jnp.where(x > 0, x, x * negative_slope)


@OPERATIONS.add("torch._C._nn.softplus", "torch.nn.functional.softplus")
def softplus(input: Value, beta: float = 1.0, threshold: float = 20.0) -> jax.Array:
    """Return log(1 + exp(beta x)) / beta, and x beyond the threshold."""
    number(beta)
    number(threshold)
    x = floats(input)
    linear = x * beta > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0.0, x * beta))) / beta)


@OPERATIONS.add("torch._C._nn.log_sigmoid", "torch.nn.functional.logsigmoid")
def logsigmoid(input: Value) -> jax.Array:
    """Return log sigmoid(x)."""
    return jax.nn.log_sigmoid(floats(input))


@OPERATIONS.add("torch.logit", ".logit", "torch._C._special.special_logit")
def logit(input: Value, eps: Value = None) -> jax.Array:
    """Return log(x / (1 - x)), with x kept eps away from 0 and 1."""
    x = floats(input)
    if eps is not None:
        margin = _operand(eps)
        x = clamp(x, margin, 1 - margin)
    return jnp.log(x / (1 - x))


@OPERATIONS.add("torch.lerp", ".lerp")
def lerp(input: Value, end: Value, weight: Value) -> jax.Array:
    """Go from input to end by a weight."""
    a, b, w = together(input, end, weight)
    return a + w * (b - a)


@OPERATIONS.add("torch.nan_to_num", ".nan_to_num")
def nan_to_num(input: Value, nan: Value = 0.0, posinf: Value = None, neginf: Value = None) -> jax.Array:
    """Replace NaN and infinities."""
    high, low = (None if end is None else _operand(end) for end in (posinf, neginf))
    return jnp.nan_to_num(tensor(input), nan=0.0 if nan is None else _operand(nan), posinf=high, neginf=low)


@OPERATIONS.add("torch.detach", ".detach", stops=True)
def detach(input: Value) -> jax.Array:
    """Cut the gradient."""
    return jax.lax.stop_gradient(tensor(input))


@OPERATIONS.add("torch.clone", ".clone", ".contiguous", ".cpu")
def same(input: Value) -> jax.Array:
    """Return the tensor; nothing is ever changed in place."""
    return tensor(input)


@OPERATIONS.add(".to", ".type")
def to(input: Value, *args: Value, dtype: Value = None, device: Value = None, other: Value = None) -> jax.Array:
    """Convert to a type, or to that of another tensor; there is one device."""
    x = tensor(input)
    for arg in (*args, dtype, device, other):
        if isinstance(arg, np.dtype):
            x = x.astype(arg)
        elif is_tensor(arg):
            x = x.astype(arg.dtype)
        elif not (arg is None or isinstance(arg, Place | bool) or arg == "cpu"):
            raise ValueError(f"cannot convert to {arg!r}; give a dtype or another tensor")
    return x


@OPERATIONS.add(".type_as")
def type_as(input: Value, other: Value) -> jax.Array:
    """Convert to the type of another tensor."""
    return to(input, tensor(other))


def _to_dtype(dtype: np.dtype) -> Callable[..., jax.Array]:
    return lambda input: cast(tensor(input), dtype)


for _name, _dtype in {"float": FLOAT, "double": DTYPES["float64"]}.items():
    OPERATIONS.add(f".{_name}")(_to_dtype(_dtype))
for _name, _dtype in {"long": INT, "int": DTYPES["int32"], "bool": BOOL}.items():
    OPERATIONS.add(f".{_name}", stops=True)(_to_dtype(_dtype))

# Of numbers that follow from shapes, such as math.log(logprobs.shape[0]).
_MATH: dict[str, Callable[..., float]] = {
    "log": math.log, "log2": math.log2, "log10": math.log10, "log1p": math.log1p, "exp": math.exp,
    "expm1": math.expm1, "sqrt": math.sqrt, "floor": math.floor, "ceil": math.ceil, "fabs": math.fabs,
    "pow": math.pow,
}  # fmt: skip


def _math(name: str, call: Callable[..., float]) -> Callable[..., float]:
    def on_numbers(*values: Value) -> float:
        if any(is_tensor(value) for value in values):
            raise ValueError(f"math.{name} takes numbers that follow from shapes; of a tensor take torch.{name}")
        return call(*map(number, values))

    return on_numbers


for _name, _function in _MATH.items():
    OPERATIONS.add(f"math.{_name}", stops=True)(_math(_name, _function))
