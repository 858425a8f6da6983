"""Does the command line make keys that it never shows again, and refuse a file of keys that it cannot trust?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jax_client.server.wire import keys


def test_the_command_prints_a_key_once_and_its_line(cli, tmp_path: Path) -> None:
    made, line = cli("key", "vision", "--admin", "--limit", "sessions=3").out.splitlines()
    assert line == keys.line_of("vision", made, ["admin", "sessions=3"])
    (shown,) = json.loads(cli("key", "audio", "--json").out)
    file = tmp_path / "keys"
    file.write_text(f"{line}\n{shown['line']}\n")
    assert [key.owner.name for key in keys.read_keys(file)] == ["vision", "audio"]
    assert shown["key"] not in shown["line"] and shown["name"] == "audio"
    for arguments in (["Vision"], ["vision", "--limit", "sessions"], ["vision", "--limit", "sessions=x"]):
        refused = cli("key", *arguments)
        assert refused.code == 2 and not refused.out, arguments


def test_a_server_closes_the_file_to_others_and_names_what_is_wrong(cli, tmp_path: Path) -> None:
    file, home = tmp_path / "keys", tmp_path / "home"
    serve = ("serve", "--state-dir", home, "--port", 0, "--api-key-file", file)
    refused = cli(*serve)
    assert refused.code == 1 and str(file) in refused.err and "jax_client key" in refused.err
    file.write_text("vision nothing\n")
    file.chmod(0o644)
    refused = cli(*serve)
    assert refused.code == 1 and "line 1" in refused.err and "mode 0644" in refused.err
    assert file.stat().st_mode & 0o777 == 0o600 and not home.exists()
    refused = cli(*serve, "--api-key", "tml-a")
    assert refused.code == 2 and "--api-key-file are both given" in refused.err
    refused = cli("serve", "--api-key-file", tmp_path, "--port", 0, "--state-dir", home)
    assert refused.code == 1 and "is no file" in refused.err
    refused = cli("serve", "--host", "0.0.0.0", "--port", 0, "--state-dir", home)
    assert refused.code == 2 and "--api-key-file" in refused.err


def test_a_file_that_another_user_owns_is_refused(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is closed now, its owner may write a key into it before the next start."""
    file, home = tmp_path / "keys", tmp_path / "home"
    file.write_text("vision nothing\n")
    file.chmod(0o600)
    other = 12_345
    if os.geteuid() == 0:
        os.chown(file, other, -1)
    else:
        other = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: other + 1)
    refused = cli("serve", "--state-dir", home, "--port", 0, "--api-key-file", file)
    assert refused.code == 1 and not home.exists()
    assert all(word in refused.err for word in (str(file), f"user {other}", "copy it", "chown"))
