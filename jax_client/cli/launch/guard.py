"""How does all that Ray starts on a host end with `launch`, however `launch` ends? This program runs Ray, and kills it.

`python guard.py DIRECTORY COMMAND...` runs the command until it ends, or until stdin is closed: by the process that
started this one, or by the kernel when that process was killed. Then every process that came of the command is killed,
also those whose parents are gone. The directory, with the logs, is removed unless the command ended by itself, or a
byte came before stdin was closed. The file needs the standard library alone, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# linux/prctl.h
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_POLL_SECONDS = 0.2
_STOP_SECONDS = 20.0


def main(directory: str, command: list[str]) -> int:
    """Run the command; return its exit code, 0 where stdin was closed first."""
    keep = True
    # A signal that is meant for `launch` often reaches all processes of a host (a job that is cancelled, a machine that
    # shuts down). Ray must live until the program has saved; its processes inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # For the case that this process is killed. It has one thread, so Python may run between fork and exec.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    )
    try:
        while child.poll() is None:
            if select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
                keep = bool(os.read(sys.stdin.fileno(), 1))
                return 0
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        _kill_all()
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


def _kill_all() -> None:
    """Kill and wait for every process below this one."""
    end = time.monotonic() + _STOP_SECONDS
    while (below := _below(os.getpid())) and time.monotonic() < end:
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _below(root: int) -> list[int]:
    """Return the processes that came of one, without itself."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
