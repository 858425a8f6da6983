"""How does a child process have simulated devices? By this process's environment, with one more flag of XLA."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.children import STRICT


def with_devices(count: int) -> dict[str, str]:
    """Return the environment of a child that finds `count` CPU devices, and imports what the tests import."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}


def run_on(mesh: Mapping[str, int], code: str, directory: Path, *arguments: str) -> Any:
    """Run code on as many devices as a mesh has, with the mesh, a directory and more as arguments.

    Returns:
        What it printed last, read as JSON.
    """
    env = with_devices(math.prod(mesh.values()))
    command = [*STRICT, "-c", code, json.dumps(mesh), str(directory), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
