"""Is an uploaded graph an acceptable loss, and which function of arrays is it?

`read_graph` checks the nodes and binds their operations; `Graph.function` evaluates them over jax arrays. A graph is
plain data, as the tinker SDK writes it: nodes in the order in which they run, each with the wire name of an operation.
A sent name is only ever a key of the table in `ops`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import numpy as np

from jax_client.errors import BadRequestError
from jax_client.torch_graph.ops import OPERATIONS
from jax_client.torch_graph.traced.bounds import INSTEAD
from jax_client.torch_graph.values import (
    DTYPES,
    MAX_ELEMENTS,
    MAX_PARTS,
    Operation,
    Place,
    Value,
    exceeds,
    is_size,
    is_tensor,
    trace_node,
)

MAX_NODES = 1000
MAX_INPUTS = 16
MAX_METRICS = 64
# Values in a node's arguments, and how deeply they are nested.
MAX_ARGUMENTS = 2048
MAX_NESTING = 8
MAX_TEXT = 128
# Elements of all tensors of a loss together: 1 GiB of float32.
MAX_TOTAL = 16 * MAX_ELEMENTS

_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_SETTINGS = {"layout": ("strided",), "memory_format": ("contiguous_format", "preserve_format")}
_OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim"}
# Arguments of torch's that change nothing here, at the values at which they do not.
_IDLE: dict[str, tuple[Value, ...]] = {
    "inplace": (False,), "out": (None,), "weight": (None,), "size_average": (None,), "reduce": (None,),
    "requires_grad": (False,), "pin_memory": (False, None), "_stacklevel": tuple(range(10)),
    "copy": (False, True), "non_blocking": (False, True), "device": (None, Place(kind="device", name="cpu"), "cpu"),
    "layout": (None, Place(kind="layout", name="strided")),
    "memory_format": (None, *(Place(kind="memory_format", name=name) for name in _SETTINGS["memory_format"])),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Ref:
    """The value of an earlier node."""

    name: str


# An argument of a node before it runs: values, and references in them.
Argument: TypeAlias = "Ref | Value | slice | tuple[Argument, ...] | list[Argument]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input: its name, and the number of dimensions that every datum's value has."""

    name: str
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One call of an operation; the arguments are numbers, text, `Ref`s, and lists, tuples and slices of them."""

    name: str
    target: str
    operation: Operation
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Graph:
    """An accepted loss.

    Attributes:
        name: the user's function's.
        inputs: `logprobs` first.
        nodes: its calls, in order.
        loss: the node whose value is the loss.
        metrics: by metric name, the node whose value it is.
    """

    name: str
    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    loss: str
    metrics: Mapping[str, str]

    def function(
        self, between: Callable[[], None] = lambda: None
    ) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
        """Return `(logprobs, *inputs) -> (scalar loss, metrics)` over jax arrays.

        The function is pure and can be traced. It raises BadRequestError, which names the node, where shapes or types
        do not fit, a tensor would be too large, or the loss is not one float.

        Args:
            between: called before each node; what it raises ends the evaluation.
        """
        return lambda *arrays: _evaluate(self, arrays, between)


def read_graph(nodes: Sequence[object], inputs: Sequence[tuple[str, int]], name: str) -> Graph:
    """Check a graph and bind its operations.

    Args:
        nodes: of each the fields `op`, `name`, `target`, `args` and `kwargs`, as mappings.
        inputs: names and ranks, `logprobs` first.
        name: the loss's, for messages.

    Raises:
        BadRequestError: anything that is not known or not allowed; the message names the node and says what to do.
    """
    return _Reader(nodes, inputs, _short(name)).graph()


class _Refused(Exception):
    """Why a node is refused."""


class _Reader:
    def __init__(self, nodes: Sequence[object], inputs: Sequence[tuple[str, int]], name: str) -> None:
        self._name = name
        self._wire = nodes
        self._inputs = tuple(self._input(*entry) for entry in inputs)
        self._left = [entry.name for entry in self._inputs]
        self._depends: dict[str, bool] = {}  # whether the gradient by logprobs passes through a node, by its name
        self._calls: list[Node] = []

    def _input(self, name: object, rank: object) -> Input:
        if (
            not isinstance(name, str)
            or not isinstance(rank, int | float)
            or not _INPUT_NAME.fullmatch(name)
            or rank not in (0, 1, 2)
        ):
            raise BadRequestError(f"loss {self._name}: input {_short(name)} of rank {_short(rank)} is not possible.")
        return Input(name=name, rank=int(rank))

    def graph(self) -> Graph:
        names = [entry.name for entry in self._inputs]
        if not names or len(names) > MAX_INPUTS or names[0] != "logprobs" or len(set(names)) < len(names):
            raise BadRequestError(
                f"loss {self._name}: its inputs are {_short(names)}; give logprobs first, then others, each once, "
                f"{MAX_INPUTS} at most."
            )
        if self._inputs[0].rank == 0:
            raise BadRequestError(f"loss {self._name}: logprobs has rank 0; it has 1, [T], or 2, [T, K].")
        if not isinstance(self._wire, Sequence) or len(self._wire) > MAX_NODES:
            count = len(self._wire) if isinstance(self._wire, Sequence) else _short(self._wire)
            raise BadRequestError(f"loss {self._name} has {count} nodes; the limit is {MAX_NODES}. {INSTEAD}")
        for i, node in enumerate(self._wire):
            where = f"node {i}"
            try:
                if not isinstance(node, Mapping):
                    raise _Refused("is no node")
                where = f"node {_short(node.get('name'))}"
                if node.get("op") == "output":
                    if i < len(self._wire) - 1:
                        raise _Refused("is the output, and others come after it")
                    return self._output(node)
                self._read(node)
            except _Refused as why:
                raise BadRequestError(f"loss {self._name}: {where} {why}. {INSTEAD}") from None
        raise BadRequestError(f"loss {self._name} has no output node. {INSTEAD}")

    def _read(self, node: Mapping[str, object]) -> None:
        op, name, target = node.get("op"), node.get("name"), node.get("target")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TEXT or not isinstance(target, str):
            raise _Refused(f"has no name and target, or a name of more than {MAX_TEXT} characters")
        if name in self._depends:
            raise _Refused("has the name of an earlier node")
        args, kwargs = node.get("args", ()), node.get("kwargs", {})
        if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
            raise _Refused("has arguments that are no list or mapping")
        if op == "placeholder":
            if not self._left or target != self._left[0] or args or kwargs or self._calls:
                raise _Refused(f"is input {_short(target)}; the inputs are {_short([e.name for e in self._inputs])}")
            self._depends[self._left.pop(0)] = len(self._depends) == 0
            if name != target:
                raise _Refused(f"is input {_short(target)} under another name")
        elif op in ("call_function", "call_method"):
            self._call(name, target, op, args, kwargs)
        elif op in ("call_module", "get_attr"):
            action = "calls a module" if op == "call_module" else "reads a tensor or module from outside"
            raise _Refused(f"{action} ({_short(target)}); a loss on the server has only functions and its inputs")
        else:
            raise _Refused(f"is of kind {_short(op)}, which is not known")

    def _call(self, name: str, target: str, op: str, args: Sequence[object], kwargs: Mapping[object, object]) -> None:
        if self._left:
            raise _Refused(f"comes before the inputs {_short(self._left)}")
        key = f".{target}" if op == "call_method" else target
        operation = None if op == "call_function" and target.startswith(".") else OPERATIONS.get(key)
        if operation is None:
            noun = "method" if op == "call_method" else "function"
            raise _Refused(f"calls the {noun} {_short(target)}, which is not among those that run on the server")
        decoder = _Decoder(self._depends)
        decoded = tuple(decoder.value(arg, 0) for arg in args)
        named = {_argument(key): decoder.value(arg, 0) for key, arg in kwargs.items()}
        signature = inspect.signature(operation.call)
        for key in [key for key in named if key not in signature.parameters and key in _IDLE]:
            if not any(type(named[key]) is type(idle) and named[key] == idle for idle in _IDLE[key]):
                raise _Refused(f"calls {_short(target)} with {key}={_short(named[key])}, which is not supported")
            del named[key]
        try:
            signature.bind(*decoded, **named)
        except TypeError as error:
            raise _Refused(f"calls {_short(target)} wrongly: {error}") from None
        self._calls.append(Node(name=name, target=target, operation=operation, args=decoded, kwargs=named))
        self._depends[name] = not operation.stops and any(self._depends[ref] for ref in decoder.refs)

    def _output(self, node: Mapping[str, object]) -> Graph:
        args = node.get("args")
        result = args[0] if isinstance(args, list | tuple) and len(args) == 1 else None
        if isinstance(result, Mapping):
            result = result.get("tuple")
        if self._left or not isinstance(result, list | tuple) or len(result) != 2:
            raise _Refused("does not return (loss, metrics)")
        loss = self._result(result[0], "the loss")
        metrics = result[1].get("dict") if isinstance(result[1], Mapping) else None
        if not isinstance(metrics, Mapping) or len(metrics) > MAX_METRICS:
            raise _Refused(f"does not return its metrics as a dict of at most {MAX_METRICS}")
        for key in metrics:
            if not isinstance(key, str) or not _METRIC_NAME.fullmatch(key):
                raise _Refused(f"names a metric {_short(key)}; names are custom/<lowercase>:sum or :mean")
        if not self._depends[loss]:
            raise _Refused("returns a loss that does not depend on logprobs, so it has no gradient")
        return Graph(
            name=self._name,
            inputs=self._inputs,
            nodes=tuple(self._calls),
            loss=loss,
            metrics={key: self._result(value, f"metric {key}") for key, value in metrics.items()},
        )

    def _result(self, value: object, result: str) -> str:
        decoded = _Decoder(self._depends).value(value, 0)
        if not isinstance(decoded, Ref):
            raise _Refused(f"returns {result} as {_short(value)}; it must be a tensor")
        return decoded.name


def _argument(name: object) -> str:
    if not isinstance(name, str) or len(name) > MAX_TEXT:
        raise _Refused(f"has an argument named {_short(name)}")
    return _OTHER_NAMES.get(name, name)


class _Decoder:
    """Turns the arguments of one node into values; remembers which nodes they refer to."""

    def __init__(self, known: Mapping[str, object]) -> None:
        self.refs: list[str] = []
        self._known = known
        self._count = 0

    def value(self, wire: object, depth: int) -> Argument:
        self._count += 1
        if self._count > MAX_ARGUMENTS or depth > MAX_NESTING:
            raise _Refused(f"has more than {MAX_ARGUMENTS} values in its arguments, or nests them {MAX_NESTING} deep")
        if wire is None or isinstance(wire, bool | float):
            return wire
        if isinstance(wire, int):
            if not -(2**63) <= wire < 2**63:
                raise _Refused("has an integer of more than 64 bits")
            return wire
        if isinstance(wire, str):
            if len(wire) > MAX_TEXT:
                raise _Refused(f"has a text of more than {MAX_TEXT} characters")
            return wire
        if isinstance(wire, list | tuple):
            return [self.value(item, depth + 1) for item in wire]
        if isinstance(wire, Mapping) and len(wire) == 1:
            ((kind, content),) = wire.items()
            return self._tagged(kind, content, depth)
        raise _Refused(f"has the argument {_short(wire)}, which is not known")

    def _tagged(self, kind: object, content: object, depth: int) -> Argument:
        if kind == "ref":
            if not isinstance(content, str) or content not in self._known:
                raise _Refused(f"refers to {_short(content)}, which no node before it is")
            self.refs.append(content)
            return Ref(name=content)
        if kind == "tuple" and isinstance(content, list | tuple):
            return tuple(self.value(item, depth + 1) for item in content)
        if kind == "slice" and isinstance(content, list | tuple) and len(content) == 3:
            return slice(*(self.value(item, depth + 1) for item in content))
        if kind == "ellipsis":
            return Ellipsis
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "dtype":
            if not isinstance(content, str) or content not in DTYPES:
                raise _Refused(f"uses dtype {_short(content)}; known are {', '.join(DTYPES)}")
            return DTYPES[content]
        if kind == "device":
            if content != "cpu":
                raise _Refused(f"uses device {_short(content)}; leave devices out")
            return Place(kind="device", name="cpu")
        if kind in ("layout", "memory_format") and content in _SETTINGS[kind]:
            return Place(kind=kind, name=str(content))
        raise _Refused(f"has the argument {_short({kind: content})}, which is not known")


def _short(value: object) -> str:
    """Return a value for a message; long text and large collections are cut before they are written out."""
    if isinstance(value, str):
        return repr(value[:MAX_TEXT])
    if isinstance(value, list | tuple):
        return f"[{', '.join(_short(item) for item in value[:4])}{', ...' if len(value) > 4 else ''}]"
    if isinstance(value, int | float | None):
        return repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a very large integer"
    return f"a value of type {type(value).__name__}"


def _evaluate(
    graph: Graph, arrays: Sequence[jax.Array], between: Callable[[], None]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    values: dict[str, Value] = {entry.name: array for entry, array in zip(graph.inputs, arrays, strict=True)}
    total = 0
    for node in graph.nodes:
        between()
        trace_node(f"node {node.name!r} ({node.target})")
        try:
            args = [_resolved(arg, values) for arg in node.args]
            kwargs = {key: _resolved(arg, values) for key, arg in node.kwargs.items()}
            value = node.operation.call(*args, **kwargs)
            total += _measure(value)
            if exceeds(total, MAX_TOTAL, "all tensors together have"):
                raise ValueError(f"all tensors together have more than {MAX_TOTAL} elements")
        except Exception as error:
            # Whatever an operation is given, the caller learns which node it was.
            why = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise BadRequestError(
                f"loss {graph.name}: node {node.name!r} ({node.target}) cannot be computed: {why}. {INSTEAD}"
            ) from error
        values[node.name] = value
    loss = values[graph.loss]
    if not is_tensor(loss) or loss.shape != () or loss.dtype.kind != "f":
        got = f"shape {loss.shape}, {loss.dtype}" if is_tensor(loss) else type(loss).__name__
        raise BadRequestError(f"loss {graph.name} must return a scalar loss of floats, got {got}; sum or average it.")
    metrics = {}
    for key, name in graph.metrics.items():
        value = values[name]
        if not is_tensor(value) or value.size != 1:
            got = f"shape {value.shape}" if is_tensor(value) else type(value).__name__
            raise BadRequestError(f"loss {graph.name}: metric {key!r} must be one number, got {got}.")
        metrics[key] = jax.lax.stop_gradient(value.reshape(()))
    return loss, metrics


def _resolved(arg: Argument, values: Mapping[str, Value]) -> Value:
    if isinstance(arg, Ref):
        return values[arg.name]
    if isinstance(arg, tuple):
        return tuple(_resolved(item, values) for item in arg)
    if isinstance(arg, list):
        return [_resolved(item, values) for item in arg]
    if isinstance(arg, slice):
        return slice(*(_resolved(item, values) for item in (arg.start, arg.stop, arg.step)))
    return arg


def _measure(value: Value) -> int:
    """Return the elements of a node's value. Raises ValueError for one that is too large, or of an unknown kind."""
    if is_tensor(value):
        if exceeds(value.size, MAX_ELEMENTS):
            raise ValueError(f"the result has shape {list(value.shape)}; the limit is {MAX_ELEMENTS} elements")
        return value.size
    if isinstance(value, tuple):
        if len(value) > MAX_PARTS or not all(is_tensor(part) or is_size(part) for part in value):
            raise ValueError(f"the result has {len(value)} parts, or parts that are no tensors or sizes")
        return sum(_measure(part) for part in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("the result is an integer of more than 64 bits")
    if not isinstance(value, bool | int | float | np.dtype | Place) and not is_size(value):
        raise ValueError(f"the result is {_short(value)}, which a loss cannot use")
    return 1
