"""Does pyproject.toml declare what the package imports, and nothing else?"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where the import's name is not the distribution's.
DISTRIBUTIONS = {"google": "protobuf", "orbax": "orbax-checkpoint"}
# What another dependency needs to do something for us, without an import of our own.
NEEDED_INDIRECTLY = {
    "jinja2": "transformers renders chat templates with it",
    "httptools": "uvicorn.protocols.http.httptools_impl parses requests with it",
}
# Beyond the tools and the accelerators of jax, whose extras no module imports.
IMPORTED_EXTRAS = ("torch", "cluster")


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def imported() -> dict[str, str]:
    """Return the distributions that the package imports, each with a file that does."""
    found: dict[str, str] = {}
    for folder in ("jax_client", "models", "losses"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                for root in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"jax_client"}:
                    found[distribution(DISTRIBUTIONS.get(root, root))] = str(path.relative_to(ROOT))
    return found


def declared() -> set[str]:
    extras = [text for extra in IMPORTED_EXTRAS for text in PROJECT["optional-dependencies"][extra]]
    return {distribution(text) for text in (*PROJECT["dependencies"], *extras)}


def test_what_is_imported_is_declared() -> None:
    missing = {name: path for name, path in imported().items() if name not in declared()}
    assert not missing, f"imported, but not in pyproject.toml's dependencies: {missing}"


def test_what_is_declared_is_imported_or_needed_indirectly() -> None:
    unused = declared() - set(imported()) - set(NEEDED_INDIRECTLY)
    assert not unused, f"declared in pyproject.toml, but imported nowhere: {sorted(unused)}"


def test_the_version_is_written_once() -> None:
    version = PROJECT["version"]
    repeated = [
        str(path.relative_to(ROOT))
        for folder in ("jax_client", "models", "losses", "docs", "scripts")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".md", ".sh", ".toml"} and f'"{version}"' in path.read_text()
    ]
    assert not repeated, f"{version} is pyproject.toml's alone; jax_client.__version__ reads the installed metadata"
