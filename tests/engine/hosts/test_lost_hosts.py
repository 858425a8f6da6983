"""What happens when a host dies, hangs, or is told to end? Nothing acknowledged is lost, and no process is left."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

import jax_client
from support.hosts.child import model_of
from support.hosts.run import Loop, loop

KILLED = [
    ("forward", 3, 0.0),
    ("step", 2, 0.0),
    ("sample", 2, 0.0),
    ("save", 1, 0.0),
    ("forward", 1, 0.5),  # while it compiles
    ("sample", 1, 0.5),
]


def _check_end(child: Loop, within: float) -> None:
    """Check the end of a child of which a host was lost, and that its newest checkpoint has all that it was told."""
    code, seconds = child.end(within + 15)
    assert code == os.EX_TEMPFAIL, child.errors()[-4000:]
    assert seconds < within, seconds
    errors = child.errors()
    assert "cannot continue with fewer" in errors
    deadline = time.monotonic() + 10
    while (left := child.left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    if not child.acknowledged:
        return
    (path,) = set(re.findall(r"Run \S+ (tinker://\S+)\.", errors))
    model_of("llama_tied", child.directory / "again")
    config = jax_client.EngineConfig(state_dir=child.directory / "state", dtype="float32", autosave_minutes=None)
    with jax_client.ServiceClient(config=config) as service:
        run = service.create_rest_client().get_weights_info_by_tinker_path(path).result()
        assert run.lora_rank == 4
        client = service.create_training_client_from_state_with_optimizer(path).result()
        data = _data()
        client.forward_backward(data, "cross_entropy").result()
        metrics = client.optim_step(_adam()).result().metrics
    assert metrics is not None
    # A step may be done and not told yet.
    assert metrics["step:max"] - 1 in (child.acknowledged, child.acknowledged + 1)


def _data() -> list[jax_client.types.Datum]:
    from support import number_hashes
    from support.golden_cases import CASES

    return number_hashes.datums(CASES["llama_tied"])


def _adam() -> jax_client.types.AdamParams:
    from support import number_hashes

    return number_hashes.ADAM


def test_a_killed_host(tmp_path: Path) -> None:
    with loop(tmp_path / "run", "llama_tied", {"fsdp": 2}) as child:
        child.wait_for("forward", 2)
        os.kill(child.followers[0], signal.SIGKILL)
        _check_end(child, within=30)


@pytest.mark.faults
@pytest.mark.parametrize("repeat", range(3))
@pytest.mark.parametrize(("verb", "count", "delay"), KILLED)
def test_a_host_killed_in_each_verb(verb: str, count: int, delay: float, repeat: int, tmp_path: Path) -> None:
    with loop(tmp_path / "run", "llama_tied", {"fsdp": 2}) as child:
        child.wait_for(verb, count)
        time.sleep(delay * (1 + repeat))
        os.kill(child.followers[0], signal.SIGKILL)
        _check_end(child, within=30)


@pytest.mark.faults
@pytest.mark.parametrize(("verb", "count"), [("forward", 3), ("sample", 2), ("step", 2), ("save", 1)])
def test_a_host_that_hangs(verb: str, count: int, tmp_path: Path) -> None:
    with loop(tmp_path / "run", "llama_tied", {"fsdp": 2}) as child:
        child.wait_for(verb, count)
        os.kill(child.followers[0], signal.SIGSTOP)
        _check_end(child, within=30)


@pytest.mark.faults
def test_the_leading_hosts_death_ends_the_others(tmp_path: Path) -> None:
    with loop(tmp_path / "run", "llama_tied", {"fsdp": 4}, hosts=4) as child:
        child.wait_for("forward", 2)
        child.process.kill()
        deadline = time.monotonic() + 30
        while (left := child.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left


@pytest.mark.faults
def test_all_are_told_to_end(tmp_path: Path) -> None:
    with loop(tmp_path / "run", "llama_tied", {"fsdp": 2}) as child:
        child.wait_for("acknowledged", 2)
        for pid in [*child.followers, child.process.pid]:
            os.kill(pid, signal.SIGTERM)
        code, _ = child.end(45)
        assert code == -signal.SIGTERM, child.errors()[-4000:]
        # A step may be done and not told yet.
        (saved,) = map(int, re.findall(r"saved step (\d+) of run", child.errors()))
        assert child.acknowledged <= saved <= child.acknowledged + 1
        assert not child.left()
