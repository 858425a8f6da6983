"""How do tests run `jax_client launch` on several hosts? Each is a loopback address of this machine, with a Ray."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.command_line import WITHOUT_TORCH

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
_MARK = "LAUNCH_TEST"


class Launches:
    """Launches that were started, by host.

    Args:
        directory: for what they print.
        hosts: how many there are.
    """

    def __init__(self, directory: Path, hosts: int = 2) -> None:
        self.names = ADDRESSES[:hosts]
        self.port = free_port()
        self.token = secrets.token_hex(16)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._directory = directory
        self._mark = secrets.token_hex(8)
        self._sessions: set[int] = set()
        self._logs: set[str] = set()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, index: int, *program: str, options: tuple[str, ...] = (), **environment: str) -> None:
        """Start the command on a host; `environment` is added to that of the process."""
        own = {"RAY_AUTH_TOKEN": self.token, "JAX_PLATFORMS": "cpu", _MARK: self._mark, "HOME": str(self._directory)}
        given = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_", "TPU_"))}
        arguments = ["launch", "--hosts", ",".join(self.names), "--host-index", str(index), "--port", str(self.port)]
        with (self._directory / f"{index}.txt").open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", WITHOUT_TORCH, *arguments, *options, "--", *program],
                env=given | own | environment,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes[index] = process
        self._started.append(process)

    def start_all(self, *program: str, options: tuple[str, ...] = ()) -> None:
        """Start the command on every host."""
        for index in range(len(self.names)):
            self.start(index, *program, options=options)

    def printed(self, index: int) -> str:
        """Return what the launch of a host, and its program, have printed."""
        return (self._directory / f"{index}.txt").read_text()

    def wait_for(self, index: int, text: str, seconds: float = 120) -> None:
        """Wait until a host has printed a text."""
        self.until(lambda: text in self.printed(index), f"host {index} prints {text!r}", seconds)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait for a condition; fail with what all hosts printed."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in {seconds} s: {what}\n{self.all_printed()}"
            time.sleep(0.1)

    def all_printed(self) -> str:
        """Return what all hosts printed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self._directory.glob("*.txt")))

    def codes(self, seconds: float = 120) -> list[int]:
        """Wait for the end of all launches; return their exit codes, by host."""
        self.find()
        self.until(lambda: all(each.poll() is not None for each in self.processes.values()), "all end", seconds)
        return [self.processes[index].returncode for index in sorted(self.processes)]

    def find(self) -> dict[int, str]:
        """Return the processes that came of these launches, with their command lines."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                # Some change their titles, which overwrites the environment that is shown; they keep their sessions.
                if f"{_MARK}={self._mark}".encode() in (path / "environ").read_bytes():
                    self._sessions.add(int(session))
                if int(session) in self._sessions and state != "Z":
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(path.name)] = command.strip()
                    self._logs |= set(re.findall(r"--temp-dir (/tmp/\S+)", command))
        return found

    def ray_of(self, index: int) -> list[int]:
        """Return the processes of Ray's node of a host."""
        found = self.find()
        guards = [
            pid for pid, command in found.items() if "guard.py" in command and f" {self.names[index]} " in command
        ]
        sessions = {os.getsid(pid) for pid in guards}
        return [pid for pid in found if pid not in guards and os.getsid(pid) in sessions]

    def close(self) -> dict[int, str]:
        """Kill what is left; return what that was, after a moment in which it could end by itself."""
        end = time.monotonic() + 5
        while (left := self.find()) and time.monotonic() < end and all(p.poll() is not None for p in self._started):
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
        for directory in self._logs:  # of a Ray that was killed
            shutil.rmtree(directory, ignore_errors=True)
        return left


def free_port() -> int:
    """Return a port that nothing uses, and that Ray gives to none of its workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port
