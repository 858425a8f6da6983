"""How does a check ask what could hang or end the process? In a child process, for a limited time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

from jax_client.cli.output import shown

# What a child process has printed.
Answer: TypeAlias = dict[str, Any]
# A killed process stays while its driver call does not return; the report does not wait for it.
_KILL_SECONDS = 5


def ask(
    module: str, *arguments: str, timeout: float, environment: Mapping[str, str], starts: str
) -> tuple[Answer | None, str]:
    """Run a module that prints objects of JSON, each on a line of its own.

    What was printed before the time was over counts.

    Args:
        module: its name.
        arguments: of its command line.
        timeout: seconds.
        environment: of the process.
        starts: what has to start there, for messages.

    Returns:
        The objects as one and "", or None and why there is none.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    output, errors, late = "", "", False
    try:
        output, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, errors = child.communicate(timeout=_KILL_SECONDS)
    answers = [json.loads(line) for line in output.splitlines() if line.startswith('{"')]
    if answers and (late or child.returncode == 0):
        return {name: value for answer in answers for name, value in answer.items()}, ""
    if late:
        return None, f"{starts} did not start within {timeout:g} seconds"
    said = errors.strip().splitlines() or [f"exit code {child.returncode}"]
    return None, f"{starts} does not start: {shown(said[-1])}"
