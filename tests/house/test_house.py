"""Do imports run downwards, do the lower floors work without tinker and torch, and does the wheel hold every module?"""

from __future__ import annotations

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

from support.children import STRICT

ROOT = Path(__file__).parents[2]
FLOORS = {
    "jax_client.errors": 0, "jax_client.config": 0, "jax_client.sharding": 0, "jax_client.values": 0,
    "jax_client.process": 0, "jax_client.sqlite_file": 0, "jax_client.threads": 0, "jax_client.interpreter_end": 0,
    "jax_client.host": 0,
    "jax_client.models": 1, "jax_client.losses": 1,
    "jax_client.engine": 2, "jax_client.weights": 2, "jax_client.checkpoint": 2, "jax_client.metrics": 2,
    "jax_client.torch_graph": 2, "jax_client.torch_bridge": 2,
    "jax_client.runs": 3, "jax_client.estimate": 3, "jax_client.selftest": 3,
    "jax_client.clients": 4, "jax_client.server": 4,
    "jax_client.cli": 5,
}  # fmt: skip
SOURCES = [path for folder in ("jax_client", "models", "losses") for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "jax_client" else ("jax_client", *parts))
    return name.removesuffix(".__init__")


def floor(module: str) -> int | None:
    rooms = [room for room in FLOORS if module == room or module.startswith(room + ".")]
    return FLOORS[rooms[0]] if rooms else None


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    own = floor(module_name(path))
    for name in imports(ast.parse(path.read_text())):
        there = floor(name)
        assert own is None or there is None or there <= own, f"{path} is on floor {own} and imports {name}"
        if own is not None and own <= 2:
            root = name.split(".")[0]
            assert root != "tinker" and (root != "torch" or path.name == "torch_bridge.py"), f"{path} imports {name}"
        assert name.split(".")[0] not in ("pickle", "dill", "cloudpickle", "marshal"), f"{path} imports {name}"


def test_lower_floors_import_without_tinker_and_torch() -> None:
    modules = [module_name(path) for path in SOURCES if (floor(module_name(path)) or 0) <= 2]
    modules = [name for name in modules if floor(name) is not None]
    code = "import importlib, sys; sys.modules['tinker'] = sys.modules['torch'] = None\n"
    code += f"for name in {modules!r}: importlib.import_module(name)"
    subprocess.run([*STRICT, "-c", code], check=True)


def test_import_starts_no_backend() -> None:
    code = "import sys, jax_client; heavy = {'jax', 'torch', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"  # noqa: E501
    subprocess.run([*STRICT, "-c", code], check=True)


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {module_name(path.parent / "__init__.py") for path in SOURCES}
    assert sorted(listed) == sorted(there)
