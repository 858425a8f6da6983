"""What is a program called by the words that start it?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jax_client.host.program import name_of_command

NAME = "import jax_client.host.program as p; print(p.program_name())"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python train.py", "train.py"),
        ("/usr/bin/python3.12 -u loops/train.py a=b", "train.py"),
        ("python -m package.train -m x", "-m package.train"),
        ("python -um package.train", "-m package.train"),
        ("python -mpackage.__main__", "-m package"),
        ("python -W error -X dev -Iu x/y.py -c", "y.py"),
        ("python -Werror -- train.py", "train.py"),
        ("python --check-hash-based-pycs always x.py", "x.py"),
        ("python -c 1 x.py", "python -c"),
        ("python -c", "python -c"),
        ("python -m", None),
        ("python -", "standard input"),
        ("python", "standard input"),
        ("./train.sh --fast", "train.sh"),
        ("torchrun train.py", "torchrun"),
        ("pythonic.py", "pythonic.py"),
    ],
)
def test_a_command_has_the_name_of_its_program(command: str, name: str | None) -> None:
    assert name_of_command(command.split()) == name


@pytest.mark.parametrize("words", [["FILE"], ["-c", NAME], ["-um", "a_module"], ["-"]])
def test_the_process_has_the_same_name(words: list[str], tmp_path: Path) -> None:
    for file in ("a script.py", "a_module.py"):
        (tmp_path / file).write_text(NAME)
    words = [str(tmp_path / "a script.py") if word == "FILE" else word for word in words]
    said = subprocess.run([sys.executable, *words], input=NAME, capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout.strip() == name_of_command([sys.executable, *words]), said.stderr
