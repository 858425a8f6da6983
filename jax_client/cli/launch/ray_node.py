"""How does a host's part of Ray start, and end? As a child under `guard.py`, in a temporary directory of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from jax_client.cli.launch import guard
from jax_client.cli.launch.finding.addresses import joined
from jax_client.cli.launch.plan import Plan

# Ray's sockets lie below it, and a socket's path has at most 107 characters, of which Ray needs some 70.
_LONGEST_PARENT = 20
_LOG = "ray_start.log"
_LAST_LINES = 12
# What Ray's own processes note without need, and a date with the name of a file.
_NOISE = re.compile(r"\[state-dump\]|^\[.* [DI] \d+ \d+\]|^\s*$")
_PREFIX = re.compile(r"^\S+ \S+\t\w+ \w+\.py:\d+ -- ")


class RayNode:
    """Ray on this host: the head on host 0, else a node that has joined it.

    Args:
        plan: of this launch.
        head: the address of host 0.
        own: the address of this host.
    """

    def __init__(self, plan: Plan, head: str, own: str) -> None:
        self.keep_logs = False
        index = plan.places.index
        parent = tempfile.gettempdir()
        self.directory = Path(tempfile.mkdtemp(prefix="jcl-", dir=parent if len(parent) <= _LONGEST_PARENT else "/tmp"))
        place = ["--node-ip-address", own, "--node-name", plan.node_name(index), "--temp-dir", str(self.directory)]
        role = (
            ["--head", "--port", str(plan.port), "--include-dashboard=false", "--no-monitor"]
            if index == 0
            else ["--address", joined(head, plan.port)]
        )
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *place, "--disable-usage-stats", "--block"]
        with (self.directory / _LOG).open("wb") as log:
            # A session of its own: Ctrl-C is for the program.
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(self.directory), *ray],
                env=plan.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether Ray has ended on this host by itself."""
        return self._guard.poll() is not None

    def last_lines(self) -> str:
        """Return what Ray printed last, as one text."""
        try:
            text = (self.directory / _LOG).read_text(errors="replace")
        except OSError:
            return "  (nothing)"
        lines = [_PREFIX.sub("", line) for line in text.splitlines() if not _NOISE.search(line)]
        return "\n".join(f"  Ray: {line}" for line in lines[-_LAST_LINES:])

    def stop(self) -> None:
        """Kill all that Ray started on this host, and wait for its end; its logs go, unless it ended by itself."""
        pipe = self._guard.stdin
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                if self.keep_logs:
                    pipe.write(b"k")
                pipe.close()
        self._guard.wait()
