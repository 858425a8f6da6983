"""Is this machine one host of a TPU slice of several? Asked before jax's backend starts: it would wait for the others.

One process cannot compute on the chips of other hosts, so such a machine is refused, in words, instead of hanging.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from jax_client.errors import UnsupportedError

# As the cloud's machines answer it, and as jax reads it: entries "?:?:ADDRESS", separated by commas.
ATTRIBUTES = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA = ATTRIBUTES + "worker-network-endpoints"
METADATA_SECONDS = 2.0
ADVICE = (
    "Run the program on all of them with 'jax_client launch -- PROGRAM'; or take a slice of one host (v5e-8, v6e-8, "
    "v5p-8, or smaller); or use this host's chips alone: set TPU_PROCESS_BOUNDS=1,1,1, TPU_CHIPS_PER_PROCESS_BOUNDS to "
    "their layout (2,2,1 for four chips) and TPU_VISIBLE_CHIPS to their numbers (0,1,2,3)."
)
# Device files of TPUs.
_CHIPS = ("accel*", "vfio/[0-9]*")


def refuse_part_of_a_slice(environ: Mapping[str, str] | None = None) -> None:
    """Raise UnsupportedError on a machine whose chips are a part of a slice, unless jax was told to use them alone."""
    hosts = slice_hosts(os.environ if environ is None else environ)
    if len(hosts) > 1:
        shown = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
        raise UnsupportedError(
            f"this machine is one of the {len(hosts)} hosts of a TPU slice ({shown}), and one process computes on one "
            f"host. {ADVICE}"
        )


def slice_hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the hosts of the slice whose chips jax would use here; none where it is told to use this host's alone.

    Kubernetes sets TPU_WORKER_HOSTNAMES; a virtual machine with TPUs asks its metadata.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return ()
    if (bounds := environ.get("TPU_PROCESS_BOUNDS", "")) and _product(bounds) == 1:
        return ()
    if (named := environ.get("TPU_WORKER_HOSTNAMES")) is not None:
        return tuple(name for name in named.split(",") if name)
    return _metadata_hosts() if any(any(Path("/dev").glob(files)) for files in _CHIPS) else ()


def _product(bounds: str) -> int:
    return math.prod(int(size) for size in re.findall(r"\d+", bounds))


def worker_number() -> str:
    """Return this machine's number among the hosts of its slice, as its metadata says it; "" where there is none."""
    return _attribute("agent-worker-number").strip()


def metadata_of_tpu(name: str, environ: Mapping[str, str]) -> str:
    """Return what the metadata of a virtual machine with TPUs says of a variable; "" for nothing.

    It is asked only where the hosts are found by it, too.
    """
    if "TPU_WORKER_HOSTNAMES" in environ or not slice_hosts(environ):
        return ""
    found = re.search(rf"^{re.escape(name)}:\s*'?([^'\n]*)'?\s*$", _attribute("tpu-env"), re.MULTILINE)
    return found[1].strip() if found else ""


@functools.cache
def _metadata_hosts() -> tuple[str, ...]:
    """Return what the machine's metadata says, none where there is no metadata."""
    listed = _attribute("worker-network-endpoints")
    return tuple(entry.split(":")[-1] for entry in listed.split(",") if entry.strip())


def _attribute(name: str) -> str:
    request = urllib.request.Request(ATTRIBUTES + name, headers={"Metadata-Flavor": "Google"})
    # The address is the machine's own: no proxy knows it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError, ValueError), opener.open(request, timeout=METADATA_SECONDS) as answer:
        return answer.read(2**16).decode()
    return ""
