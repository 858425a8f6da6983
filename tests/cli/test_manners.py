"""How does a command end and look: exit codes, one line for an error, tables, quick imports?"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import jax_client
from jax_client.cli import output
from support.command_line import LATER, RUN, python

CHECKPOINT_COMMANDS = ("list", "info", "verify", "delete", "ttl", "export", "import")


def test_usage_is_explained_in_a_line(cli):
    assert "No such option '--frob'. See 'jax_client runs list --help'" in cli("runs", "list", "--frob").error(2)
    assert "No such command" in cli("frobnicate").error(2)
    for arguments in ((), ("run",), ("runs",), ("checkpoint",)):
        done = cli(*arguments)
        assert (done.code, done.out) == (2, "") and done.err.startswith("Usage: ")
    assert cli("--version").out == f"jax_client {jax_client.__version__}\n"
    assert "--state-dir" in cli("checkpoint", "list", "-h").out


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(28, "No space left on device"), 1, "No space left"),
        (ModuleNotFoundError("No module named 'numpy'"), 3, "jax_client doctor"),
        (ValueError("a\nbug"), 1, "ValueError: a bug. This should not happen"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_other_errors_are_a_line_and_a_code(cli, home, monkeypatch, error, code, text):
    def fail(home: Path, logs: object) -> None:
        raise error

    monkeypatch.setattr("jax_client.cli.runs.listing.open_overview", fail)
    done = cli("runs", "list")
    assert done.code == code and text in done.err and "Traceback" not in done.err
    if code != 130:
        assert "Traceback" in cli("--debug", "runs", "list").err


def test_a_terminal_gets_a_styled_table(cli, home, monkeypatch, capfd):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = cli("checkpoint", "list").out
    assert "\x1b[1m" in shown
    # Whole, although it is longer than any terminal: it will be copied.
    assert LATER in shown
    output.print_table(("NAME",), [("[red]x[/red]",)])
    assert "[red]x[/red]" in capfd.readouterr().out


def test_sizes_and_times_for_people():
    assert [output.human_size(size) for size in (0, 1023, 1024, 1536 * 1024, 250 * 2**20, 3 * 2**40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "250 MiB", "3.0 TiB",
    ]  # fmt: skip
    now = time.time()
    times = {
        0: "just now",
        -90: "1 min ago",
        -7200: "2 h ago",
        -86400: "1 day ago",
        -(10**8): "3 years ago",
        7300: "in 2 h",
    }
    for offset, text in times.items():
        assert output.human_time(output.iso_time(now + offset)).endswith(f"({text})")
    assert (output.human_time(None), output.iso_time(0.0)) == ("-", "1970-01-01T00:00:00Z")
    assert output.shown("\x1b[2J") == r"'\x1b[2J'"


def test_nothing_heavy_is_imported(home):
    script = (
        "import sys",
        "from jax_client.cli import main",
        "code = main({arguments})",
        "heavy = {banned} & set(sys.modules)",
        "sys.exit(str(heavy) if heavy or code else 0)",
    )
    light = {"jax", "tinker", "transformers", "orbax", "torch"}
    cases = [
        (arguments, light) for arguments in (["runs", "list"], ["checkpoint", "list", "--json"], ["runs", "info", RUN])
    ]
    commands = [
        [],
        ["run"],
        ["runs"],
        ["checkpoint"],
        ["doctor"],
        ["runs", "list"],
        *([["checkpoint", c] for c in CHECKPOINT_COMMANDS]),
    ]
    cases += [([*command, "--help"], light | {"numpy", "rich", "pydantic"}) for command in commands]
    code = ["import subprocess, sys"]
    for arguments, banned in cases:
        text = "\n".join(script).format(arguments=arguments, banned=banned)
        code.append(f"done = subprocess.run([sys.executable, '-c', {text!r}], capture_output=True, text=True)")
        code.append(f"assert done.returncode == 0, ({arguments!r}, done.stderr)")
    done = python(*code)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error(home):
    code = "import sys; from jax_client.cli import main; sys.exit(main(['runs', 'list']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert (child.stderr.read(), child.wait(60)) == ("", 1)
    child.stderr.close()


def test_a_warning_is_printed_once():
    """absl, which orbax brings, adds a handler of its own while a command imports it."""
    done = python(
        "import logging, click",
        "from jax_client import cli",
        "@cli.group.command('warn')",
        "def warn():",
        "    logging.basicConfig()",
        "    logging.getLogger('jax_client.weights').warning('a rank is high')",
        "assert cli.main(['warn']) == 0",
        "logging.getLogger('jax_client.weights').warning('after it')",
    )
    assert done.stderr == "warning: a rank is high\nWARNING:jax_client.weights:after it\n"
