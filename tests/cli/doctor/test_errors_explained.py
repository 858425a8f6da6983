"""Do errors teach? The command and the page explain each class, in the same words, and a terminal shows colours."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_client import errors
from jax_client.cli.doctor.errors import EXPLAINED, page
from support.command_line import WITHOUT_TORCH

ROOT = Path(__file__).parents[3]
CLASSES = [
    name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, errors.JaxClientError)
]


def in_words(text: str) -> str:
    return " ".join(text.split())


def test_every_class_has_an_anchor_with_the_words_of_the_command(cli: Any) -> None:
    assert list(EXPLAINED) == CLASSES
    file = ROOT / page("").partition("#")[0]
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", file.read_text(), flags=re.M | re.S))
    printed = cli("doctor", "--errors")
    for name in CLASSES:
        found, text = EXPLAINED[name], in_words(sections[name])
        for words in (found.cause, found.example, found.advice):
            assert in_words(words) in text, (name, words)
            assert words in printed.out, (name, words)
        assert page(name) == f"docs/reference/errors.md#{name.lower()}" and page(name) in printed.out
    assert printed.code == 0 and "OK" not in printed.out.split()


def test_one_class_is_printed_and_a_wrong_name_is_told_the_nearest(cli: Any) -> None:
    done = cli("doctor", "--errors", "DoesNotFitError")
    assert done.out.startswith("DoesNotFitError\n") and "RequestFailedError\n" not in done.out
    (found,) = json.loads(cli("doctor", "--errors", "NotFoundError", "--json").out)
    assert found["error"] == "NotFoundError" and found["advice"] == EXPLAINED["NotFoundError"].advice
    assert "did you mean DoesNotFitError?" in cli("doctor", "--errors", "DoesNotFitsError").error(2)


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_shows_colours_unless_no_color_is_set(plain: bool, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm", "JAX_CLIENT_HOME": str(tmp_path)} | ({"NO_COLOR": "1"} if plain else {})
    for arguments in (("doctor", "--errors", "NotFoundError"), ("checkpoint", "info", "tinker://a:train:0/weights/b")):
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        subprocess.run(command, stdout=terminal, stderr=terminal, env=environment, timeout=60)
        shown = os.read(main, 10_000).decode()
        assert ("\x1b[" in shown) is not plain, shown
    assert "error:" in shown
    os.close(main)
    os.close(terminal)
