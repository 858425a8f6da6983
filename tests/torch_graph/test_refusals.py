"""Is everything that an uploaded loss must not do refused by name, before it is computed?"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.errors import BadRequestError
from jax_client.torch_graph.graph import MAX_NODES
from jax_client.torch_graph.ops import OPERATIONS
from jax_client.torch_graph.program import GraphProgram
from support.graphs.graph_nodes import LP, OUT, P_IN, TOTAL, call, output, placeholder, read, ref


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([P_IN, call("a", "os.system", "true"), OUT], ["'a'", "'os.system'"]),
        ([P_IN, call("a", "builtins.eval", "1"), OUT], ["'a'", "'builtins.eval'"]),
        ([P_IN, call("a", ".sum", LP), OUT], ["'a'", "'.sum'"]),
        ([P_IN, call("a", "__class__", LP, op="call_method"), OUT], ["'a'", "'__class__'"]),
        ([P_IN, call("a", "add_", LP, 1, op="call_method"), OUT], ["'a'", "method 'add_'"]),
        ([P_IN, call("layer", "net.0", LP, op="call_module"), OUT], ["'layer'", "module ('net.0')"]),
        ([P_IN, call("const", "_tensor_constant0", op="get_attr"), OUT], ["'const'", "from outside"]),
        ([P_IN, call("a", "torch.exp", op="call"), OUT], ["'a'", "kind 'call'"]),
        ([P_IN, call("a", "torch.exp", ref("b")), call("b", "torch.exp", ref("a")), OUT], ["'a'", "'b', which no node"]),  # noqa: E501
        ([P_IN, call("a", "torch.exp", ref("a")), OUT], ["'a'", "refers to 'a'"]),
        ([P_IN, call("logprobs", "torch.exp", LP), OUT], ["name of an earlier node"]),
        ([P_IN, call("a", "torch.exp"), OUT], ["'a'", "'torch.exp' wrongly", "input"]),
        ([P_IN, call("a", "torch.exp", LP, out=LP), OUT], ["'a'", "out="]),
        ([P_IN, call("a", "torch.nn.functional.relu", LP, inplace=True), OUT], ["inplace=True"]),
        ([P_IN, call("a", "to", LP, {"dtype": "bfloat16"}, op="call_method"), OUT], ["'bfloat16'", "float64"]),
        ([P_IN, call("a", "to", LP, {"device": "cuda:0"}, op="call_method"), OUT], ["device 'cuda:0'"]),
        ([P_IN, call("a", "torch.add", LP, 2**70), OUT], ["64 bits"]),
        ([P_IN, call("a", "torch.add", LP, {"code": "x"}), OUT], ["'a'", "not known"]),
        ([P_IN, TOTAL], ["no output"]),
        ([P_IN, TOTAL, OUT, TOTAL], ["'output'", "others come after"]),
        ([P_IN, TOTAL, output(1.0)], ["'output'", "must be a tensor"]),
        ([P_IN, TOTAL, output(ref("total"), loss=ref("total"))], ["'loss'", "custom/"]),
        ([P_IN, TOTAL, output(ref("total"), **{"custom/a:sum": 1.0})], ["custom/a:sum", "must be a tensor"]),
        ([P_IN, call("cut", "detach", LP, op="call_method"), output(ref("cut"))], ["does not depend"]),
        ([placeholder("other"), TOTAL, OUT], ["input 'other'"]),
        ([TOTAL, OUT], ["'total'", "before the inputs"]),
        ([P_IN, *(call(f"n{i}", "torch.exp", LP) for i in range(MAX_NODES)), OUT], ["1002 nodes", "1000"]),
        ([P_IN] * 10**6, ["1000000 nodes"]),
    ],
)  # fmt: skip
def test_what_is_not_in_the_table_is_refused_by_name(nodes: list[Any], words: list[str]) -> None:
    with pytest.raises(BadRequestError) as refused:
        read(*nodes)
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "pass that to forward_backward_custom" in message


@pytest.mark.parametrize(
    "inputs",
    [(), (("a", 1),), (("logprobs", 0),), (("logprobs", 3),), (("logprobs", 1), ("A b", 1)), (("logprobs", 1),) * 2,
     (("logprobs", 1), *((f"a{i}", 1) for i in range(16)))],
)  # fmt: skip
def test_inputs_that_are_not_possible(inputs: Any) -> None:
    with pytest.raises(BadRequestError, match=r"input|rank"):
        read(P_IN, TOTAL, OUT, inputs=inputs)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"tuple": [value]}
    return value


@pytest.mark.parametrize("arg", [deep(10), [1] * 3000, "x" * 200, {"ref": ["logprobs"]}, {"slice": [1]}, {1: 2, 3: 4}])
def test_arguments_are_bounded(arg: Any) -> None:
    with pytest.raises(BadRequestError, match="node 'a'"):
        read(P_IN, call("a", "torch.add", LP, arg), OUT)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([call("total", "torch.outer", LP, LP)], ["'total' (torch.outer)", "16777216"]),
        ([call("total", "expand", LP, 10**9, -1, op="call_method")], ["'total'", "limit"]),
        ([call("z", "new_zeros", LP, 10**12, op="call_method"), call("total", "operator.add", LP, ref("z"))], ["'z'", "limit"]),  # noqa: E501
        ([call("total", "repeat", LP, 10**6, op="call_method")], ["'total'", "limit"]),
        ([call("c", "unsqueeze", LP, 1, op="call_method"), call("total", "torch.nn.functional.mse_loss", ref("c"), LP)], ["'total'", "limit"]),  # noqa: E501
        ([call("total", "unbind", LP, op="call_method")], ["'total'", "1024 pieces"]),
        ([call("a", "operator.pow", 3, 10**9), call("total", "operator.mul", LP, ref("a"))], ["'a'", "exponent"]),
        ([call("a", "operator.mul", 2**62, 4), call("total", "operator.mul", LP, ref("a"))], ["'a'", "64 bits"]),
        ([call("a", "operator.mul", "x", 10**9), call("total", "operator.mul", LP, ref("a"))], ["'a'", "number"]),
        ([call("total", "operator.getitem", LP, 5000)], ["'total'", "out of range"]),
        ([call("m", "operator.gt", LP, 0), call("total", "operator.getitem", LP, ref("m"))], ["'total'", "torch.where"]),  # noqa: E501
        ([call("total", "getattr", LP, "__class__")], ["'total'", "'__class__'"]),
        ([call("total", "view", LP, 7, op="call_method")], ["'total'", "view"]),
        ([call("total", "mean", LP, 3, op="call_method")], ["'total'", "dimension 3"]),
        ([call("total", "math.log", LP)], ["does not depend"]),
        ([call("total", "torch.exp", LP)], ["scalar loss"]),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_before_it_is(nodes: list[Any], words: list[str]) -> None:
    with pytest.raises(BadRequestError) as refused:
        GraphProgram(read(P_IN, *nodes, OUT)).prepare([(((4999,), "float32"),)]).result(60)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_all_tensors_together_are_bounded() -> None:
    nodes = [call(f"n{i}", "expand", LP, 2000, -1, op="call_method") for i in range(40)]
    last = [
        call("total", "torch.cat", [ref(node["name"]) for node in nodes[:1]]),
        call("sum", "torch.sum", ref("total")),
    ]
    with pytest.raises(BadRequestError, match="all tensors together"):
        GraphProgram(read(P_IN, *nodes, *last, output(ref("sum")))).prepare([(((8000,), "float32"),)]).result(60)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ref", "tuple", "slice", "dict", "dtype", "float", "x"]), inner, max_size=2),  # noqa: E501
    max_leaves=6,
)  # fmt: skip
ARGUMENT = st.sampled_from([LP, ref("n0"), ref("n1"), {"dtype": "int64"}, 0, 1, -1, 0.5, [1, 2]]) | JSON
CALLS = st.builds(
    lambda op, name, target, args, kwargs: {"op": op, "name": name, "target": target, "args": args, "kwargs": kwargs},
    st.sampled_from(["call_function", "call_method", "placeholder", "get_attr", "output"]) | JSON,
    st.sampled_from(["n0", "n1", "n2"]) | JSON,
    st.sampled_from([name.removeprefix(".") for name in sorted(OPERATIONS)]) | JSON,
    st.lists(ARGUMENT, max_size=3) | JSON,
    st.dictionaries(st.sampled_from(["dim", "keepdim", "input", "dtype", "axis"]), ARGUMENT, max_size=2) | JSON,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CALLS | JSON, max_size=4))
def test_malformed_graphs_are_only_ever_refused(nodes: list[Any]) -> None:
    last = next(
        (n["name"] for n in reversed(nodes) if isinstance(n, dict) and isinstance(n.get("name"), str)), "logprobs"
    )
    for end in (output(ref(last)), output(LP)):
        try:
            jax.eval_shape(read(P_IN, *nodes, end).function(), jax.ShapeDtypeStruct((3,), np.float32))
        except BadRequestError:
            continue


# Each function once, under the first of its names.
NAMES = list({operation.call: name for name, operation in sorted(OPERATIONS.items(), reverse=True)}.values())
STRANGE = [LP, "x", None, {"slice": [0, 1, None]}, -5, 1.5, {"dtype": "bool"}, [LP], 2**40]


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_fails_in_another_way(name: str) -> None:
    """Whatever each is given, it is computed or refused."""
    op, target = ("call_method", name[1:]) if name.startswith(".") else ("call_function", name)
    for args in (
        [],
        ["x"],
        [1],
        [LP],
        *([LP, value] for value in STRANGE),
        *([LP, value, value] for value in STRANGE[:5]),
    ):
        with contextlib.suppress(BadRequestError):
            function = read(P_IN, call("total", target, *args, op=op), OUT).function()
            jax.eval_shape(function, jax.ShapeDtypeStruct((3,), np.float32))
