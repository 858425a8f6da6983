"""Does the package ask its mesh which platform it runs on, and not the process's default?

What is asked of the default cannot be compiled for another device, nor run beside a second backend.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_code_asks_for_the_default_backend() -> None:
    asks = re.compile(r"\bdefault_backend\(|\bdevice_count\(")
    files = [path for folder in ("jax_client", "models", "losses") for path in (ROOT / folder).rglob("*.py")]
    found = [f"{path.relative_to(ROOT)}: {line}" for path in files for line in asks.findall(path.read_text())]
    assert not found
