"""What do torch's element by element operations compute, their gradients at corners and ties included?"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_client.torch_graph.values import (
    BOOL,
    DTYPES,
    FLOAT,
    INT,
    Place,
    Table,
    absolute,
    cast,
    fits,
    floats,
    is_tensor,
    numbers,
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


def _unary(name: str, call: Callable[[jax.Array], jax.Array], prepare: Callable[[Any], jax.Array], stops: bool) -> None:
    OPERATIONS.add(f"torch.{name}", f".{name}", *_MORE_NAMES.get(name, ()), stops=stops)(
        lambda input: call(prepare(input))
    )


for _name, _call in _FLOAT_FUNCTIONS.items():
    _unary(_name, _call, floats, False)
for _name, _call in _SAME_TYPE_FUNCTIONS.items():
    _unary(_name, _call, tensor, _name in ("sign", "floor", "ceil", "trunc", "round"))
for _name, _call in _TESTS.items():
    _unary(_name, _call, tensor, True)


def _python_power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"the exponent is {exponent}; between whole numbers the limit is {MAX_EXPONENT}")
    return base**exponent


def _binary(
    names: tuple[str, ...],
    call: Callable[[jax.Array, jax.Array], jax.Array],
    plain: Callable[[Any, Any], Any] | None = None,
    *,
    as_floats: bool = False,
    stops: bool = False,
) -> None:
    """Enter an operation of two operands, each a tensor or a number; `plain` is the same of two numbers."""

    def binary(input: Any, other: Any) -> Any:
        if not is_tensor(input) and not is_tensor(other):
            numbers(input, other)
            if plain is None:
                raise ValueError("a tensor is needed, got two numbers")
            return plain(input, other)
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
def operator_add(a: Any, b: Any) -> Any:
    """Add numbers and tensors, or join shapes."""
    if isinstance(a, tuple) and isinstance(b, tuple) and all(isinstance(size, int) for size in a + b):
        return a + b
    return add(a, b)


@OPERATIONS.add("torch.add", ".add")
def add(input: Any, other: Any, alpha: Any = 1) -> Any:
    """Return input + alpha other."""
    return _scaled_sum(jnp.add, operator.add, input, other, alpha)


@OPERATIONS.add("torch.sub", ".sub", "torch.subtract", ".subtract")
def subtract(input: Any, other: Any, alpha: Any = 1) -> Any:
    """Return input - alpha other."""
    return _scaled_sum(jnp.subtract, operator.sub, input, other, alpha)


@OPERATIONS.add("torch.rsub")
def reverse_subtract(input: Any, other: Any, alpha: Any = 1) -> Any:
    """Return other - alpha input."""
    return subtract(other, input, alpha)


def _scaled_sum(call: Any, plain: Any, a: Any, b: Any, alpha: Any) -> Any:
    numbers(alpha)
    if not is_tensor(a) and not is_tensor(b):
        numbers(a, b)
        return plain(a, alpha * b)
    a, b = together(a, b)
    return call(a, b if alpha == 1 else b * jnp.asarray(alpha, b.dtype))


@OPERATIONS.add("torch.div", ".div", "torch.divide", ".divide", "torch.true_divide", ".true_divide")
def divide(input: Any, other: Any, rounding_mode: Any = None) -> Any:
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
def power(input: Any, exponent: Any) -> Any:
    """Raise to a power."""
    if not is_tensor(input) and not is_tensor(exponent):
        numbers(input, exponent)
        return _python_power(input, exponent)
    if is_tensor(exponent):
        return jnp.power(*together(input, exponent))
    dtype = result_dtype(input, exponent)
    # A whole exponent is multiplied out, which is right for negative bases too.
    whole = isinstance(exponent, float) and exponent.is_integer() and abs(exponent) <= MAX_EXPONENT
    return jnp.power(input.astype(dtype), int(exponent) if whole else exponent)


@OPERATIONS.add("operator.neg")
def operator_neg(a: Any) -> Any:
    """Negate."""
    return -_operand(a)


@OPERATIONS.add("operator.pos")
def operator_pos(a: Any) -> Any:
    """Return the operand."""
    return _operand(a)


@OPERATIONS.add("operator.abs")
def operator_abs(a: Any) -> Any:
    """Return the absolute value."""
    return absolute(a) if is_tensor(a) else abs(_operand(a))


def _operand(a: Any) -> Any:
    if not is_tensor(a):
        numbers(a)
    return a


@OPERATIONS.add("operator.invert", "torch.bitwise_not", ".bitwise_not", stops=True)
def invert(input: Any) -> jax.Array:
    """Invert truth values, or the bits of integers."""
    return jnp.invert(tensor(input))


@OPERATIONS.add("torch.where")
def where(condition: Any, input: Any, other: Any) -> jax.Array:
    """Choose element by element."""
    a, b = together(input, other)
    if tensor(condition).dtype != BOOL:
        raise ValueError(f"the condition has dtype {condition.dtype}; it must be bool, such as mask != 0")
    fits(np.broadcast_shapes(condition.shape, a.shape, b.shape))
    return jnp.where(condition, a, b)


@OPERATIONS.add(".where")
def where_method(input: Any, condition: Any, other: Any) -> jax.Array:
    """Keep where the condition holds."""
    return where(condition, input, other)


@OPERATIONS.add("torch.masked_fill", ".masked_fill")
def masked_fill(input: Any, mask: Any, value: Any) -> jax.Array:
    """Replace where the mask holds; the type stays."""
    return cast(where(mask, value, input), tensor(input).dtype)


@OPERATIONS.add("torch.clamp", ".clamp", "torch.clip", ".clip")
def clamp(input: Any, min: Any = None, max: Any = None) -> jax.Array:
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
def clamp_min(input: Any, min: Any) -> jax.Array:
    """Limit from below."""
    return clamp(input, min=min)


@OPERATIONS.add("torch.clamp_max", ".clamp_max")
def clamp_max(input: Any, max: Any) -> jax.Array:
    """Limit from above."""
    return clamp(input, max=max)


@OPERATIONS.add("torch.relu", ".relu", "torch.nn.functional.relu")
def relu(input: Any) -> jax.Array:
    """Return max(x, 0), with gradient 0 at 0."""
    x = tensor(input)
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


@OPERATIONS.add("torch.nn.functional.leaky_relu")
def leaky_relu(input: Any, negative_slope: float = 0.01) -> jax.Array:
    """Return x where it is positive, else a part of it."""
    x = floats(input)
    return jnp.where(x > 0, x, x * negative_slope)


@OPERATIONS.add("torch._C._nn.softplus", "torch.nn.functional.softplus")
def softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> jax.Array:
    """Return log(1 + exp(beta x)) / beta, and x beyond the threshold."""
    numbers(beta, threshold)
    x = floats(input)
    linear = x * beta > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0.0, x * beta))) / beta)


@OPERATIONS.add("torch._C._nn.log_sigmoid", "torch.nn.functional.logsigmoid")
def logsigmoid(input: Any) -> jax.Array:
    """Return log sigmoid(x)."""
    return jax.nn.log_sigmoid(floats(input))


@OPERATIONS.add("torch.logit", ".logit", "torch._C._special.special_logit")
def logit(input: Any, eps: Any = None) -> jax.Array:
    """Return log(x / (1 - x)), with x kept eps away from 0 and 1."""
    x = floats(input)
    if eps is not None:
        x = clamp(x, eps, 1 - eps)
    return jnp.log(x / (1 - x))


@OPERATIONS.add("torch.lerp", ".lerp")
def lerp(input: Any, end: Any, weight: Any) -> jax.Array:
    """Go from input to end by a weight."""
    a, b, w = together(input, end, weight)
    return a + w * (b - a)


@OPERATIONS.add("torch.nan_to_num", ".nan_to_num")
def nan_to_num(input: Any, nan: Any = 0.0, posinf: Any = None, neginf: Any = None) -> jax.Array:
    """Replace NaN and infinities."""
    return jnp.nan_to_num(tensor(input), nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf)


@OPERATIONS.add("torch.detach", ".detach", stops=True)
def detach(input: Any) -> jax.Array:
    """Cut the gradient."""
    return jax.lax.stop_gradient(tensor(input))


@OPERATIONS.add("torch.clone", ".clone", ".contiguous", ".cpu")
def same(input: Any) -> jax.Array:
    """Return the tensor; nothing is ever changed in place."""
    return tensor(input)


@OPERATIONS.add(".to", ".type")
def to(input: Any, *args: Any, dtype: Any = None, device: Any = None, other: Any = None) -> jax.Array:
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
def type_as(input: Any, other: Any) -> jax.Array:
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
    def on_numbers(*values: Any) -> float:
        if any(is_tensor(value) for value in values):
            raise ValueError(f"math.{name} takes numbers that follow from shapes; of a tensor take torch.{name}")
        numbers(*values)
        return call(*values)

    return on_numbers


for _name, _function in _MATH.items():
    OPERATIONS.add(f"math.{_name}", stops=True)(_math(_name, _function))
