"""Where do a server's settings come from, and how is a wrong one explained?"""

from __future__ import annotations

from dataclasses import fields

import pytest

from jax_client.cli.server_options import SHARED
from jax_client.config import EngineConfig

pytestmark = pytest.mark.usefixtures("clean_environment")
KEY = "tml-not-to-be-seen"


def test_a_flag_goes_before_the_environment_the_file_and_the_default(cli, tmp_path, monkeypatch):
    file = tmp_path / "server.toml"
    file.write_text(
        'port = 1\nhost = "::1"\nremat = "full"\nmodel = ["a/b", "c/d"]\nprecompile = false\n'
        'autosave-minutes = "never"\nmax_tokens_per_micro_batch = 512\n[alias]\n"x/y" = "a/b"\n[mesh]\nfsdp = 2\n'
    )
    monkeypatch.setenv("JAX_CLIENT_PORT", "2")
    monkeypatch.setenv("JAX_CLIENT_HOST", "localhost")
    monkeypatch.setenv("JAX_CLIENT_DTYPE", "")  # as if it were not set
    monkeypatch.setenv("JAX_CLIENT_WARMUP", "16, 32\t64")
    shown = cli("serve", "--show-config", "--config", file, "--port", 3)
    assert shown.err == ""
    from_file, found = f"file {file}", shown.settings
    assert found["port"] == ("3", "flag")
    assert found["host"] == ("localhost", "environment JAX_CLIENT_HOST")
    assert found["warmup"] == ("16, 32, 64", "environment JAX_CLIENT_WARMUP")
    assert found["remat"] == ("full", from_file)
    assert found["model"] == ("a/b, c/d", from_file)
    assert found["alias"] == ("x/y=a/b", from_file)
    assert found["mesh"] == ("fsdp=2", from_file)
    assert found["precompile"] == ("false", from_file)
    assert found["autosave_minutes"] == ("never", from_file)
    assert found["max_tokens_per_micro_batch"] == ("512", from_file)
    assert found["dtype"] == ("auto", "default") and found["memory_fraction"] == ("0.9", "default")
    # The same file by the environment, and what the environment says goes before it.
    monkeypatch.setenv("JAX_CLIENT_CONFIG", str(file))
    monkeypatch.setenv("JAX_CLIENT_MODEL", "e/f,g/h i/j")
    monkeypatch.setenv("JAX_CLIENT_PRECOMPILE", "1")
    found = cli("serve", "--show-config").settings
    assert found["port"] == ("2", "environment JAX_CLIENT_PORT")
    assert found["model"] == ("e/f, g/h, i/j", "environment JAX_CLIENT_MODEL")
    assert found["precompile"] == ("true", "environment JAX_CLIENT_PRECOMPILE")
    assert found["remat"] == ("full", from_file)
    # One file does for `run`, whose server is private.
    found = cli("run", "--show-config").settings
    assert found["remat"] == ("full", from_file) and not {"host", "port", "api_key"} & set(found)


