"""What does the leading host tell the others? To launch what it launches, in its order.

A verb is a frozen record of scalars, texts and numpy arrays. Arrays on the devices have numbers, which the leading host
gives: the same number is the same array everywhere, of which each host has its own devices' parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jax_client.weights.read.source import ModelSource

# Dicts, lists and tuples with arrays, with their numbers, or with `Spec`s in place of them.
Tree = object
# Of each axis of a part of an array: where it begins and ends.
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """An array without its values.

    Attributes:
        shape, dtype: of the whole array.
        mesh: sizes of the mesh by `MESH_AXES`.
        axes: of the mesh, that split each axis of the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    mesh: tuple[int, ...]
    axes: tuple[tuple[str, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """Put an array on the devices; `parts` are those of the host that it is sent to."""

    array: int
    spec: Spec
    parts: Mapping[Bounds, np.ndarray]


@dataclass(frozen=True, slots=True)
class Zeros:
    """Make an array of zeros."""

    array: int
    spec: Spec


@dataclass(frozen=True, slots=True)
class Call:
    """Run a program; nothing is compiled for it, but for what could not be foreseen.

    Attributes:
        number: of the launch.
        engine, program: which.
        static: the program's keywords.
        arguments: its trees, with numbers in place of arrays.
        first: the number of the first array that it returns; the others follow.
    """

    number: int
    engine: int
    program: str
    static: Mapping[str, object]
    arguments: Tree
    first: int


@dataclass(frozen=True, slots=True)
class Gather:
    """Return arrays that every device has whole, from `first` on."""

    number: int
    arrays: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class Free:
    """Forget arrays."""

    arrays: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Programs:
    """Make the programs of an engine, with these attentions."""

    engine: int
    attention: str
    paged: str


@dataclass(frozen=True, slots=True)
class Close:
    """Forget an engine."""

    engine: int


Verb = Put | Zeros | Call | Gather | Free | Programs | Close


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Read the host's parts of a model's weights.

    Attributes:
        engine: that they are of; None for those of another model, for one call.
        source: as the leading host found it.
        fingerprint: of the weights.
        dtype: of the matmul weights.
        mesh: sizes by `MESH_AXES`.
        fraction: of a device's memory that may be filled.
        cache: where compiled programs are kept; "" leaves jax's own setting, None is the user's default.
        first: the number of the first array.
    """

    engine: int | None
    source: ModelSource
    fingerprint: str
    dtype: str
    mesh: tuple[int, ...]
    fraction: float
    cache: str | None
    first: int


@dataclass(frozen=True, slots=True)
class Compile:
    """Compile a program for arguments that are `Spec`s in place of arrays."""

    engine: int
    program: str
    static: Mapping[str, object]
    arguments: Tree


@dataclass(frozen=True, slots=True)
class Hello:
    """What a host is, to be compared with the leading one.

    Attributes:
        versions: of what must be the same everywhere, by name.
        process: jax's number of its process.
        devices: how many it has.
        kind: of them.
        pid: of its process.
        free: bytes that each of its devices may allocate.
    """

    versions: Mapping[str, str]
    process: int
    devices: int
    kind: str
    pid: int
    free: int


class LaunchLog:
    """The launches of a host so far, as one digest: the same on all hosts, or they no longer compute one thing."""

    def __init__(self) -> None:
        self.digest = ""

    def add(self, verb: Call | Gather) -> None:
        """Note a launch."""
        launch: list[object] = [self.digest, verb.number, verb.first]
        if isinstance(verb, Call):
            launch += [verb.engine, verb.program, sorted(verb.static), *_leaves(verb.arguments)]
        else:
            launch += verb.arrays
        self.digest = hashlib.blake2b(repr(launch).encode(), digest_size=8).hexdigest()


def _leaves(tree: object) -> Iterator[object]:
    """Yield the numbers in a tree of dicts, lists and tuples, the dicts in the order of their names."""
    if isinstance(tree, dict):
        for name in sorted(tree):
            yield from _leaves(tree[name])
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _leaves(each)
    else:
        yield tree


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to verbs that were carried out.

    Attributes:
        free: bytes that each of the host's devices may still allocate.
        log: `LaunchLog.digest` after them.
        failed: launches that ran out of memory, and in which words.
    """

    free: int
    log: str
    failed: Mapping[int, str] = field(default_factory=dict)
