"""How do the tests write the graph of an uploaded loss? Node by node, as the SDK sends it; without torch."""

from __future__ import annotations

from typing import Any

from jax_client.torch_graph.graph import read_graph


def placeholder(name: str) -> dict[str, Any]:
    return {"op": "placeholder", "name": name, "target": name, "args": [], "kwargs": {}}


def call(name: str, target: str, /, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def output(loss: Any, /, **metrics: Any) -> dict[str, Any]:
    return {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [loss, {"dict": metrics}]}]}


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


LP = ref("logprobs")
P_IN = placeholder("logprobs")
TOTAL = call("total", "sum", LP, op="call_method")
OUT = output(ref("total"))


def read(*nodes: Any, inputs: Any = (("logprobs", 1),)) -> Any:
    return read_graph(list(nodes), list(inputs), "mine")
