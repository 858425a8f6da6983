"""Is the house small enough to read: no circles, short files and functions, few `Any`, nothing assigned upwards?"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES, MEDIAN_LINES, MOST_ANY = 12, 450, 80, 130, 500


@cache
def tracked() -> list[Path]:
    """Return the files that git knows, or all files of a tree without git."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    folders = ("jax_client", "models", "losses", "scripts", "tests")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]


def python_files(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


PACKAGE = python_files("jax_client", "models", "losses")
CODE = python_files("jax_client", "models", "losses", "scripts", "tests")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "jax_client" else ("jax_client", *parts))
    return name.removesuffix(".__init__")


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


@cache
def imports() -> dict[str, set[str]]:
    """Return the package's modules that each module imports, those under TYPE_CHECKING and in functions included."""
    names = {module_name(path) for path in PACKAGE}
    found = {}
    for path in PACKAGE:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imported.add(inner if inner in names else node.module or "")
        found[module_name(path)] = (imported & names) - {module_name(path)}
    return found


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other."""
    reached = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = set(graph.get(waiting.pop(), ())) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached if b in reached[a] and a in reached[b])) for a in reached}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def test_circles_are_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == [["b", "c"]]


def test_no_module_imports_itself_through_others() -> None:
    assert circles(imports()) == []


def packages() -> list[str]:
    return sorted({module_name(path) for path in PACKAGE if path.name == "__init__.py"})


@pytest.mark.parametrize("parent", packages())
def test_no_circle_between_the_rooms_of_a_folder(parent: str) -> None:
    rooms = [name for name in packages() if name.rpartition(".")[0] == parent]
    room_of = lambda module: next((room for room in rooms if module == room or module.startswith(room + ".")), None)  # noqa: E731
    graph, reasons = defaultdict(set), defaultdict(list)
    for module, imported in imports().items():
        for other in imported:
            here, there = room_of(module), room_of(other)
            if here and there and here != there:
                graph[here].add(there)
                reasons[here, there].append(f"{module} imports {other}")
    found = circles(graph)
    edges = {edge: why for edge, why in reasons.items() if any(set(edge) <= set(group) for group in found)}
    assert not found, edges


def test_a_folder_holds_at_most_a_dozen_files() -> None:
    inside = [
        path
        for path in tracked()
        if path.relative_to(ROOT).parts[0] in ("jax_client", "models", "losses", "scripts", "tests")
    ]
    held = Counter(path.parent.relative_to(ROOT) for path in inside)
    assert {str(folder): count for folder, count in held.items() if count > MOST_FILES} == {}


def test_files_are_short() -> None:
    assert [str(path.relative_to(ROOT)) for path in CODE if line_count(path) > MOST_LINES] == []
    assert statistics.median(line_count(path) for path in PACKAGE) <= MEDIAN_LINES


def test_functions_are_short() -> None:
    long = {}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}


def test_nothing_is_assigned_into_another_module() -> None:
    """Such an assignment reaches upwards what a floor may not import."""
    found = []
    for path in PACKAGE:
        tree = ast.parse(path.read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                modules |= {name for name, module in inner.items() if module in imports()}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id in modules
                ):
                    found.append(f"{path.relative_to(ROOT)}:{target.lineno} {ast.unparse(target)}")
    assert found == []


def test_types_are_named() -> None:
    used = {path: len(re.findall(r"\bAny\b", path.read_text())) for path in PACKAGE}
    assert sum(used.values()) <= MOST_ANY, Counter({str(p.relative_to(ROOT)): n for p, n in used.items()}).most_common(
        9
    )
    lifecycle = ROOT / "jax_client" / "runs" / "lifecycle"
    assert {path.name: n for path, n in used.items() if n and path.is_relative_to(lifecycle)} == {}
