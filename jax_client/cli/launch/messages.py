"""How does `launch` print, where no one reads it any more? An `ssh` that has broken off must not end a host."""

from __future__ import annotations

import os
import sys

from jax_client.cli import stages


def say(text: str) -> None:
    """Print a line on stderr; print nothing more once that has no reader."""
    try:
        stages.say(text)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
