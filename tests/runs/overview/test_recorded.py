"""What does a run record of itself, in this process, over the wire, and when it is made from another?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

import jax_client
from jax_client.checkpoint.store import CheckpointStore
from jax_client.host.program import error_in_words, program_name
from jax_client.runs.overview.records import RunRow
from jax_client.runs.overview.rows import Overview
from jax_client.runs.results import run_metrics
from jax_client.server.state.server import Server
from support.server.serving import ADAM, KEY, Running, config, data, held_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with held_model(tmp_path_factory.mktemp("model")) as name:
        yield name


def rows(home: Path) -> dict[str, RunRow]:
    assert run_metrics.shared.flush(30)
    return {row.run: row for row in Overview(home).runs()}


def test_a_run_and_the_one_that_continues_it(model: str, tmp_path: Path) -> None:
    with jax_client.ServiceClient(config=config(tmp_path), user_metadata={"name": "the session"}) as service:
        first = service.create_lora_training_client(model, rank=4, user_metadata={"name": "try 1"}).result()
        first.forward_backward(data(), "cross_entropy")
        first.optim_step(ADAM).result()
        jax_client.log({"reward/mean": 0.5})
        path = first.save_state("one").result().path
        later = service.create_training_client_from_state_with_optimizer(path, user_metadata={"kind": "b"}).result()
        found = rows(tmp_path)
        row, resumed = found[first.model_id], found[later.model_id]
        assert (row.name, row.state, row.step, row.pid, row.host) == (
            "try 1", "live", 1, os.getpid(), socket.gethostname(),
        )  # fmt: skip
        assert row.script == program_name() is not None and row.loss is not None and row.loss > 0
        assert (resumed.resumed_from, resumed.parent, resumed.name) == (path, first.model_id, "the session")
        assert row.children == [later.model_id] and resumed.step == 1
        (checkpoint,) = [each for each in Overview(tmp_path).checkpoints() if each.path == path]
        assert checkpoint.loss == pytest.approx(row.loss) and checkpoint.reward == 0.5
        settings = Overview(tmp_path).config(first.model_id)["settings"]
        assert settings["dtype"] == "float32" and settings["state_dir"] == str(tmp_path)
        with pytest.raises(Exception, match="2 open runs"):
            jax_client.log({"a": 1})
        jax_client.log({"a": 1}, run=later)
    found = rows(tmp_path)
    assert {row.state for row in found.values()} == {"done"} and all(row.ended for row in found.values())
    assert "a" in Overview(tmp_path).series(later.model_id, None).names


def test_a_session_over_the_wire_names_its_runs_and_its_end(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    running = Running(Server(config(tmp_path)))
    try:
        service = tinker.ServiceClient(
            base_url=running.url, display_name="cookbook <b>", user_metadata={"script": "rl.py"}
        )
        client = service.create_lora_training_client(model, rank=4)
        client.forward_backward(data(), "cross_entropy").result()
        client.optim_step(ADAM).result()
        (row,) = rows(tmp_path).values()
        assert (row.name, row.script, row.state, row.step) == ("cookbook <b>", "rl.py", "live", 1)
        running.server.live.models.get(row.run, lambda fields: None).evictable.evict()
        (row,) = rows(tmp_path).values()
        assert row.state == "unloaded" and row.checkpoints == 1
        created = row.created
        client.forward_backward(data(), "cross_entropy").result()  # which loads it again
        (row,) = rows(tmp_path).values()
        assert (row.state, row.created, row.script, row.parent) == ("live", created, "rl.py", None)
    finally:
        running.stop()
    (row,) = rows(tmp_path).values()
    assert row.state in ("done", "unloaded"), row


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["-c", "{}"], "python -c"),
        (["train.py"], "train.py"),
        (["-m", "package"], "-m package"),
        (["-m", "package.inner"], "-m package.inner"),
    ],
)
def test_the_program_s_name(command: list[str], name: str, tmp_path: Path) -> None:
    code = "from jax_client.host.program import program_name; print(program_name())"
    (tmp_path / "package").mkdir()
    for file in ("train.py", "package/__init__.py", "package/__main__.py", "package/inner.py"):
        (tmp_path / file).write_text("" if "__init__" in file else code)
    arguments = [part.format(code) for part in command]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == name, done.stderr


def test_errors_in_words() -> None:
    assert error_in_words(ValueError("one\ntwo")) == "ValueError: one"
    assert error_in_words(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_note_of_an_end_is_replaced_and_never_longer_than_its_place(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    claim = store.lock_run("r")
    claim.note_end("signal", "SIGTERM " + "x" * 5_000)
    record = store.lock_record("r")
    assert record is not None and record.held and record.how == "signal" and len(record.text) == 300
    claim.release("closed", "\N{SNOWMAN}" * 1_000)
    record = store.lock_record("r")
    assert record is not None and not record.held and (record.how, record.ended is not None) == ("closed", True)
    again = store.lock_run("r")
    record = store.lock_record("r")
    assert record is not None and record.held and record.ended is None and record.how == ""
    again.release()
