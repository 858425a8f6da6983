"""How does one program serve losses of every length? It is traced with the length unknown, then run over padded arrays.

`trace` traces the loss and its gradient with the sizes of sequences as expressions of their length. `Padded.function`
evaluates that program, by the rules of `rules`, over arrays that are padded to a length of a ladder; the real length is
an input. A loss that is not traced so, or has a primitive without a rule, is compiled for each of its lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim, symbolic_shape
from jax.extend.core import Literal

from jax_client.errors import BadRequestError
from jax_client.torch_graph.traced import bounds
from jax_client.torch_graph.traced.rules import RULES, Call, Lengths, NotPaddableError
from jax_client.torch_graph.values import SizeChecks, deferred_checks

logger = logging.getLogger(__name__)

# From which lengths on: the first for which the loss can be traced without knowing the length. A loss that takes the
# fourth place cannot be traced for a length of 4 or less.
SHORTEST = (4, 64)
# The shortest padded length; the others are powers of two.
LADDER_START = 16

Shapes = tuple[tuple[tuple[int, ...], str], ...]
# As `Shapes`; the name of a length in place of a size that is one.
Pattern = tuple[tuple[tuple[int | str, ...], str], ...]


def pattern_of(shapes: Shapes) -> tuple[Pattern, dict[str, int]]:
    """Return which sizes are lengths of sequences, and these lengths by name.

    An array's first size is one, where it is long enough, and arrays of one length share it; so is the second one of a
    matrix of all pairs of the tokens.
    """
    names: dict[int, str] = {}
    for shape, _ in shapes:
        if shape and shape[0] >= SHORTEST[0]:
            names.setdefault(shape[0], f"length{len(names)}")
    (tokens, *targets), _ = shapes[0]
    pairs = names.get(tokens) if tokens not in targets else None

    def named(i: int, axis: int, size: int) -> int | str:
        if axis == 0:
            return names.get(size, size)
        return pairs if i > 0 and pairs is not None and size == tokens else size

    pattern = tuple(
        (tuple(named(i, axis, size) for axis, size in enumerate(shape)), dtype)
        for i, (shape, dtype) in enumerate(shapes)
    )
    return pattern, {name: length for length, name in names.items()}


def padded_length(length: int) -> int:
    """Return the padded length that serves a length."""
    return max(LADDER_START, 1 << (length - 1).bit_length())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Padded:
    """A loss with its gradient, traced with the lengths unknown.

    Attributes:
        pattern: of its inputs.
        shortest: it holds for lengths from this on.
    """

    pattern: Pattern
    shortest: int
    _closed: Any
    _checks: SizeChecks
    _tree: Any

    def check(self, lengths: dict[str, int], name: str) -> None:
        """Raise BadRequestError, which names the node, where a tensor would be too large for these lengths."""
        for size, (where, limit) in self._checks.limits.items():
            elements = _size(size, lengths)
            if elements > limit:
                raise BadRequestError(
                    f"loss {name}: {where} {elements} elements for these lengths; the limit is {limit} elements. "
                    f"{bounds.INSTEAD}"
                )

    def fits(self, lengths: dict[str, int]) -> bool:
        """Return whether the arrays of these padded lengths are within the limits of their size."""
        return all(_size(size, lengths) <= limit for size, (_, limit) in self._checks.limits.items())

    def function(self, padded: dict[str, int]) -> Callable[..., Any]:
        """Return `(lengths, *padded arrays) -> ((loss, metrics), padded gradient)` for arrays of these lengths."""

        def run(lengths: tuple[jax.Array, ...], *arrays: jax.Array) -> Any:
            real = dict(zip(sorted(padded), lengths, strict=True))
            outs = _run(self._closed.jaxpr, self._closed.consts, arrays, Lengths(padded=padded, real=real))
            return jax.tree.unflatten(self._tree, outs)

        return run

    def traced(self, padded: dict[str, int]) -> jax.stages.Traced:
        """Return the program for arrays of these padded lengths; see `function`. Raises NotPaddableError."""
        real = tuple(jax.ShapeDtypeStruct((), np.int64) for _ in padded)
        arrays = [
            jax.ShapeDtypeStruct(
                tuple(padded[size] if isinstance(size, str) else size for size in shape), np.dtype(dtype)
            )
            for shape, dtype in self.pattern
        ]
        return jax.jit(self.function(padded)).trace(real, *arrays)


def trace(function: Callable[..., Any], pattern: Pattern, name: str) -> Padded | None:
    """Trace a loss with its gradient for every length; None where only a program for each length is right.

    Args:
        function: `(logprobs, *inputs) -> (loss, metrics)`; an exception of its `between` ends the tracing.
        pattern: of its inputs.
        name: the loss's, for messages.

    Raises:
        LimitError: the program is too large.
    """
    names = sorted({size for shape, _ in pattern for size in shape if isinstance(size, str)})
    for shortest in SHORTEST if names else ():
        symbols = symbolic_shape(",".join(names), constraints=[f"{each} >= {shortest}" for each in names])
        of_name: dict[int | str, Any] = dict(zip(names, symbols, strict=True))
        specs = [
            jax.ShapeDtypeStruct(tuple(of_name.get(size, size) for size in shape), np.dtype(dtype))
            for shape, dtype in pattern
        ]
        try:
            with deferred_checks() as checks:
                bounds.check(jax.make_jaxpr(function)(*specs).jaxpr, name)
                traced = jax.jit(jax.value_and_grad(function, has_aux=True)).trace(*specs)
            bounds.check(traced.jaxpr.jaxpr, name)
            _check_decided(traced.jaxpr.jaxpr)
            tree = jax.tree.structure(traced.out_info)
            found = Padded(pattern=pattern, shortest=shortest, _closed=traced.jaxpr, _checks=checks, _tree=tree)
            whole = found.traced(dict.fromkeys(names, padded_length(shortest)))  # meets every rule that is needed
            bounds.check(whole.jaxpr.jaxpr, name, padded=True)
        except (bounds.LimitError, CancelledError):
            raise
        except Exception as error:
            # Whatever cannot be traced so is traced for each length, where a fault of the loss shows with its message.
            logger.debug("loss %s is compiled for each length: %s", name, error)
            continue
        return found
    return None


def _check_decided(jaxpr: Any) -> None:
    """Raise NotPaddableError if a size may be 0 or 1 for some lengths: jax takes it for neither while it traces."""
    for inner in bounds.jaxprs(jaxpr):
        for equation in inner.eqns:
            for variable in equation.outvars:
                for size in getattr(variable.aval, "shape", ()):
                    if is_symbolic_dim(size) and not size >= 2:
                        raise NotPaddableError("a size that may be 1")


def _size(size: Any, lengths: dict[str, int]) -> int:
    return int(size._evaluate(lengths))


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], lengths: Lengths) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        found = _equation(equation, [read(atom) for atom in equation.invars], lengths)
        values.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, operands: list[Any], lengths: Lengths) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "dim_as_value":
        return [jnp.asarray(lengths.real_size(params["dim"]), equation.outvars[0].aval.dtype)]
    inner = params.get("jaxpr", params.get("call_jaxpr")) if name in _CALLS else None
    if inner is not None:
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, lengths)
    shapes, out_shapes = ([tuple(v.aval.shape) for v in side] for side in (equation.invars, equation.outvars))
    if any(is_symbolic_dim(size) for shape in shapes + out_shapes for size in shape):
        if name not in RULES:
            raise NotPaddableError(name)
        operands = [jnp.asarray(value, atom.aval.dtype) for value, atom in zip(operands, equation.invars, strict=True)]
        call = Call(
            primitive=equation.primitive,
            params=params,
            operands=operands,
            shapes=shapes,
            out_shapes=out_shapes,
            lengths=lengths,
        )
        found = RULES[name](call)
    else:
        found = equation.primitive.bind(*operands, **params)
    return list(found) if equation.primitive.multiple_results else [found]


_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
