"""Which changes of the source do the tests not notice? Runs cosmic-ray over the losses and the packing.

The package is copied into one tree, build/mutate/GROUP, since models/ and losses/ lie outside of it here. cosmic-ray
changes one place of that copy at a time and runs the group's tests. A change of an annotation, or of the star of an
argument, is no mutant and is skipped.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors.md")
FORK_SERVER = Path(__file__).with_name("fork_server.py")
LEAST_KILLED = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Modules that the same tests cover.

    Attributes:
        modules: paths in the copied tree, where models/ and losses/ lie inside the package.
        tests: paths under tests/, the fastest first; arguments of pytest.
        seconds: a run that takes longer counts as killed: a loop that has lost its end.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    seconds: int


GROUPS = {
    "losses": Group(
        modules=tuple(
            f"jax_client/losses/{path.name}"
            for path in sorted((ROOT / "losses").glob("*.py"))
            if path.name not in ("__init__.py", "logprob_head.py")
        ),
        tests=("tests/losses/test_losses.py", "tests/losses/test_gspo.py", "tests/losses/test_policy_ratio.py"),
        seconds=120,
    ),
    "head": Group(
        modules=("jax_client/losses/logprob_head.py",),
        tests=("tests/losses/test_logprob_head.py",),
        seconds=180,
    ),
    "packing": Group(
        modules=("jax_client/engine/train/packing.py",),
        tests=("tests/engine/train/test_packing_layout.py", "tests/engine/train/test_packing.py"),
        seconds=40,
    ),
}


def make_tree(name: str) -> Path:
    """Copy what the group needs; keep the copy and its results where nothing has changed since."""
    tree = ROOT / "build" / "mutate" / name
    group = GROUPS[name]
    tests = ["tests/support", *group.tests]
    contents = hashlib.sha256(repr(group).encode())
    for top in ("jax_client", "models", "losses", *tests):
        for path in sorted((ROOT / top).rglob("*.py")) or [ROOT / top]:
            contents.update(path.read_bytes())
    stamp = tree / "stamp"
    if stamp.exists() and stamp.read_text() == contents.hexdigest():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "jax_client", tree / "jax_client")
    for folder in ("models", "losses"):
        shutil.copytree(ROOT / folder, tree / "jax_client" / folder)
    for test in tests:
        copy = shutil.copytree if (ROOT / test).is_dir() else shutil.copyfile
        (tree / test).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / test, tree / test)
    (tree / "pytest.ini").write_text(
        "[pytest]\npythonpath = . tests\naddopts = --import-mode=importlib\nfilterwarnings = error\n"
    )
    stamp.write_text(contents.hexdigest())
    return tree


def environment(tree: Path) -> dict[str, str]:
    """Return the variables of a test run: a compilation cache that all mutants share, and quick compiles."""
    return dict(os.environ) | {
        "JAX_COMPILATION_CACHE_DIR": str(tree / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }


Place = tuple[int, int]  # line from 1, column from 0


def places(source: str) -> tuple[list[tuple[Place, Place]], list[tuple[Place, Place]]]:
    """Return where annotations stand, and where the operators of two operands do, between these."""
    annotations: list[ast.expr | None] = []
    operators = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            annotations.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            annotations.append(node.returns)
        elif isinstance(node, ast.BinOp):
            operators.append((end(node.left), (node.right.lineno, node.right.col_offset)))
        elif isinstance(node, ast.AugAssign):
            operators.append((end(node.target), (node.value.lineno, node.value.col_offset)))
    return [((node.lineno, node.col_offset), end(node)) for node in annotations if node is not None], operators


def end(node: ast.expr) -> Place:
    """Return the place behind an expression."""
    return node.end_lineno or 0, node.end_col_offset or 0


def skip_what_is_no_mutant(tree: Path, database: WorkDB) -> None:
    """Mark the items in annotations, which nothing reads, and those that replace the star of an argument."""
    known: dict[Path, Any] = {}
    for item in database.work_items:
        (change,) = item.mutations
        if change.module_path not in known:
            known[change.module_path] = places((tree / change.module_path).read_text())
        annotations, operators = known[change.module_path]
        binary = change.operator_name.startswith("core/ReplaceBinaryOperator")
        if any(start <= change.start_pos <= stop for start, stop in annotations) or (
            binary and not any(start <= change.start_pos <= stop for start, stop in operators)
        ):
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def changed_line(diff: str) -> str:
    """Return the first line that a mutant has instead of the source's."""
    lines = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    return lines[0] if lines else "(line removed)"


def listed() -> set[str]:
    """Return the survivors that scripts/mutation/survivors.md gives a reason for, as `file: line`."""
    blocks = re.findall(r"```text\n(.*?)```", SURVIVORS.read_text(), re.DOTALL)
    return {line.strip() for block in blocks for line in block.splitlines()}


def report(name: str, database: WorkDB) -> bool:
    """Print the score and the survivors; return whether both are as they should be."""
    tested = [result for _, result in database.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    survivors = [result for result in tested if not result.is_killed]
    lines = []
    for survivor in survivors:
        diff = survivor.diff or ""
        path = next(line[4:].strip() for line in diff.splitlines() if line.startswith("+++"))
        lines.append(f"{Path(path).name}: {changed_line(diff)}")
    unknown = [line for line in lines if line not in listed()]
    killed = len(tested) - len(survivors)
    print(f"{name}: {killed} of {len(tested)} mutants killed ({killed / len(tested):.1%})")
    for line in unknown:
        print(f"  survives, and is not in scripts/mutation/survivors.md: {line}")
    return killed >= LEAST_KILLED * len(tested) and not unknown


@contextmanager
def fork_server(tree: Path) -> Iterator[list[str]]:
    """Run the server of the test runs; yield the command to which the arguments of pytest are added."""
    path, python = tree / "forks", str(ROOT / ".venv-test" / "bin" / "python")
    path.unlink(missing_ok=True)
    command = [python, str(FORK_SERVER), path.name]
    with subprocess.Popen(command, cwd=tree, env=environment(tree), stdin=subprocess.PIPE) as server:
        while not path.exists() and server.poll() is None:
            time.sleep(0.1)
        yield [python, "-S", "-E", *command[1:]]


def mutate(name: str) -> bool:
    """Run one group; return whether its tests notice enough."""
    tree, group = make_tree(name), GROUPS[name]
    config, session = tree / "session.toml", tree / "session.sqlite"
    tool = str(Path(sys.executable).parent / "cosmic-ray")
    pytest = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider", *group.tests]
    # The tests pass without a change, and fill the compilation cache.
    python = str(ROOT / ".venv-test" / "bin" / "python")
    subprocess.run([python, "-m", "pytest", *pytest], cwd=tree, env=environment(tree), check=True)
    with fork_server(tree) as command:
        tests = [*command, *pytest]
        config.write_text(
            f"[cosmic-ray]\nmodule-path = {list(group.modules)}\ntimeout = {group.seconds}.0\nexcluded-modules = []\n"
            f"test-command = '{shlex.join(tests)}'\n[cosmic-ray.distributor]\nname = 'local'\n"
        )
        if not session.exists():
            subprocess.run([tool, "init", config.name, session.name], cwd=tree, check=True)
            with use_db(session, WorkDB.Mode.open) as database:
                skip_what_is_no_mutant(tree, database)
        subprocess.run([tool, "exec", config.name, session.name], cwd=tree, check=True)
    with use_db(session, WorkDB.Mode.open) as database:
        return report(name, database)


if __name__ == "__main__":
    results = [mutate(name) for name in sys.argv[1:] or GROUPS]
    sys.exit(not all(results))
