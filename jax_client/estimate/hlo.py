"""What does a compiled program send between devices, and what does it copy? Its text is read, from the entry down."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    r"|ragged-all-to-all)(-start)?\("
)
_COPY = re.compile(r" = (.*?) (copy|transpose)(?:-start)?\((?!%?broadcast)")  # else it only fills an array
_WHILE = re.compile(r" = .*? while\(.*\bbody=%?([\w.-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Collectives of a program that are alike.

    Attributes:
        kind: such as "all-gather".
        shapes: of the result, on one device, as XLA writes them.
        loops: turns of each loop around it, the outermost first; 0 where the program decides.
        count: of them.
        bytes: of one result.
    """

    kind: str
    shapes: str
    loops: tuple[int, ...]
    count: int
    bytes: int


def traffic(text: str) -> list[Traffic]:
    """Return the collectives of a compiled module, the largest first; what several threads of it share counts once."""
    found: dict[tuple[str, str, tuple[int, ...]], set[str]] = defaultdict(set)
    for line, loops in _lines(text):
        if (match := _COLLECTIVE.search(line)) is None:
            continue
        shapes = _SHAPE.findall(match[1])
        # A start has its operand's shapes before its results'; a permute has contexts behind both.
        if match[3] and len(shapes) > 1 and match[2] != "all-reduce":
            shapes = shapes[1:2] if match[2] == "collective-permute" else shapes[len(shapes) // 2 :]
        channel = _CHANNEL.search(line)
        key = match[2], " ".join(f"{kind}[{dims}]" for kind, dims in shapes), loops
        found[key].add(channel[1] if channel else line)
    rows = [
        Traffic(kind=kind, shapes=shapes, loops=loops, count=len(lines), bytes=_bytes(shapes))
        for (kind, shapes, loops), lines in found.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def copies(text: str, at_least: int) -> list[str]:
    """Return the shapes of the copies and transposes whose result has at least this number of bytes.

    One into a TPU's vector memory is none: what is read from there need not be read from the device's memory.
    """
    found = (m for line, _ in _lines(text) if (m := _COPY.search(line)) and "S(1)" not in m[1].split("}")[0])
    shapes = (f"{m[2]} {_SHAPE.search(m[1])[0]}" for m in found)  # type: ignore[index]
    return [shape for shape in shapes if _bytes(shape) >= at_least]


def argument_bytes(text: str) -> int:
    """Return the bytes of a module's arguments on one device, without what their layouts pad."""
    (layout,) = re.findall(r"entry_computation_layout=\{\((.*?)\)->", text)
    return _bytes(layout)


def _bytes(shapes: str) -> int:
    sizes = ((kind, [int(n) for n in dims.split(",") if n]) for kind, dims in _SHAPE.findall(shapes))
    return sum(_BYTES.get(kind, 4) * math.prod(dims) for kind, dims in sizes)


def _lines(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each line with the turns of the loops around it; what is called from two loops is yielded for both."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            computations[name] = []
            entry = name if line.startswith("ENTRY ") else entry
        elif name:
            computations[name].append(line)
    todo: list[tuple[str, tuple[int, ...]]] = [(entry, ())]
    seen = set()
    while todo:
        name, loops = todo.pop()
        if (name, loops) in seen or name not in computations:
            continue
        seen.add((name, loops))
        for line in computations[name]:
            yield line, loops
            inside = loops
            if _WHILE.search(line):
                turns = _TURNS.search(line)
                inside = (*loops, int(turns[1]) if turns else 0)
            branches = [each.strip(" %") for group in _BRANCHES.findall(line) for each in group.split(",")]
            todo += [(other, inside) for other in _CALLED.findall(line) + branches]
