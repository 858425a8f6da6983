"""How does a script keep a part of a page? It writes what stands between two markers, or compares it."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path


def keep(page: Path, markers: tuple[str, str], text: str, *, write: bool) -> int:
    """Write the text into the page, or print where the page differs from it; return 1 if it differs, else 0.

    Args:
        page: that has both markers; the program ends with a message if one is missing.
        markers: before and behind the text.
        text: Markdown, with a line's end behind it.
        write: else it is compared.
    """
    before = page.read_text(encoding="utf-8")
    head, begin, rest = before.partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not begin or not end:
        sys.exit(f"the page lacks {markers[0]} or {markers[1]}")
    after = f"{head}{begin}\n\n{text}\n{end}{tail}"
    if write:
        page.write_text(after, encoding="utf-8")
    elif before != after:
        print(*difflib.unified_diff(before.splitlines(), after.splitlines(), "page", "found", lineterm=""), sep="\n")
        return 1
    return 0
