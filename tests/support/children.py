"""How does a test start a Python of its own? With warnings as errors, but for what jax says of a half-written file."""

from __future__ import annotations

import sys

# All processes of a run share one compilation cache, and jax does not write its files in one step: who reads one that
# another process writes just then is warned of it, and compiles.
STRICT = (sys.executable, "-W", "error", "-W", "default:Error reading persistent compilation cache")
