"""Which blocks does the plan find, and where are the arrays of their parts?"""

from __future__ import annotations

import itertools

import pytest

from jax_client.models.config import LayerOptions, Rope
from jax_client.models.parts.dense import DENSE
from jax_client.models.parts.mixture.moe import MOE
from jax_client.models.parts.self_attention import ATTENTION
from jax_client.models.plan import Layer, segments

WHOLE = LayerOptions(window=None, rope=Rope(theta=1e4))
WINDOW = LayerOptions(window=8, rope=Rope(theta=1e4))
A, M, S = Layer((ATTENTION, DENSE), WHOLE), Layer((ATTENTION, MOE), WHOLE), Layer((ATTENTION, DENSE), WINDOW)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ([A] * 5, [(5, 1)]),
        ([M, A, M], [(1, 1), (1, 1), (1, 1)]),
        ([A, A, A, M, M, M, M], [(3, 1), (4, 1)]),
        ([A, M] * 4, [(4, 2)]),
        ([A, A, A, M] * 3 + [A, A], [(3, 4), (2, 1)]),
        ([A] + [M] * 9, [(1, 1), (9, 1)]),
        ([A], [(1, 1)]),
        ([S, A] * 6, [(6, 2)]),
        (([S] * 5 + [A]) * 3 + [S, S], [(3, 6), (2, 1)]),
    ],
)
def test_every_layer_runs_once_with_its_own_arrays(layers: list[Layer], blocks: list[tuple[int, int]]) -> None:
    found = segments(tuple(layers))
    assert [(segment.repeats, sum(layer.times for layer in segment.layers)) for segment in found] == blocks
    ran = [
        ([(part.kind.name, part.place(i, j)) for part in layer.parts], layer.options)
        for segment in found
        for i in range(segment.repeats)
        for layer in segment.layers
        for j in range(layer.times)
    ]
    for segment in found:  # neighbours differ: their programs are their own
        kinds = [(layer.kinds, layer.options) for layer in segment.layers]
        assert all(a != b for a, b in itertools.pairwise(kinds))
    used = {"attention": 0, "dense": 0, "moe": 0}
    for (placed, options), layer in zip(ran, layers, strict=True):
        assert options == layer.options
        for (name, place), kind in zip(placed, layer.kinds, strict=True):
            assert (name, place) == (kind.name, used[name])
            used[name] += 1
