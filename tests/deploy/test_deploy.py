"""Do the files in scripts/deploy/ name options, paths and packages that there are?"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from jax_client.cli import main
from jax_client.cli.serve import serve

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
OPTIONS = {flag for option in serve.params for flag in option.opts}
VARIABLES = {option.envvar for option in serve.params if getattr(option, "envvar", None)}


def pods() -> list[dict[str, object]]:
    """Return the specifications of pods in the manifests."""
    found = []

    def look(value: object) -> None:
        if isinstance(value, dict):
            if "containers" in value:
                found.append(value)
            for each in value.values():
                look(each)
        elif isinstance(value, list):
            for each in value:
                look(each)

    for name in ("kubernetes.yaml", "jobset.yaml"):
        for document in yaml.safe_load_all((DEPLOY / name).read_text()):
            look(document)
    return found


def load(name: str) -> ModuleType:
    """Import a file of the folder."""
    spec = importlib.util.spec_from_file_location(name, DEPLOY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_has_all_that_the_wheel_is_made_of() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {source for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for source in line.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= copied and all((ROOT / path).exists() for path in copied)
    command = json.loads(re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)[0])
    assert command[0] == "serve" and {word for word in command if word.startswith("--")} <= OPTIONS
    extras = project["project"]["optional-dependencies"]
    assert all(extra in extras for extra in re.findall(r"EXTRA=(\w+)", text))


def test_the_manifests_name_options_and_variables_of_the_server() -> None:
    specs = pods()
    assert len(specs) == 2
    for spec in specs:
        volumes = {volume["name"] for volume in spec["volumes"]} | {"state", "cache"}
        for container in spec["containers"]:
            words = [word for word in container.get("args", []) if word.startswith("--")]
            assert set(words) <= OPTIONS
            assert {each["name"] for each in container["env"]} <= VARIABLES
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for probe in (container[name] for name in container if name.endswith("Probe")):
                assert probe["exec"]["command"][-1] == "/usr/local/bin/healthcheck.py"
    # The pod's user is the image's.
    (user,) = re.findall(r"--uid (\d+)", (DEPLOY / "Dockerfile").read_text())
    assert {spec["securityContext"]["runAsUser"] for spec in specs} == {int(user)}


def test_the_settings_are_read(tmp_path, capsys) -> None:
    command = ["serve", "--config", str(DEPLOY / "serve.toml"), "--show-config", "--state-dir", str(tmp_path)]
    assert main(command) == 0
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in capsys.readouterr().out


def test_the_unit_is_one_of_systemd(tmp_path) -> None:
    text = (DEPLOY / "systemd.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert {word for word in command.split() if word.startswith("--")} <= OPTIONS
    # 128 + SIGTERM is how the server ends when it is told to, and no failure.
    assert "SuccessExitStatus=143" in text
    if (verify := shutil.which("systemd-analyze")) is None:
        pytest.skip("there is no systemd-analyze")
    # The user and the program are those of the machine that it is for.
    text = re.sub(r"^(User|Group)=.*\n", "", text, flags=re.MULTILINE).replace(command, "/bin/true")
    unit = tmp_path / "jax-client.service"
    unit.write_text(text)
    done = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not said, done.stderr


@pytest.mark.parametrize(
    ("status", "key", "code"), [(200, "tml-a", 0), (503, "tml-a", 1), (401, "tml-a", 1), (401, "", 0)]
)
def test_the_health_check_sends_the_key(status, key, code, monkeypatch, capsys) -> None:
    healthcheck = load("healthcheck")
    seen = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["X-API-Key"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("JAX_CLIENT_PORT", str(server.server_port))
        monkeypatch.setenv("JAX_CLIENT_API_KEY", key)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        try:
            assert healthcheck.main() == code
        finally:
            server.shutdown()
            thread.join()
    assert seen == [("/healthz", key)]
    assert bool(capsys.readouterr().out) == bool(code)


def test_nothing_listens(monkeypatch, capsys) -> None:
    healthcheck = load("healthcheck")
    monkeypatch.setenv("JAX_CLIENT_PORT", "1")
    assert healthcheck.main() == 1 and "refused" in capsys.readouterr().out
