"""Which operations may an uploaded loss call? Those of this table; nothing is looked up elsewhere by a sent name."""

from __future__ import annotations

from jax_client.losses import graph_losses, graph_pointwise, graph_reductions, graph_shapes
from jax_client.losses.graph_values import Operation

# By the name on the wire; a method's has a dot before it.
OPERATIONS: dict[str, Operation] = {
    **graph_pointwise.OPERATIONS,
    **graph_reductions.OPERATIONS,
    **graph_shapes.OPERATIONS,
    **graph_losses.OPERATIONS,
}
