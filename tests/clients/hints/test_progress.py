"""Does a plain program say what it waits for? Loading and compiling are a line on stderr, live on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError
from jax_client.runs import progress
from jax_client.runs.progress import Teller, Waiting
from support.server.serving import write_model

PROGRAM = """
import sys
import jax_client
from jax_client import types
from jax_client.runs import progress

progress.LEAST_SECONDS = progress.TICK_SECONDS = 0.01
config = jax_client.EngineConfig(state_dir={home!r}, dtype="float32", autosave_minutes=None, progress={on})
with jax_client.ServiceClient(config=config) as service:
    client = service.create_lora_training_client({model!r}, rank=2).result()
    inputs = {{"target_tokens": [2, 3], "weights": [1.0, 1.0]}}
    datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)
    print(client.forward_backward([datum], "cross_entropy").result().metrics["tokens:sum"])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def run(model: str, home: Path, *, on: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(home=str(home), model=model, on=on)
    own = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", progress.VARIABLE)}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=own | environment, timeout=60
    )


def test_a_program_says_on_stderr_what_it_loads_and_compiles(model: str, tmp_path: Path) -> None:
    done = run(model, tmp_path)
    assert done.returncode == 0 and done.stdout == "2.0\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("jax_client: ")]
    assert re.fullmatch(rf"jax_client: loading {model}.*", lines[0]), done.stderr
    assert any(re.fullmatch(rf"jax_client: loaded {model} in \d+\.\d s", line) for line in lines), lines
    assert any(re.fullmatch(rf"jax_client: compiling \w+ \(.*\) of {model}", line) for line in lines), lines
    assert re.fullmatch(r"jax_client: compiled \d+ programs?.* in \d+\.\d s", lines[-1]), lines


@pytest.mark.full
def test_a_program_whose_setting_turns_it_off_is_silent(model: str, tmp_path: Path) -> None:
    assert "jax_client: " not in run(model, tmp_path, on=False).stderr


def test_a_setting_the_environment_and_pytest_turn_it_off(monkeypatch: Any) -> None:
    on, off = EngineConfig(), EngineConfig(progress=False)
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    assert not progress.wanted(on)  # this is a test of pytest
    for value, told in (("1", True), ("0", False), ("off", False), ("", False)):
        monkeypatch.setenv(progress.VARIABLE, value)
        assert progress.wanted(on) is told and not progress.wanted(off)
    monkeypatch.delenv(progress.VARIABLE)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert progress.wanted(on) and not progress.wanted(off)
    with pytest.raises(BadRequestError, match=r"EngineConfig.progress is 'yes'; give True or False"):
        EngineConfig(progress="yes")  # type: ignore[arg-type]


def waiting(text: str, ended: str | None = None) -> Waiting:
    return Waiting(model="m", text=text, ended=lambda: ended)


def test_what_is_short_is_not_told_and_what_is_long_is_repeated(capsys: Any, monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    teller = Teller()

    def during(seconds: float, told: Waiting | None) -> None:
        end = now[0] + seconds
        while now[0] < end:
            teller.tick(told)
            now[0] += 0.25

    during(0.75, waiting("compiling step (8)", "never"))
    during(2.0, None)
    assert capsys.readouterr().err == "" and not teller.tells
    during(20.0, waiting("loading 1/2 GB", "loaded m"))
    during(0.5, None)  # between two programs nothing is told
    during(3.0, waiting("compiling step (8)", "compiled 2 programs"))
    during(1.0, None)
    assert capsys.readouterr().err.splitlines() == [
        "jax_client: loading m 1/2 GB",
        "jax_client: loading m 1/2 GB, 16 s",
        "jax_client: loaded m in 19.8 s",
        "jax_client: compiling step (8) of m",
        "jax_client: compiled 2 programs in 2.8 s",
    ]
    during(3.0, waiting("loading"))
    teller.tick(None, last=True)  # it failed: nothing was loaded
    assert capsys.readouterr().err == "jax_client: loading m\n"


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_shows_one_row(plain: bool, monkeypatch: Any) -> None:
    main, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    (monkeypatch.setenv if plain else lambda *_: monkeypatch.delenv("NO_COLOR", raising=False))("NO_COLOR", "1")
    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.0)
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        teller = Teller()
        for _ in range(3):
            teller.tick(waiting("compiling a program with a long name", "compiled 1 program"))
        teller.tick(None, last=True)
        shown = ""
        while not shown.endswith("\n"):  # the kernel hands it on in parts
            shown += os.read(main, 10_000).decode()
    os.close(main)
    rows = shown.split("\r\x1b[2K")[1:]
    assert len(rows) == 4 and ("\x1b[2m" in shown) is not plain
    assert all(len(re.sub(r"\x1b\[\dm|\r", "", row)) < 40 for row in rows[:3])
    assert re.fullmatch(r"\r?jax_client: compiled 1 program in \d\.\d s\r\n", rows[3]), rows


def test_the_thread_ends_when_nothing_is_in_flight(monkeypatch: Any) -> None:
    class Session:
        def in_flight(self) -> bool:
            return not done.is_set()

        def waiting_for(self) -> None:
            asked.set()

    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "IDLE_SECONDS", 0.05)
    done, asked, session = threading.Event(), threading.Event(), Session()
    progress.watch(session)
    thread = progress._thread
    assert thread is not None and asked.wait(5)
    done.set()
    thread.join(5)
    assert not thread.is_alive() and progress._thread is None
