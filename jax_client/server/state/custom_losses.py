"""How does an uploaded loss become one that a run can call, and which one does a request mean?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinker import types

from jax_client.errors import BadRequestError, NotFoundError
from jax_client.torch_graph.graph import read_graph
from jax_client.torch_graph.program import GraphProgram

# Losses of a session.
MAX_LOSSES = 256
# Of a request. A graph of as many nodes as are allowed has less than half of this.
MAX_GRAPH_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomLoss:
    """A loss of a session."""

    session_id: str
    program: GraphProgram


def loss_id_of(request: types.CreateCustomLossRequest) -> str:
    """Return the id, which the request decides, so that a repetition gets the same.

    Raises:
        BadRequestError: the number is negative.
    """
    if request.custom_loss_seq_id < 0:
        raise BadRequestError(f"custom_loss_seq_id is {request.custom_loss_seq_id}; give a number from 0 on.")
    return f"{request.session_id}:loss:{request.custom_loss_seq_id}"


def written(request: types.CreateCustomLossRequest) -> dict[str, Any]:
    """Return what `custom_loss` needs, as plain data that can be kept."""
    nodes = [
        {"op": node.op, "name": node.name, "target": node.target, "args": node.args, "kwargs": node.kwargs}
        for node in request.graph.nodes
    ]
    inputs = [[entry.name, entry.rank] for entry in request.inputs]
    return {"session_id": request.session_id, "name": request.name, "inputs": inputs, "nodes": nodes}


def custom_loss(about: Mapping[str, Any]) -> CustomLoss:
    """Check a graph and make a loss of it.

    Raises:
        BadRequestError: the graph is refused; the message names the node and says what to do.
    """
    graph = read_graph(about["nodes"], [(name, rank) for name, rank in about["inputs"]], about["name"])
    return CustomLoss(session_id=about["session_id"], program=GraphProgram(graph))


def asked_for(session_id: str, config: Mapping[str, float | str] | None) -> str:
    """Return the id of the loss that a forward_backward request names in its settings.

    Raises:
        BadRequestError: the settings are not one loss_id.
        NotFoundError: it is another session's.
    """
    loss_id = (config or {}).get("loss_id")
    if not isinstance(loss_id, str) or len(config or {}) != 1:
        raise BadRequestError("loss_fn 'custom' needs loss_fn_config {'loss_id': ...}, as create_custom_loss gives it.")
    if not loss_id.startswith(f"{session_id}:loss:"):
        raise NotFoundError(
            f"session {session_id} has no custom loss {loss_id[:200]!r}; a loss belongs to the session that created "
            "it. Create it again with this client's ServiceClient."
        )
    return loss_id
