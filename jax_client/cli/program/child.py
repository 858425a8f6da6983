"""How does a program run as a child, and what becomes of the signals that arrive while it runs?

Each signal is passed on to the program. It stays in this process's group, so that it can read from the terminal.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from typing import NoReturn

import click

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit codes
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Child:
    """The program, and the signals that arrived before it started and while it ran.

    Args:
        umask: of the program, -1 for this process's own.
    """

    def __init__(self, umask: int = -1) -> None:
        self._umask = umask
        self._process: subprocess.Popen[bytes] | None = None
        self._relayed: set[int] = set()
        self.received: list[int] = []

    @property
    def hurried(self) -> bool:
        """Whether a signal came after which the machine may be switched off soon."""
        return bool({signal.SIGTERM, signal.SIGHUP} & set(self.received))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over until the body ends; those that arrive before the program starts are for it too."""
        # Signals that this process was started to ignore (nohup) are ignored by the program too.
        heard = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, program: list[str], environment: Mapping[str, str]) -> int:
        """Start the program, wait for its end, and return the exit code that a shell would give."""
        with self.listening():
            try:
                self._process = subprocess.Popen(program, env=environment, umask=self._umask)
            except OSError as error:
                refuse(program[0], error.strerror or str(error), NOT_EXECUTABLE)
            for number in list(self.received):
                self._pass_on(number)
            code = self._process.wait()
            self._process = None
        return code if code >= 0 else 128 - code

    def relay(self, number: int) -> None:
        """Give the program a signal that another host received, unless it knows already that it is to end."""
        if number in self.received or self.hurried:
            return
        self._relayed.add(number)
        self.received.append(number)
        if self._process is not None:
            self._process.send_signal(number)

    def _handle(self, number: int, _: object) -> None:
        # One that is sent to all hosts arrives here twice.
        known = number in self._relayed
        self._relayed.discard(number)
        if known:
            return
        self.received.append(number)
        if self._process is not None:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        process = self._process
        if process is None:
            return
        if number == signal.SIGINT and self.received.count(number) > 1:
            process.kill()
        elif number != signal.SIGINT or not _in_foreground():
            process.send_signal(number)


def check_program(name: str) -> None:
    """End with a shell's exit code if there is no such program."""
    if shutil.which(name) is None:
        refuse(name, "there is no such program, or it is not executable", NOT_FOUND)


def refuse(program: str, why: str, code: int) -> NoReturn:
    """Print why a program cannot be started, and end with a shell's exit code."""
    click.echo(f"error: {program}: {why}.", err=True)
    raise click.exceptions.Exit(code)


def _in_foreground() -> bool:
    """Return whether Ctrl-C reaches the program directly, as it reaches the terminal's whole foreground group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
