"""Are the SDK's private names all in one module, and are they the names of the SDK that pyproject.toml requires?"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from jax_client.runs import sdk

ROOT = Path(__file__).parents[2]
SDK = ROOT / "jax_client" / "runs" / "sdk.py"
SOURCES = [path for folder in ("jax_client", "models", "losses") for path in sorted((ROOT / folder).rglob("*.py"))]


def modules_of_the_sdk(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tinker")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinker":
            yield node.module


def test_the_bound_is_the_requirement_of_pyproject() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (required,) = (text for text in dependencies if re.match(r"tinker\b", text))
    assert required == f"tinker{sdk.SDK_VERSIONS}"


def test_the_installed_sdk_is_within_the_bound() -> None:
    assert SpecifierSet(sdk.SDK_VERSIONS).contains(metadata.version("tinker"))


@pytest.mark.parametrize("name", sdk.__all__)
def test_the_installed_sdk_has_the_name(name: str) -> None:
    assert getattr(sdk, name) is not None


def test_every_name_is_exported() -> None:
    tree = ast.parse(SDK.read_text())
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted([*imported, "SDK_VERSIONS"]) == sorted(sdk.__all__)


@pytest.mark.parametrize("path", [path for path in SOURCES if path != SDK], ids=lambda p: str(p.relative_to(ROOT)))
def test_other_modules_import_the_public_sdk_only(path: Path) -> None:
    private = set(modules_of_the_sdk(path)) - {"tinker", "tinker.types"}
    assert not private, f"{path.relative_to(ROOT)} imports {sorted(private)}; add the names to runs/sdk.py"