def test_folders_are_there(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("JAX_CLIENT_LOGS", "logs")
    for command in ("serve", "run"):
        assert cli(command, "--show-config").settings["logs"] == ("logs", "environment JAX_CLIENT_LOGS")
    monkeypatch.delenv("JAX_CLIENT_LOGS")
    for command in (["serve", "--logs"], ["serve", "--models-dir"], ["dashboard", "--logs"]):
        assert "'nowhere' is no directory; make it, or name one that is there." in cli(*command, "nowhere").error(2)


def test_the_public_address_is_a_setting(cli, tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text('public-url = "https://a.org/"')
    said = lambda *more: cli("serve", "--show-config", *more).settings["public_url"]  # noqa: E731
    assert said() == ("-", "default")
    assert said("--config", file) == ("https://a.org", f"file {file}")
    monkeypatch.setenv("JAX_CLIENT_PUBLIC_URL", "https://b.org:443")
    assert said("--config", file) == ("https://b.org", "environment JAX_CLIENT_PUBLIC_URL")
    assert said("--public-url", "http://c.org:81") == ("http://c.org:81", "flag")
    assert "--public-url https://b.org lets other machines in; give an --api-key" in cli("serve").error(2)
    for command in ("serve", "dashboard"):
        assert "'https://a/b' is no public address" in cli(command, "--public-url", "https://a/b").error(2)
    file.write_text('public_url = "https://user@a.org"')
    assert "is no public address" in cli("serve", "--config", file).error(2)


def test_every_setting_of_the_engine_can_be_said():
    options = {option.name: option for option in SHARED}
    for each in fields(EngineConfig):
        assert each.name in options, f"EngineConfig.{each.name} has no flag"


def test_hosts_and_samplers_are_settings(cli, tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text('hosts = "ray"\nsamplers = 2')
    for command in ("serve", "run"):
        found = cli(command, "--show-config").settings
        assert found["hosts"] == ("-", "default") and found["samplers"] == ("0", "default")
        found = cli(command, "--show-config", "--config", file, "--samplers", 3).settings
        assert found["hosts"] == ("ray", f"file {file}") and found["samplers"] == ("3", "flag")
    # As `launch` sets it; it is no unknown variable.
    monkeypatch.setenv("JAX_CLIENT_HOSTS", "ray")
    shown = cli("serve", "--show-config")
    assert shown.settings["hosts"] == ("ray", "environment JAX_CLIENT_HOSTS") and shown.err == ""
    assert "'mpi' is not 'ray'" in cli("serve", "--hosts", "mpi").error(2)
    assert "-1 is not in the range" in cli("serve", "--samplers", "-1").error(2)


def test_where_the_state_directory_is_said(cli, tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text('state_dir = "/from/file"')
    said = lambda *more, before=(): cli(*before, "serve", "--show-config", *more).settings["state_dir"]  # noqa: E731
    assert said()[1] == "default"
    assert said("--config", file) == ("/from/file", f"file {file}")
    monkeypatch.setenv("JAX_CLIENT_HOME", "/from/home")
    assert said("--config", file) == ("/from/home", "environment JAX_CLIENT_HOME")
    monkeypatch.setenv("JAX_CLIENT_STATE_DIR", "/from/variable")
    assert said("--config", file) == ("/from/variable", "environment JAX_CLIENT_STATE_DIR")
    assert "No runs under /from/variable." in cli("runs", "list").err
    assert said(before=("--state-dir", "/before")) == ("/before", "flag")
    assert said("--state-dir", "/after", before=("--state-dir", "/before")) == ("/after", "flag")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "'prot' is no setting. Did you mean 'port'?"),
        ("xyzzy = 1", "'xyzzy' is no setting. There are "),
        ("port = 70000", "port: 70000 is not in the range"),
        ("port = true", "port: it is a bool"),
        ("port = 1.5", "port: '1.5' is not a valid integer"),
        ('precompile = "yes"', "precompile: it is neither true nor false"),
        ('mesh = "wide"', "mesh: 'wide' is no mesh"),
        ('alias = "a"', "alias: 'a' is no alias"),
        ('map-loss = "a"', "map-loss: 'a' is no map of a loss"),
        ("dtype = 'int8'", "dtype: 'int8' is not one of"),
        ("host = ['a']", "host: it is a list"),
        ("memory-fraction = 1\nmemory_fraction = 1", "'memory_fraction' is there twice"),
        ("port 1", "Expected '='"),
    ],
)
def test_a_wrong_file_is_explained(cli, tmp_path, text, said):
    file = tmp_path / "c.toml"
    file.write_text(text)
    error = cli("serve", "--show-config", "--config", file).error(2)
    assert f"error: {file}: " in error and said in error


def test_wrong_settings_are_wrong_usage(cli, tmp_path, monkeypatch):
    assert "does not exist" in cli("serve", "--config", tmp_path / "none").error(2)
    assert "stands for 'b' and 'c'" in cli("serve", "--alias", "a=b", "--alias", "a=c").error(2)
    assert "has an axis 'wide'" in cli("serve", "--mesh", "wide=2").error(2)
    assert "object store" in cli("serve", "--state-dir", "gs://bucket/x").error(2)
    assert "mirror is 'not-a-url'" in cli("serve", "--mirror", "not-a-url").error(2)
    monkeypatch.setenv("JAX_CLIENT_PORT", "many")
    assert "JAX_CLIENT_PORT" in cli("serve").error(2)
    monkeypatch.delenv("JAX_CLIENT_PORT")
    monkeypatch.setenv("JAX_CLIENT_MODELS", "a/b")
    warning = cli("serve", "--show-config").err
    assert warning == "warning: the environment's JAX_CLIENT_MODELS is no setting; did you mean JAX_CLIENT_MODEL?\n"


def test_the_key_is_never_shown(cli, tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text(f'api_key = "{KEY}"')
    shown = cli("serve", "--show-config", "--config", file)
    assert shown.settings["api_key"] == ("(set)", f"file {file}")
    outputs = [shown, cli("serve", "--show-config", "--api-key", KEY)]
    for bad in (KEY[4:], KEY + " x"):
        file.write_text(f'api_key = "{bad}"')
        outputs.append(cli("serve", "--config", file))
        outputs.append(cli("serve", "--api-key", bad))
    file.write_text(f'api_key = ["{KEY}"]')
    outputs.append(cli("serve", "--config", file))
    monkeypatch.setenv("JAX_CLIENT_API_KEY", KEY)
    outputs.append(cli("serve", "--show-config"))
    assert [each.code for each in outputs] == [0, 0, 2, 2, 2, 2, 2, 0]
    for each in outputs:
        assert KEY[4:] not in each.out + each.err
