"""Which devices does this machine have, for an estimate? A child process starts jax, as it does for the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from jax_client.errors import RequestFailedError

if TYPE_CHECKING:
    from jax_client.estimate.chips import Machine

START_SECONDS = 60.0


def this_machine() -> Machine:
    """Return the devices that jax finds here.

    Raises:
        RequestFailedError: jax does not start, as where another process has the devices.
    """
    from jax_client.estimate.chips import machine_of

    # Else the child would take three quarters of the memory of a GPU on which another process may train.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-P", "-m", "jax_client.cli.doctor.probes.devices"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        found = None
    if found is None:
        raise RequestFailedError(
            "jax does not start on this machine, so its devices are not known; 'jax_client doctor' says why. Or name a "
            "machine: --on v5e-8.",
            category="user",
        )
    return machine_of(found["platform"], found["kind"], found["count"], found["memory_bytes"])
