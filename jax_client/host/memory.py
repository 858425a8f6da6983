"""How does freed memory return to the system? glibc keeps it in its arenas; `give_back` asks it not to.

Each thread that allocates gets an arena of its own, up to eight for each core, and what one of them has free no other
one uses: `few_arenas` lets the threads share them.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

# Between two times: it visits all that is free.
SECONDS = 2.0
ARENAS, _M_ARENA_MAX = 2, -8

_lock = threading.Lock()
_last = 0.0


def few_arenas() -> None:
    """Have threads that come share their memory's arenas; does nothing without glibc, or if the user has set them."""
    if "MALLOC_ARENA_MAX" not in os.environ and "GLIBC_TUNABLES" not in os.environ:
        option = getattr(ctypes.CDLL(None), "mallopt", None)
        if option is not None:
            option(_M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return free pages of the heap to the system, if it was not done just now; does nothing without glibc."""
    global _last
    if not _lock.acquire(blocking=False):
        return
    try:
        if time.monotonic() - _last < SECONDS:
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _last = time.monotonic()
    except OSError:
        _last = time.monotonic()
    finally:
        _lock.release()
