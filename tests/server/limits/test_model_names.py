"""Can a client reach only those files that the operator named, and does no answer show others?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tinker

from jax_client.errors import BadRequestError, NotFoundError
from jax_client.server.model_names import ModelNames
from jax_client.server.state.request_log import RequestLog
from jax_client.server.state.server import Server
from support.server.serving import KEY, Running, config, write_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models and with what is no client's business."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models/own", "other/model", "team/notes"):
        Path(folder).mkdir(parents=True)
        write_model(Path(folder))
    (tmp_path / "team" / "notes" / "secret.txt").write_text("the secret")
    (tmp_path / "models" / "secret.txt").write_text("the secret")
    (tmp_path / "models" / "fake.gguf").write_text("root:x:0:0")
    (tmp_path / "models" / "folder").mkdir()
    (tmp_path / "models" / "folder" / "secret.txt").write_text("the secret")
    (tmp_path / "models" / "link").symlink_to(tmp_path / "other" / "model" / "m")
    return tmp_path


def test_a_client_names_what_the_operator_named(directory: Path) -> None:
    names = ModelNames({"Qwen/Big": "other/model/m"}, ["./models/own/m"], [directory / "models"])
    assert names.meaning("Qwen/Big") == "other/model/m"
    assert names.meaning("./models/own/m") == "./models/own/m"
    assert names.meaning(str(directory / "other" / "model" / "m")), "by the path that a checkpoint records"
    assert names.meaning("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert names.meaning(str(directory / "models" / "link")), "a link in the operator's directory is the operator's"
    assert names.meaning("Qwen/Big:peft:262144") == names.meaning("Qwen/Big")
    only_named = ModelNames({}, ["other/model/m"], [])
    assert only_named.meaning("other/model/m") and only_named.meaning("Qwen/Qwen3-4B")
    with pytest.raises(BadRequestError, match="--models-dir"):
        only_named.meaning("models/own/m")
    assert ModelNames().meaning("/any/path") == "/any/path", "a private server's program could read it itself"


def test_other_paths_are_refused_with_the_same_words(directory: Path) -> None:
    names = ModelNames({}, [], [directory / "models"])
    home = os.path.expanduser("~")
    paths = (
        *("/etc/passwd", "/etc", "/no/such/file", "~/.ssh", home, "..", ".", "other/model/m", "./other/model/m"),
        *(
            "models",
            "models/",
            "models/../other/model/m",
            f"{directory}/models/../team",
            f"{directory}/models-of-others",
        ),
        *("team/notes", "no-such-name", "a/b/c", "/etc/passwd.gguf"),
    )
    said = set()
    for path in paths:
        with pytest.raises(BadRequestError) as refused:
            names.meaning(path)
        said.add(str(refused.value).partition(", a path")[2])
        assert "secret" not in str(refused.value) and "root:" not in str(refused.value)
    assert len(said) == 1 and "--models-dir" in said.pop()
    for path in ("models/secret.txt", "models/fake.gguf", "models/folder", f"{directory}/models/folder"):
        with pytest.raises(NotFoundError, match="no model") as found:
            names.meaning(path)
        shown = str(found.value).partition(", and there")[2]
        assert shown and "secret" not in shown and "root" not in shown
    with pytest.raises(BadRequestError, match=r"5,000 characters, the limit is 4,096"):
        names.meaning("x" * 5_000)


def test_every_call_that_names_a_base_model_is_checked(directory: Path) -> None:
    names = ModelNames({}, [], [directory / "models"])
    running = Running(Server(config(directory / "state"), names, RequestLog(directory)))
    try:
        service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
        for call in (
            lambda: service.create_lora_training_client("/etc", 4).result(30),
            lambda: service.create_sampling_client(base_model="/etc").result(30),
            lambda: service.create_sampling_client(base_model="other/model/m").result(30),
        ):
            with pytest.raises(tinker.BadRequestError, match="may not name"):
                call()
        own = str(directory / "models" / "own" / "m")
        client = service.create_lora_training_client(own, 4).result(60)
        path = client.save_state("s").result(60).path
        assert service.create_training_client_from_state(path).result(60).get_info().model_name == own
    finally:
        running.stop()
