"""Which nodes does a list of Slurm's name? `a[1-3,07],b` stands for a1, a2, a3, a07 and b."""

from __future__ import annotations

import re

# More than any list that is meant.
_MOST = 100_000
_PIECE = re.compile(r"\[([^\[\]]*)\]|([^,\[\]]+)")


def expand_nodes(text: str) -> tuple[str, ...]:
    """Return the names, in the list's order.

    Raises:
        ValueError: the text is no such list; the message says where.
    """
    names: list[str] = []
    for item in _items(text):
        if not item:
            raise ValueError(f"{text!r} has an empty name")
        found = [""]
        at = 0
        while at < len(item):
            piece = _PIECE.match(item, at)
            if piece is None:
                raise ValueError(f"{text!r} cannot be read at {item[at:]!r}")
            ends = [piece[2]] if piece[1] is None else _numbers(piece[1], text)
            if len(found) * len(ends) > _MOST:
                raise ValueError(f"{text!r} names more than {_MOST:,} nodes")
            found = [start + end for start in found for end in ends]
            at = piece.end()
        names += found
    return tuple(names)


def _items(text: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _numbers(text: str, whole: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None:
            raise ValueError(f"{whole!r} has {part!r} in brackets, which is no number and no range")
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if not first <= last < first + _MOST:
            raise ValueError(f"{whole!r} has the range {part!r}, which does not ascend or is too long")
        numbers += [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    return numbers
