"""How is a curve drawn in a terminal? With braille dots, two by four of them in each character."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLANK = 0x2800
# The bit of each dot, by its row from above and its column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLOCKS = " ▁▂▃▄▅▆▇█"


def chart(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """Return the lines of a curve, the largest and the smallest value beside the first and the last line.

    Args:
        values: finite, in order; evenly spread over the width.
        width, height: characters, of which the numbers take some.
    """
    if not values:
        return ["(nothing yet)"] + [""] * (height - 1)
    low, high = min(values), max(values)
    labels = [f"{high:.4g}", f"{low:.4g}"]
    margin = max(len(label) for label in labels)
    columns = max(2, width - margin - 1)
    cells = _draw(values, low, high, columns, height)
    lines = []
    for row, cell in enumerate(cells):
        label = labels[0] if row == 0 else labels[1] if row == height - 1 else ""
        lines.append(f"{label:>{margin}} " + "".join(chr(_BLANK + bits) for bits in cell))
    return lines


def _draw(values: Sequence[float], low: float, high: float, columns: int, height: int) -> list[list[int]]:
    cells = [[0] * columns for _ in range(height)]
    dots = [_row(value, low, high, height * 4) for value in _spread(values, columns * 2)]
    before = dots[0]
    for x, y in enumerate(dots):
        # A step of the curve is a vertical line: a spike of one point is seen.
        for dot in range(min(before, y), max(before, y) + 1):
            cells[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        before = y
    return cells


def _row(value: float, low: float, high: float, rows: int) -> int:
    # Halves, because the whole difference of two finite numbers may be none.
    span = high / 2 - low / 2
    share = (value / 2 - low / 2) / span if span else 0.5
    return min(rows - 1, max(0, round((1 - share) * (rows - 1))))


def _spread(values: Sequence[float], count: int) -> list[float]:
    """Return `count` values: of several that fall together, the one that is farthest from the one before."""
    chosen: list[float] = []
    for x in range(count):
        start = x * len(values) // count
        part = values[start : max(start + 1, (x + 1) * len(values) // count)]
        before = chosen[-1] if chosen else part[0]
        chosen.append(max(part, key=lambda value: abs(value / 2 - before / 2)))
    return chosen


def bar(share: float, width: int) -> str:
    """Return a bar that is filled to a share of its width."""
    share = min(1.0, max(0.0, share if math.isfinite(share) else 0.0))
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return (_BLOCKS[8] * full + (_BLOCKS[rest] if full < width else "")).ljust(width)
