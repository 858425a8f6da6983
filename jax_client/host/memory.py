"""How does freed memory return to the system? glibc keeps it in its arenas; `give_back` asks it not to."""

from __future__ import annotations

import ctypes
import threading
import time

# Between two times: it visits all that is free.
SECONDS = 2.0

_lock = threading.Lock()
_last = 0.0


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
