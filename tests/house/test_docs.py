"""Do the pages name what there is? Files, modules and types that a page mentions exist, and the map is current."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS_OF_PAGES = ("docs", "jax_client", "models", "losses", "scripts")
PAGES = [*sorted(ROOT.glob("*.md")), *(p for f in FOLDERS_OF_PAGES for p in sorted((ROOT / f).rglob("*.md")))]
# A page may leave out the package's own folder: `engine/train/packing.py`.
FOLDERS = ("", "jax_client/")
FILE = re.compile(r"\b(?:[\w.-]+/)+[\w-]+\.(?:py|sh|npz)\b")
# What the guides have a reader add.
EXAMPLES = {
    "losses/awr.py", "jax_client.losses.awr",
    "models/families/seed_oss.py", "jax_client.models.families.seed_oss",
}  # fmt: skip
MODULE = re.compile(r"\bjax_client(?:\.[A-Za-z_]\w*)+")


def without_addresses(text: str) -> str:
    return re.sub(r"\w+://\S+", "", text)


def exists(name: str) -> bool:
    """Import a dotted name, module by module, then attribute by attribute."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    named = set(FILE.findall(without_addresses(path.read_text()))) - EXAMPLES
    missing = [name for name in named if not any((ROOT / folder / name).exists() for folder in FOLDERS)]
    assert not missing, f"{path.relative_to(ROOT)} names files that are not there: {sorted(missing)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_modules_exist(path: Path) -> None:
    named = set(MODULE.findall(path.read_text())) - EXAMPLES
    missing = [name for name in named if not exists(name)]
    assert not missing, f"{path.relative_to(ROOT)} names what cannot be imported: {sorted(missing)}"


def test_the_types_of_the_reference_exist() -> None:
    types = importlib.import_module("jax_client.types")
    named = set(re.findall(r"`types\.(\w+)`", (ROOT / "docs" / "reference" / "types.md").read_text()))
    assert named and not [name for name in named if not hasattr(types, name)]


def test_the_map_is_current() -> None:
    script = ROOT / "scripts" / "make_map.py"
    check = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
