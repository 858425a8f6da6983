"""Which tests run? Those marked `full`, `faults` or `aot` only with the option of that name.

They take minutes and say nothing new on most changes.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from jax_client.runs.lifecycle import autosave

# Many files compile the same small programs: what one process of this run has compiled, the others find. Before jax is
# imported, which reads it then; child processes inherit it.
if CACHE_MADE := "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_client-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Compiling was half of the time of these tests, and they run what they compile a few times. Without LLVM's
# optimizations, and with the older code for fusions where XLA still has it, it takes a third as long. With --full
# programs are compiled as they are for users.
if "PYTEST_XDIST_WORKER" not in os.environ and "--full" not in sys.argv and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Sessions of the SDK whose servers are gone complain as long as the process lives, in other tests' logs.
for name in ("internal_client_holder", "telemetry"):
    logging.getLogger(f"tinker.lib.{name}").setLevel(logging.ERROR)

# Its failed assertions say what they compared, as those of the tests do.
pytest.register_assert_rewrite(
    "support.faults.fault_children",
    "support.faults.fault_history",
    "support.checkpoints",
    "support.command_line",
    "support.bad_calls",
    "support.weights.exports",
    "support.weights.loading",
)
# Files that take long go first: of two processes that share the files, neither is then left with one at the end.
LONG = (
    "real_model",
    "resume",
    "sharding",
    "golden",
    "export_in_torch",
    "export",
    "faults",
    "fault_refusals",
    "memory_bounds",
    "gradients",
    "checkpoint",
)
TALLY = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full")
    parser.addoption("--faults", action="store_true", help="also run the tests marked faults")
    parser.addoption("--aot", action="store_true", help="also run the tests marked aot")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = [marker for marker in ("full", "faults", "aot") if not config.getoption(f"--{marker}")]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in unwanted)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Counter()


def pytest_unconfigure() -> None:
    if CACHE_MADE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--faults"):
        for what, number in config.stash[TALLY].items():
            terminalreporter.write_line(f"{number:7,} {what}")


@pytest.fixture(params=[pytest.param(False, id="short"), pytest.param(True, id="every", marks=pytest.mark.faults)])
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether a test visits all points, or a few."""
    return request.param


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """What the tests of faults went through, printed at the end with --faults."""
    return request.config.stash[TALLY]


@pytest.fixture(autouse=True)
def no_autosave(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save only what a test saves; those of autosaving itself ask for the fixture `autosaving`."""
    if "autosaving" not in request.fixturenames:
        watch = autosave.watch
        monkeypatch.setattr(autosave, "watch", lambda checkpointer, minutes: watch(checkpointer, None))
        monkeypatch.setattr(autosave, "handle_sigterm", lambda: None)


@pytest.fixture
def autosaving() -> None:
    """Let runs be saved by themselves."""


@pytest.fixture
def plain_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace orbax by a writer of raw files, for tests of the protocol at very many points."""

    def write(directory: Path, arrays: dict[str, np.ndarray]) -> None:
        directory.mkdir()
        for i, (key, array) in enumerate(arrays.items()):
            shape = "_".join(map(str, array.shape))
            (directory / f"{i}-{key.replace('/', '+')}-{shape}").write_bytes(array.tobytes())

    def read(directory: Path) -> dict[str, np.ndarray]:
        arrays = {}
        for path in directory.iterdir():
            _, key, shape = path.name.split("-")
            values = np.frombuffer(path.read_bytes(), np.float32)
            arrays[key.replace("+", "/")] = values.reshape([int(size) for size in shape.split("_")])
        return arrays

    monkeypatch.setattr("jax_client.checkpoint.arrays.write", write)
    monkeypatch.setattr("jax_client.checkpoint.arrays.read", read)
