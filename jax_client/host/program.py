"""Which program is this process, as people know it? Its file's name, the module that `-m` named, or a notebook."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_client.errors import first_line

MAX_NAME = 100


def program_name() -> str | None:
    """Return the program's name, such as "train.py", "-m package.train" or "notebook"; None where there is none."""
    if "ipykernel" in sys.modules:
        # The notebook server names the file there, in newer versions.
        return _short(Path(os.environ.get("JPY_SESSION_NAME") or "notebook").name)
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        return _short(f"-m {spec.name.removesuffix('.__main__')}")
    first = sys.argv[0] if sys.argv else ""
    if first in ("-c", "-", ""):
        return "interactive" if is_interactive() else {"-c": "python -c", "-": "standard input"}.get(first)
    return _short(Path(first).name)


def name_of_command(command: Sequence[str]) -> str | None:
    """Return the name that `program_name` would give in the process that a command starts, as far as its words say.

    Args:
        command: the program and its arguments, such as ("python", "-u", "train.py").
    """
    program = Path(command[0]).name
    if not re.fullmatch(r"(python|pypy)[\d.]*", program):
        return _short(program)
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            return "standard input" if word == "-" else _short(Path(word).name)
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(words, None)
            continue
        # Python takes its options in clusters, as in -um; the last may have a value, which may be joined to it.
        for i, letter in enumerate(word):
            if letter in "mcWX":
                value = word[i + 1 :] or next(words, "")
                if letter in "mc":
                    module = value.removesuffix(".__main__")
                    return "python -c" if letter == "c" else _short(f"-m {module}") if module else None
                break
    return "standard input"


def is_interactive() -> bool:
    """Return whether a person types the program line by line: an error does not end it then."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules or bool(sys.flags.interactive)


def unhandled_error() -> BaseException | None:
    """Return the exception by which the main program ended; None where it ended otherwise, or has not ended."""
    if is_interactive():
        return None
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def error_in_words(error: BaseException) -> str:
    """Return an exception's class and the first line of its text."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"


def _short(name: str) -> str | None:
    text = "".join(c for c in name if c.isprintable())
    return text[:MAX_NAME] or None
