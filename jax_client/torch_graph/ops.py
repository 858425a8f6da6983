"""Which operations may an uploaded loss call? Those of this table; nothing is looked up elsewhere by a sent name."""

from __future__ import annotations

from jax_client.torch_graph import creation, indexing, losses, pointwise, reductions, shapes
from jax_client.torch_graph.values import Operation

# By the name on the wire; a method's has a dot before it.
OPERATIONS: dict[str, Operation] = {
    **pointwise.OPERATIONS,
    **reductions.OPERATIONS,
    **shapes.OPERATIONS,
    **indexing.OPERATIONS,
    **creation.OPERATIONS,
    **losses.OPERATIONS,
}
