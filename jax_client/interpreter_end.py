"""How does a process end that must not be finalised? In a copy of itself, or without freeing anything.

Two things make finalisation fatal. A daemon thread that comes back from C++ code to a finalising interpreter is ended
by unwinding its stack through destructors that may not throw: the process aborts (before Python 3.14). And a fork that
frees its parent's device arrays waits for, or uses, threads that only the parent has.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import time
import warnings

# Most that the copy of a process may take for its own end.
COPY_SECONDS = 10.0

_abandoned = False
_inherited: list[object] = []


def abandon_threads() -> None:
    """Have this process end without being finalised, with the exit code and the output that it would have had."""
    global _abandoned
    _abandoned = True


def keep_in_fork(*inherited: object) -> None:
    """Never free these objects in this forked process, not even when it ends."""
    _inherited.extend(inherited)


def _last_callback() -> None:
    if _inherited:
        _free_nothing(_libc())
    elif _abandoned:
        _end_as_copy()


# This module is imported early, so that nearly every other callback has run by then.
atexit.register(_last_callback)


def _libc() -> ctypes.PyDLL | None:
    """Return the C library where it can end a process with the code that `exit` was called with."""
    # PyDLL: a call does not release the interpreter's lock.
    library = ctypes.PyDLL(None)
    return library if hasattr(library, "on_exit") else None


def _end_as_copy() -> None:
    """End with the exit code of a copy of this process, which has no thread but the main one and is finalised.

    Nothing tells the exit code to Python code before the interpreter has ended. Where there is no copy, or it fails,
    this returns, and the process ends as it would have.
    """
    libc = _libc()
    if libc is None:
        return
    _flush_files()
    libc.fflush(None)
    # Python and jax warn of forks beside threads.
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        copy = os.fork()
    except RuntimeError:
        copy = _fork(libc)
    except OSError:
        return
    if copy == 0:
        _free_nothing(libc)
        return
    if copy > 0 and (status := _wait_for(copy)) is not None:
        if os.WIFEXITED(status):
            os._exit(os.WEXITSTATUS(status))
        if os.WTERMSIG(status) == signal.SIGINT:  # so Python ends after an interrupt that nothing caught
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


def _fork(libc: ctypes.PyDLL) -> int:
    """Do what `os.fork` does, which Python 3.12.0 to 3.12.2 refuse at this time; -1 where it fails."""
    api = ctypes.pythonapi
    # Inside the fork: a copy that ran any Python code first could hand the interpreter to a thread that it has not.
    libc.__register_atfork(None, None, api.PyOS_AfterFork_Child, None)
    api.PyOS_BeforeFork()
    copy = libc.fork()
    if copy:
        api.PyOS_AfterFork_Parent()
    return copy


def _free_nothing(libc: ctypes.PyDLL | None) -> None:
    """Have the rest of finalisation, and the C library's `exit`, free nothing; only the exit code is still decided."""
    if libc is not None:
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
    _flush_files()
    gc.freeze()
    modules = dict(sys.modules)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(modules))
    # Callbacks that come later may still import from the standard library.
    for name in modules:
        if name.partition(".")[0] not in sys.stdlib_module_names:
            del sys.modules[name]


def _flush_files() -> None:
    """Write out what the program's open files hold, as their destructors would."""
    for each in gc.get_objects():
        if issubclass(type(each), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with contextlib.suppress(OSError, ValueError):
                each.flush()


def _wait_for(child: int) -> int | None:
    """Return the status of a child process, None if it does not end."""
    deadline = time.monotonic() + COPY_SECONDS
    while time.monotonic() < deadline:
        # A Ctrl-C reaches the copy as well.
        with contextlib.suppress(KeyboardInterrupt):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
