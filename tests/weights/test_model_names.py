"""Which files does a model name find, and what does a name without files answer?"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError
from jax_client.weights.read import hub, source
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import EMBEDDED_MODEL, known_models, resolve
from support.weight_files import hf_tensors, write_gguf, write_hf
from support.weights.loading import config, one_device

pytestmark = pytest.mark.usefixtures("empty_hub_cache")


@pytest.mark.parametrize("name", [None, ""])
def test_a_name_is_required(name: str | None) -> None:
    with pytest.raises(BadRequestError, match=r"base_model is required.*known_models"):
        resolve(name)


@pytest.mark.parametrize(("name", "meant"), [("qwen3-8b", "Qwen/Qwen3-8B"), ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
                                             ("SmolLM2-135M-Instuct", EMBEDDED_MODEL)])  # fmt: skip
def test_misspelled_names_are_answered_at_once(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError, match=f"Did you mean '{meant}'"):
        resolve(name)


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing.gguf", "a/b/c", "../x/y"])
def test_paths_that_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError, match="no such file or directory"):
        resolve(name)


def hub_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error

    def hf_hub_download(name: str, file: str, **_: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)


def http_client() -> Any:
    """Return huggingface_hub's HTTP library, which differs between its versions."""
    return importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    http = http_client()
    return kind("refused", response=http.Response(status, request=http.Request("GET", "https://hub.invalid")))


def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Exception, type[Exception], str, str | None]] = [
        (errors.LocalEntryNotFoundError("x"), RequestFailedError, "cannot be reached.*HF_TOKEN.*local dir", "user"),
        (http_client().ReadTimeout("slow"), RequestFailedError, "cannot be reached", "user"),
        (http_error(errors.GatedRepoError, 401), RequestFailedError, "is gated.*HF_TOKEN", "user"),
        (http_error(errors.RepositoryNotFoundError, 404), NotFoundError, "the hub has no model", None),
        (http_error(errors.HfHubHTTPError, 503), RequestFailedError, "refused", "user"),
        (OSError(28, "No space left on device"), RequestFailedError, "disk is full.*bytes are free", "server"),
    ]  # fmt: skip
    for error, kind, words, category in cases:
        hub_raises(error, monkeypatch)
        with pytest.raises(kind, match=words) as caught:
            resolve("some-org/some-model")
        assert getattr(caught.value, "category", None) == category


def test_a_near_name_is_offered_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(errors.LocalEntryNotFoundError("offline"), monkeypatch)
    with pytest.raises(NotFoundError, match="Did you mean 'Qwen/Qwen3-8B'"):
        resolve("Qwen/Qwen3-88B")
    with pytest.raises(RequestFailedError):
        resolve("Qwen/Qwen3-8B")


def fill_cache(cache: Path, name: str) -> Path:
    """Lay a model out as the hub cache does: a snapshot of links into the blobs."""
    model = cache / f"models--{name.replace('/', '--')}"
    blobs = write_hf(model / "blobs", config(), hf_tensors(config()))
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_the_cache_is_used_before_the_hub(empty_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    snapshot = fill_cache(empty_hub_cache, "some-org/some-model")
    found = resolve("some-org/some-model")
    assert (found.path, found.kind) == (snapshot, "hf")
    assert "some-org/some-model" in known_models()
    assert load_params(found, read_config(found), "float32", one_device())["embed_VD"].shape == (64, 32)


def test_an_incomplete_snapshot_is_not_used(empty_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(empty_hub_cache, "some-org/some-model")
    (snapshot / "model.safetensors").unlink()
    hub_raises(errors.LocalEntryNotFoundError("offline"), monkeypatch)
    with pytest.raises(RequestFailedError, match="cannot be reached"):
        resolve("some-org/some-model")
    assert "some-org/some-model" not in known_models()


def test_a_tokenizer_directory_does_not_hide_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gguf = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()))
    monkeypatch.setattr(source, "embedded_gguf", lambda: gguf)
    here = tmp_path / EMBEDDED_MODEL
    here.mkdir(parents=True)
    (here / "tokenizer.json").write_text("{}")
    assert resolve(EMBEDDED_MODEL).path == gguf
    write_hf(here, config(), hf_tensors(config()))
    assert resolve(EMBEDDED_MODEL).kind == "hf"
