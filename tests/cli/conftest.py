"""Which fixtures do the tests of the command line share? `cli` runs a command, `home` is a filled state directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_client.cli import main
from support.command_line import WITHOUT_TORCH, Result, fill
from support.server.serving import write_model


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled state directory, which no test changes."""
    return fill(tmp_path_factory.mktemp("filled"))


@pytest.fixture
def home(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the filled directory, which the commands find by the environment."""
    copy = tmp_path / "home"
    shutil.copytree(filled, copy)
    monkeypatch.setenv("JAX_CLIENT_HOME", str(copy))
    return copy


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty directory, with no setting in the environment."""
    for name in [name for name in os.environ if name.startswith("JAX_CLIENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start the command line in a process of its own, without torch."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        home = tmp_path / "home"
        own = {"HOME": home, "DTYPE": "float32", "PRECOMPILE": "0", "COMPILATION_CACHE_DIR": home / "cache"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {f"JAX_CLIENT_{name}": str(own[name]) for name in own}
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
