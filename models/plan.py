"""In which order do a model's layers run, and where are the weights of each?

A `Layer` is a tuple of kinds of parts, with options. Each kind has its parameters in stacks over all layers that have
it, in the model's order. The plan finds what repeats: a `Segment` is a block of a few layers that runs several times,
and in a block a layer may run several times, too. So compile time does not grow with depth.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import jax

from jax_client.models.config import LayerOptions, ModelConfig
from jax_client.models.parts.dense import DENSE
from jax_client.models.parts.gated_delta.layer import DELTA
from jax_client.models.parts.kind import Kind
from jax_client.models.parts.mixture.moe import MOE
from jax_client.models.parts.self_attention import ATTENTION

Index = TypeVar("Index", int, jax.Array, "jax.Array | int")
# Most layers of a block: its program is as large as they are.
LONGEST_BLOCK = 8


class Layer(NamedTuple):
    """The kinds of a layer's parts, and in what it may differ from others with the same parts."""

    kinds: tuple[Kind, ...]
    options: LayerOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a layer in a segment's block.

    Attributes:
        kind: what it computes.
        start, stride, step: in run i of the block, and run j of the layer within it, its arrays are those at
            start + i * stride + j * step of the kind's stacks.
    """

    kind: Kind
    start: int
    stride: int
    step: int = 0

    def place(self, i: Index, j: Index = 0) -> Index:
        """Return where its arrays are in run i of the block, and run j of the layer within it."""
        return self.start + i * self.stride + j * self.step


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedLayer:
    """A layer of a segment's block, and how many times it runs before the next one."""

    parts: tuple[Part, ...]
    options: LayerOptions
    times: int = 1

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its parts."""
        return tuple(part.kind for part in self.parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A block of layers that runs `repeats` times, one run after the other."""

    repeats: int
    layers: tuple[PlacedLayer, ...]

    def parts(self) -> Iterator[Part]:
        """Give the parts of the block in order."""
        for layer in self.layers:
            yield from layer.parts

    def has_all(self, part: Part, c: ModelConfig) -> bool:
        """Return whether the runs of this part are, in order, all that the kind's stacks hold."""
        return part.start == 0 and part.stride == 1 and self.repeats == count(c, part.kind)


@functools.cache
def layers(c: ModelConfig) -> tuple[Layer, ...]:
    """Return every layer of a model."""
    sparse = set() if c.experts is None else set(range(c.n_layers)) - set(c.experts.dense_layers)
    recurrent = set() if c.delta is None else set(c.delta.layers)

    def kinds_of(i: int) -> tuple[Kind, ...]:
        return DELTA if i in recurrent else ATTENTION, MOE if i in sparse else DENSE

    return tuple(Layer(kinds_of(i), c.layer_options(i)) for i in range(c.n_layers))


@functools.cache
def kinds(c: ModelConfig) -> tuple[Kind, ...]:
    """Return the kinds that a model has, each once, in the order in which they first run."""
    return tuple({kind.name: kind for layer in layers(c) for kind in layer.kinds}.values())


def count(c: ModelConfig, kind: Kind) -> int:
    """Return how many layers have a kind, so how long its stacks are."""
    return sum(layer.kinds.count(kind) for layer in layers(c))


def layers_of(c: ModelConfig, kind: Kind) -> tuple[int, ...]:
    """Return the number of the layer of every entry of a kind's stacks."""
    return tuple(i for i, layer in enumerate(layers(c)) for part in layer.kinds if part == kind)


@functools.cache
def plan(c: ModelConfig) -> tuple[Segment, ...]:
    """Return the segments of a model, in order."""
    return segments(layers(c))


def segments(every: tuple[Layer, ...]) -> tuple[Segment, ...]:
    """Return layers as blocks that repeat.

    From each place on, the shortest block is taken that covers most layers by repeating; layers that do not repeat are
    a segment each.
    """
    done, taken = 0, []
    seen: Counter[str] = Counter()
    while done < len(every):
        size, repeats = _longest_repetition(every, done)
        block = every[done : done + size]
        each, within = Counter(kind.name for layer in block for kind in layer.kinds), Counter(seen)
        found = []
        for layer in block:
            parts = []
            for kind in layer.kinds:
                parts.append(Part(kind=kind, start=within[kind.name], stride=each[kind.name]))
                within[kind.name] += 1
            found.append(PlacedLayer(parts=tuple(parts), options=layer.options))
        taken.append(Segment(repeats=repeats, layers=tuple(_runs(found))))
        seen.update({name: n * repeats for name, n in each.items()})
        done += size * repeats
    return tuple(taken)


def _runs(block: list[PlacedLayer]) -> Iterator[PlacedLayer]:
    """Give the layers of a block, each with how many times it runs."""
    while block:
        first, times = block[0], 1
        while times < len(block) and (block[times].kinds, block[times].options) == (first.kinds, first.options):
            times += 1
        if times == 1:
            yield first
        else:
            steps = [after.start - part.start for part, after in zip(first.parts, block[1].parts, strict=True)]
            parts = tuple(replace(part, step=step) for part, step in zip(first.parts, steps, strict=True))
            yield PlacedLayer(parts=parts, options=first.options, times=times)
        block = block[times:]


def _longest_repetition(every: tuple[Layer, ...], start: int) -> tuple[int, int]:
    """Return the size of the block that covers most layers from `start` on by repeating, and how often it does."""
    best = 1, 1
    for size in range(1, min(LONGEST_BLOCK, len(every) - start) + 1):
        block, repeats = every[start : start + size], 1
        while every[start + repeats * size : start + (repeats + 1) * size] == block:
            repeats += 1
        if repeats > 1 and size * repeats > best[0] * best[1]:
            best = size, repeats
    return best
