"""Which module answers which question? Writes docs/how-it-works/map.md from the first docstring line of every module.

With --check the script changes nothing, and exits with 1 where the page is not what the sources say.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "how-it-works" / "map.md"
ROOMS = {
    "jax_client": "What a user imports.",
    "models": "Imported as `jax_client.models`.",
    "losses": "Imported as `jax_client.losses`.",
}
HEAD = """# Map of the modules

Every module's first line is the question that it answers. This page is made of them by `python scripts/make_map.py`;
a test fails where it is out of date.
"""


def first_line(path: Path) -> str:
    """Return the first line of the module's docstring, with nothing that Markdown would take for a table or a tag."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n")[0].replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """Return the page as it should be: a section for every folder, folders and modules in alphabetical order."""
    rooms: dict[Path, list[Path]] = defaultdict(list)
    for top in ROOMS:
        for path in sorted((ROOT / top).rglob("*.py")):
            rooms[path.parent].append(path)
    sections = [HEAD]
    for room in sorted(rooms, key=lambda room: (list(ROOMS).index(room.relative_to(ROOT).parts[0]), room)):
        name = str(room.relative_to(ROOT))
        lines = [f"## `{name}/`", "", ROOMS.get(name) or first_line(room / "__init__.py"), ""]
        modules = [path for path in rooms[room] if path.name != "__init__.py" or name == "jax_client"]
        if modules:
            lines += ["| module | question |", "|---|---|"]
            lines += [f"| `{path.name}` | {first_line(path)} |" for path in modules]
        sections.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(sections)


def main() -> None:
    """Write the page, or compare it with the sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date; run: python scripts/make_map.py")


if __name__ == "__main__":
    main()
