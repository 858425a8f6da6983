"""Which collectives does a compiled program have, and in which loops? Its text is read, from the entry down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
WHILE = re.compile(r" = (.*?) while\(.*\bbody=%?([\w.-]+)")
CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One line of a program.

    Attributes:
        loops: what each loop around it carries, the outermost first.
        shapes: of the results, on one device.
    """

    kind: str
    loops: tuple[tuple[Shape, ...], ...]
    shapes: list[Shape]
    line: str


def shapes_in(text: str) -> list[Shape]:
    return [tuple(int(n) for n in dims.split(",") if n) for dims in SHAPE.findall(text)]


def collectives(hlo: str) -> Iterator[Collective]:
    """Walk a compiled module from its entry; what two loops call is found in both."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            computations[name] = []
            entry = name if line.startswith("ENTRY ") else entry
        elif name:
            computations[name].append(line)
    todo: list[tuple[str, tuple[tuple[Shape, ...], ...]]] = [(entry, ())]
    seen = set()
    while todo:
        name, loops = todo.pop()
        if (name, loops) in seen:
            continue
        seen.add((name, loops))
        for line in computations[name]:
            if found := COLLECTIVE.search(line):
                # An all-to-all of the CPU has one result per device.
                shapes = shapes_in(found[1])[: 1 if found[2] == "all-to-all" else None]
                yield Collective(found[2], loops, shapes, line.strip())
            loop = WHILE.search(line)
            inside = loops if loop is None else (*loops, tuple(shapes_in(loop[1])))
            called = CALLED.findall(line) + [c.strip(" %") for b in BRANCHES.findall(line) for c in b.split(",")]
            todo += [(other, inside) for other in called]
