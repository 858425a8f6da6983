"""How does a layer of a scanned segment get its weights and adapters? Each is cut out of its kind's stacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_client.models.config import ModelConfig
from jax_client.models.layers import InStack, from_bits
from jax_client.models.parts.kind import Weights
from jax_client.models.parts.lora import Adapter
from jax_client.models.plan import Part, PlacedLayer, Segment


class SegmentStacks:
    """The weights and the adapters of a segment's layers, each cut out of its kind's stacks.

    Where the runs of a part are all that its stacks hold, in order, these are scanned. Else a layer's arrays are taken
    out of the whole stacks by their place: a slice of a stack would be a copy of it.

    Attributes:
        scanned: by kind, the stacks for `lax.scan` to cut.
    """

    def __init__(self, segment: Segment, c: ModelConfig, layers: Weights, lora: Adapter):
        self._segment, self._c, self._layers, self._lora = segment, c, layers, lora
        self.scanned = {
            part.kind.name: (
                {name: a for name, a in layers[part.kind.name].items() if name not in part.kind.in_stack},
                {module: lora[module] for module in self._modules(part)},
            )
            for part in segment.parts()
            if self.is_scanned(part)
        }

    def _modules(self, part: Part) -> list[str]:
        return [module for module in part.kind.modules(self._c, 1) if module in self._lora]

    def is_scanned(self, part: Part) -> bool:
        """Return whether a part's stacks are among `scanned`."""
        return self._segment.has_all(part, self._c)

    def of_layer(
        self, layer: PlacedLayer, i: jax.Array, j: jax.Array | int, scanned: Any
    ) -> tuple[list[Weights], list[Adapter]]:
        """Return the weights and the adapters of each part of a layer in run i of the block, and j of the layer."""
        ws, loras = [], []
        for part in layer.parts:
            kind, place = part.kind, jnp.asarray(part.place(i, j))
            stacks = self._layers[kind.name]
            if self.is_scanned(part):
                w, lora = scanned[kind.name]
            else:
                w, lora = jax.tree.map(
                    lambda a, at=place: jax.lax.dynamic_index_in_dim(a, at, keepdims=False),
                    (
                        {name: a for name, a in stacks.items() if name not in kind.in_stack},
                        {module: self._lora[module] for module in self._modules(part)},
                    ),
                )
            ws.append(from_bits(w) | {name: InStack(stacks[name], place) for name in stacks if name in kind.in_stack})
            loras.append(lora)
        return ws, loras
