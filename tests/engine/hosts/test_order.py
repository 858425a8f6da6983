"""Do all hosts launch the same programs in the same order, whatever several clients ask for at once?"""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_client.engine.devices.verbs import Call, Gather, LaunchLog
from support.hosts.run import run_json


def _call(**changes: object) -> Call:
    fields: dict[str, object] = {"number": 1, "engine": 1, "program": "add", "static": {}, "arguments": ({"a": 3}, 4)}
    return Call(**(fields | {"first": 5} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"number": 2}, {"program": "zeros"}, {"arguments": ({"a": 4}, 3)}, {"first": 6}])
def test_the_log_tells_launches_apart(change: dict[str, object]) -> None:
    one, same, other = LaunchLog(), LaunchLog(), LaunchLog()
    one.add(_call())
    same.add(_call())
    other.add(_call(**change))
    assert one.digest == same.digest != other.digest
    for log in (one, other):
        log.add(Gather(2, (5,), 6))
    assert one.digest != other.digest, "a launch is told apart for good"


@pytest.mark.faults
def test_three_clients_at_once(tmp_path: Path) -> None:
    found = run_json(tmp_path / "run", 2, 1, "llama_tied", {"fsdp": 2}, "500")
    assert not found["failed"]
    assert found["others"] == [found["own"]]
    assert len(found["own"]) == 16
