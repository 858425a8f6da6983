"""Does everything that puts arrays on an engine's mesh, or fetches them, go through one place?"""

from __future__ import annotations

import re
from pathlib import Path

ENGINE = Path(__file__).parents[3] / "jax_client" / "engine"
# Put on a device of this host alone: probes of kernels, and views of one CPU's weights.
ALONE = {
    "core/matmul_benchmark.py": "one device, before there is an engine",
    "core/paged_check.py": "one device of this host",
    "sample/device/weights.py": "views of the weights on one CPU",
}
FORBIDDEN = re.compile(r"jax\.device_(put|get)\(|make_array_from|jnp\.\w+\([^)]*device=|process_index\(|\.addressable_")


def test_arrays_come_and_go_through_one_room() -> None:
    found = {
        str(path.relative_to(ENGINE))
        for path in ENGINE.rglob("*.py")
        if path.parent.name != "devices" or path.parent.parent.name == "sample"
        if FORBIDDEN.search(path.read_text())
    }
    # The probe's poison, and what a following host says it is.
    assert found - ALONE.keys() - {"core/attention_check.py", "hosts/follower.py"} == set()
    assert found >= ALONE.keys(), "an exception is no longer needed"
