"""Which devices does jax find, does one compute, and with which kernels? `devices` runs this in a child process.

It prints an object of JSON for the devices; with the argument "kernels" it tries these, and prints a second one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Of models in use: (type, head width).
MODELS = (("bfloat16", 128), ("bfloat16", 64), ("float32", 128))


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
    # Packages print on stdout as they are imported; an answer is a line of its own.
    print(f"\n{json.dumps(found)}", flush=True)
    if "kernels" in sys.argv[1:]:
        print(f"\n{json.dumps(kernels())}", flush=True)


def kernels() -> dict[str, Any]:
    """Return with which attention engines would train and sample on all devices, and why not; kernels are tried."""
    import jax.numpy as jnp

    from jax_client.engine.core import paged_check
    from jax_client.engine.core.attention_check import choose, cudnn_version
    from jax_client.selftest.toy import Toy
    from jax_client.sharding import make_mesh

    mesh, found = make_mesh("auto"), []
    for dtype, width in MODELS:
        model = Toy(head_width=width).model()
        choice, paged = choose(mesh, model, jnp.dtype(dtype)), paged_check.choose(mesh, model, jnp.dtype(dtype))
        refused = dict(choice.refused) | ({"the kernel of sampling": paged.refused} if paged.refused else {})
        kind = {"dtype": dtype, "head_width": width, "failed": choice.failed or paged.failed}
        found.append(kind | {"training": choice.attention.name, "sampling": paged.attention.name, "refused": refused})
    return {"kernels": found, "cudnn": cudnn_version() if mesh.devices.flat[0].platform == "gpu" else None}


if __name__ == "__main__":
    main()
