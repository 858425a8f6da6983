"""What does the program do that the tests of samplers end in every way? It samples, prints its processes, and waits.

Usage: program.py MODEL HOW, where HOW is "return", "wait" or "close".
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np

from jax_client.config import EngineConfig
from jax_client.engine.core.requests import GenerationRequest
from jax_client.runs.lifecycle.base_models import open_engine
from jax_client.weights.read.source import resolve


def below(pid: int) -> list[int]:
    """Return the processes that descend from one."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, new = [pid], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found[1:]


def main() -> None:
    config = EngineConfig(dtype="float32", compilation_cache_dir="", precompile=False, samplers=1)
    opened = []
    # As a client does: the thread that loads ends.
    load = threading.Thread(target=lambda: opened.append(open_engine(resolve(sys.argv[1]), config)[0]))
    load.start()
    load.join()
    (engine,) = opened
    request = GenerationRequest(tokens_T=np.arange(1, 9, dtype=np.int32), max_tokens=4, seed=1)
    engine.generate(None, request).result()
    print("processes", *below(os.getpid()), flush=True)
    if sys.argv[2] == "close":
        engine.close()
        print("left", *below(os.getpid()), flush=True)
    elif sys.argv[2] == "wait":
        engine.generate(None, GenerationRequest(tokens_T=np.arange(1, 9, dtype=np.int32), max_tokens=400, seed=1))
        threading.Event().wait(60)


if __name__ == "__main__":
    main()
