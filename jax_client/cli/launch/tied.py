"""How does the program hear that its `launch` was killed? This program becomes it, once the kernel is told to say so.

`python tied.py PARENT PROGRAM [ARGUMENT]...` ends with SIGTERM, at which a program saves, when the process PARENT dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, program: list[str]) -> int:
    """Become the program; return a shell's exit code if it cannot be executed."""
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before that was set
        return 128 + signal.SIGTERM
    try:
        os.execvp(program[0], program)
    except OSError as error:
        print(f"error: {program[0]}: {error.strerror}.", file=sys.stderr)
        return 126


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
