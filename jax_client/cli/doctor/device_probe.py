"""Which devices does jax find, and does one compute? `devices` runs this in a child process, which prints JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Start jax's backend, run a program on it, print what there is."""
    import jax
    import jax.numpy as jnp

    devices = jax.local_devices()
    total = float(jnp.arange(8, dtype=jnp.float32).sum())
    if total != 28.0:
        sys.exit(f"0 + 1 + ... + 7 is {total} on {devices[0].device_kind}")
    stats = devices[0].memory_stats() or {}
    found = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "memory_bytes": stats.get("bytes_limit"),
    }
    # Packages print on stdout as they are imported; the answer is the last line.
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
