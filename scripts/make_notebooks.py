"""How are the notebooks in docs/notebooks/ made from scripts/examples/notebooks/? Run this after a change.

A source is a Python file with cells: `# %%` begins one with code, `# %% [markdown]` one with text, in comments.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES, NOTEBOOKS = ROOT / "scripts/examples/notebooks", ROOT / "docs/notebooks"
_MARKDOWN = "[markdown]"


def notebook_of(source: str) -> str:
    """Return the notebook of a source, as text of nbformat 4.5, without outputs."""
    cells = []
    for number, part in enumerate(re.split(r"^# %%", source, flags=re.MULTILINE)[1:]):
        head, _, body = part.partition("\n")
        lines = body.strip("\n").splitlines()
        cell: dict[str, object] = {"id": f"cell-{number}", "metadata": {}}
        if head.strip() == _MARKDOWN:
            lines = [re.sub("^# ?", "", line) for line in lines]
            cell |= {"cell_type": "markdown"}
        else:
            lines = [re.sub(r"\s*# fmt: skip$", "", line) for line in lines]
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(cell | {"source": [*(f"{line}\n" for line in lines[:-1]), *lines[-1:]]})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def written() -> dict[Path, str]:
    """Return the text of each notebook by its path."""
    return {
        NOTEBOOKS / f"{source.stem}.ipynb": notebook_of(source.read_text(encoding="utf-8"))
        for source in sorted(SOURCES.glob("*.py"))
    }


def main() -> int:
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
