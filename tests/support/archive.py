"""How does the package get into an archive, from which Python imports it? In the layout of its wheel."""

from __future__ import annotations

import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write_archive(path: Path) -> Path:
    """Write the package's modules into a zip file; return its path."""
    with zipfile.ZipFile(path, "w") as file:
        for folder, parent in (("jax_client", ""), ("models", "jax_client/"), ("losses", "jax_client/")):
            for source in sorted((ROOT / folder).rglob("*.py")):
                file.write(source, f"{parent}{source.relative_to(ROOT)}")
    return path
