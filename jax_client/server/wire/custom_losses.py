"""How does an uploaded loss become a program that a run calls, and which loss does a training request name?

The uploaded graph is kept as plain fields; `custom_loss` checks them and makes the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinker import types

from jax_client.errors import BadRequestError, NotFoundError
from jax_client.torch_graph.graph import read_graph
from jax_client.torch_graph.program import GraphProgram

# The most that a session may have.
MAX_LOSSES = 256
# The limit of a request's body; a graph of as many nodes as are allowed has less than half of this.
MAX_GRAPH_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomLoss:
    """An uploaded loss.

    Attributes:
        session_id: the session that it belongs to.
        program: what a run calls.
    """

    session_id: str
    program: GraphProgram


def loss_id(request: types.CreateCustomLossRequest) -> str:
    """Return the loss's id; the request decides it, so that a repetition gets the same.

    Raises:
        BadRequestError: the number is negative.
    """
    if request.custom_loss_seq_id < 0:
        raise BadRequestError(f"custom_loss_seq_id is {request.custom_loss_seq_id}; give a number from 0 on.")
    return f"{request.session_id}:loss:{request.custom_loss_seq_id}"


def fields(request: types.CreateCustomLossRequest) -> dict[str, Any]:
    """Return what `custom_loss` needs, as plain data for a record."""
    nodes = [
        {"op": node.op, "name": node.name, "target": node.target, "args": node.args, "kwargs": node.kwargs}
        for node in request.graph.nodes
    ]
    inputs = [[entry.name, entry.rank] for entry in request.inputs]
    return {"session_id": request.session_id, "name": request.name, "inputs": inputs, "nodes": nodes}


def custom_loss(fields: Mapping[str, Any], owner: str = "") -> CustomLoss:
    """Check an uploaded graph and make its program.

    Args:
        fields: as `fields` returns them.
        owner: whose turns its compiles take; "" for its session's.

    Raises:
        BadRequestError: the graph is refused; the message names the node and says what to do.
    """
    graph = read_graph(fields["nodes"], [(name, rank) for name, rank in fields["inputs"]], fields["name"])
    session_id = fields["session_id"]
    return CustomLoss(session_id=session_id, program=GraphProgram(graph, owner=owner or session_id))


def requested_loss_id(session_id: str, config: Mapping[str, float | str] | None) -> str:
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
