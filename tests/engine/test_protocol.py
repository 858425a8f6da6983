"""Do the engine and the tests' fake one have the operations that the Protocol names, and is that a small number?"""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from jax_client.engine import protocol
from jax_client.engine.engine import Engine
from jax_client.engine.hosts.samplers.engine import EngineWithSamplers
from jax_client.engine.hosts.samplers.monitor import SamplersMonitor
from jax_client.engine.monitor import EngineMonitor
from support.fake_engine import FakeEngine, FakeMonitor


def operations(of: type[Any]) -> dict[str, inspect.Signature]:
    own = {name: value for name, value in vars(of).items() if not name.startswith("_")}
    return {name: inspect.signature(value) for name, value in own.items() if inspect.isfunction(value)}


@pytest.mark.parametrize(
    ("wanted", "implementation"),
    [
        (protocol.Engine, Engine),
        (protocol.Engine, FakeEngine),
        (protocol.Engine, EngineWithSamplers),
        (protocol.Monitor, EngineMonitor),
        (protocol.Monitor, FakeMonitor),
        (protocol.Monitor, SamplersMonitor),
    ],
)
def test_operations_are_those_of_the_protocol(wanted: type[Any], implementation: type[Any]) -> None:
    """Names, parameters, defaults and annotations."""
    has = operations(implementation)
    assert {name: has.get(name) for name in operations(wanted)} == operations(wanted)


def test_an_engine_has_at_most_a_dozen_operations() -> None:
    assert len(operations(protocol.Engine)) <= 12


def test_the_fake_engine_has_no_operation_that_engines_lack() -> None:
    assert operations(FakeEngine).keys() == operations(protocol.Engine).keys()


def test_naming_the_types_imports_no_jax() -> None:
    code = "import sys, jax_client.engine.protocol; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
