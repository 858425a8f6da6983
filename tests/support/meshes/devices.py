"""In what environment has a child process simulated devices? In this one's, with one more flag of XLA."""

from __future__ import annotations

import os
from pathlib import Path


def with_devices(count: int) -> dict[str, str]:
    """Return the environment of a child that finds `count` CPU devices, and imports what the tests import."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}
