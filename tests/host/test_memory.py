"""Do threads share the arenas of glibc's heap where they were told to, and not where the user has set that?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import ctypes, threading
from jax_client.host.memory import few_arenas

few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fdopen.restype = ctypes.c_void_p, ctypes.c_void_p
together = threading.Barrier(8)

def allocate():
    together.wait()
    for _ in range(100):
        libc.malloc(5_000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(out))
libc.fflush(ctypes.c_void_p(out))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("setting", "few"), [(None, True), ("5", False)])
def test_threads_share_arenas(setting: str | None, few: bool) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    env |= {} if setting is None else {"MALLOC_ARENA_MAX": setting}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout.count("<heap nr=") <= 2) == few
