"""Do a server's links give the files of an export, and nothing else to anyone?"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyrage
import pytest
import tinker

from jax_client.cli import main
from jax_client.errors import RequestFailedError
from jax_client.server.model_names import ModelNames
from jax_client.server.routes import downloads
from jax_client.server.state.server import Server
from support.server.serving import ADAM, KEY, Running, config, data, write_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = write_model(tmp_path_factory.mktemp("model"))
    found = Running(Server(config(tmp_path_factory.mktemp("state")), ModelNames({"Some/Model": model})))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    client = service.create_lora_training_client("Some/Model", rank=4, train_unembed=False).result()
    client.forward_backward(data(), "cross_entropy")
    client.optim_step(ADAM).result()
    return client


@pytest.fixture(scope="module")
def rest(running: Running) -> Any:
    return tinker.RestClient(base_url=running.url, api_key=KEY)


@pytest.fixture(scope="module")
def export(client: Any) -> str:
    return client.save_weights_external("out").result().path


def test_a_link_gives_one_file_without_a_key(rest: Any, export: str) -> None:
    answer = rest.get_external_weights_urls(export).result()
    assert set(answer.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    assert 3500 < answer.expires.timestamp() - time.time() <= 3600
    whole = {name: httpx.get(url) for name, url in answer.urls.items()}
    assert all(found.status_code == 200 for found in whole.values())
    assert whole["adapter_config.json"].json()["peft_type"] == "LORA"
    name = "adapter_model.safetensors"
    part = httpx.get(answer.urls[name], headers={"Range": "bytes=100-"})
    assert (part.status_code, part.content) == (206, whole[name].content[100:])


def test_a_changed_link_opens_nothing(
    running: Running, rest: Any, export: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = rest.get_external_weights_urls(export).result().urls["adapter_config.json"]
    later = re.sub(r"expires=(\d+)", lambda found: f"expires={int(found[1]) + 1}", url)
    wrong = [
        later,
        url.replace("adapter_config.json", "adapter_model.safetensors"),
        url.replace("adapter_config.json", "../../manifest.json"),
        url.replace("/out/", "/other/"),
        url[:-1],
        url.split("?")[0],
        url.replace("signature=", "signature=%ff"),
    ]
    for each in wrong:
        assert httpx.get(each).status_code in (401, 403, 404), each
    assert httpx.get(f"{running.url}/api/v1/training_runs").status_code == 401, "other routes need the key"


def test_a_link_lasts_an_hour_however_the_clock_is_set(rest: Any, export: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = rest.get_external_weights_urls(export).result().urls["adapter_config.json"]
    began = time.monotonic()
    for wall in (-2e9, 2e10):
        for passed, status in ((3500, 200), (3700, 403)):
            clocks = SimpleNamespace(time=lambda wall=wall: wall, monotonic=lambda passed=passed: began + passed)
            monkeypatch.setattr(downloads, "time", clocks)
            answer = httpx.get(url)
            assert answer.status_code == status and ("has expired" in answer.text) == (status == 403)


def test_a_link_ends_with_the_checkpoint(client: Any, rest: Any) -> None:
    path = client.save_weights_external("short", ttl_seconds=3600).result().path
    url = rest.get_external_weights_urls(path).result().urls["adapter_config.json"]
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert httpx.get(url).status_code == 404


def test_an_encrypted_export_is_read_by_its_recipient(client: Any, rest: Any, export: str) -> None:
    secret = pyrage.x25519.Identity.generate()
    path = client.save_weights_external("sealed", age_encryption_recipients=[str(secret.to_public())]).result().path
    urls, plain = (rest.get_external_weights_urls(each).result().urls for each in (path, export))
    for name, url in urls.items():
        content = pyrage.decrypt(httpx.get(url).content, [secret])
        assert content == httpx.get(plain[name.removesuffix(".age")]).content


def test_the_command_fetches_exports_and_states(
    running: Running,
    client: Any,
    rest: Any,
    export: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    state = client.save_state("s").result().path
    for number, path in enumerate((export, state)):
        command = ["checkpoint", "download", "--from", running.url, path, "--output", str(tmp_path / str(number))]
        assert main(command) == 0, capsys.readouterr().err
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / number).iterdir()} for number in ("0", "1"))
    assert first == second and set(first) == {"adapter_config.json", "adapter_model.safetensors"}
    listed = rest.list_user_checkpoints().result().checkpoints
    assert not [each for each in listed if "/download" in each.tinker_path], "the export of a download is deleted"
    assert main(["checkpoint", "download", "--from", running.url, export, "--output", str(tmp_path / "0")]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_download_continues_where_it_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_client.clients import download

    content, asked = bytes(range(256)) * 40, []

    class Broken(httpx.SyncByteStream):
        def __init__(self, start: int) -> None:
            self._start = start

        def __iter__(self) -> Iterator[bytes]:
            yield content[self._start : self._start + 4000]
            if self._start + 4000 < len(content):
                raise httpx.ReadError("gone")

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("Range"))
        start = int(asked[-1][6:-1]) if asked[-1] else 0
        return httpx.Response(206 if start else 200, stream=Broken(start))

    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        assert download._fetch_file(http, "http://server/x", tmp_path / "x") == len(content)
        assert (tmp_path / "x").read_bytes() == content
        assert asked == [None, "bytes=4000-", "bytes=8000-"]
    refusing = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(403, text="expired")))
    with refusing as http, pytest.raises(RequestFailedError, match="403: expired"):
        download._fetch_file(http, "http://server/y", tmp_path / "y")
