"""Which files does a base model's name mean when a client is made, and when a checkpoint is written or read?"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import jax_client
from jax_client.checkpoint.store import CheckpointStore
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, NotFoundError
from jax_client.runs.lifecycle.base_models import BaseModels, Loader
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.results import api_records
from jax_client.values import CheckpointKey
from jax_client.weights.read import identity
from jax_client.weights.read.source import mended_name, resolve, resolve_config
from support.fake_engine import FakeModels
from support.weight_files import HF_CONFIG, hf_tensors, write_gguf, write_hf

HUB_NAME = "Some-Org/tiny-model"
CONFIG = EngineConfig()


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write a model, in the past, so that its files are not those of this moment."""

    def write(path: Path, seed: int = 0, seconds_ago: int = 100) -> Path:
        tensors = hf_tensors(HF_CONFIG, seed)
        write_gguf(path, HF_CONFIG, tensors) if path.suffix == ".gguf" else write_hf(path, HF_CONFIG, tensors)
        when = 1_700_000_000 - seconds_ago
        for file in [path] if path.is_file() else path.iterdir():
            os.utime(file, (when, when))
        return path

    return write


@pytest.fixture
def hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]) -> str:
    """Put a model into the hub's cache, and return its name; the working directory is empty."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{HUB_NAME.replace('/', '--')}"
    write(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return HUB_NAME


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_files_written_anew_are_another_model(
    name: str, tmp_path: Path, write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    models, path = FakeModels(files=True), write(tmp_path / name)
    first = models.acquire(str(path), CONFIG)
    assert models.acquire(str(path), CONFIG).model is first.model and first.is_current()
    write(path, seed=1)
    second = models.acquire(str(path), CONFIG)
    assert second.model is not first.model and second.model.fingerprint != first.model.fingerprint
    assert (first.is_current(), second.is_current()) == (False, True)
    assert "was written anew since 1 earlier version(s)" in caplog.text
    assert len(models.loaded()) == 2
    for model_ref in (first, first, second):
        model_ref.release()
    assert models.loaded() == []


def test_a_rewrite_that_keeps_size_and_times_is_noticed(tmp_path: Path, write: Callable[..., Path]) -> None:
    models, path = FakeModels(files=True), write(tmp_path / "model")
    first = models.acquire(str(path), CONFIG)
    weights = path / "model.safetensors"
    status, contents = weights.stat(), weights.read_bytes()
    with weights.open("r+b") as file:  # the same inode
        file.write(contents[:-4] + np.float32(2.5).tobytes())
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert models.acquire(str(path), CONFIG).model is not first.model


def test_a_touch_of_what_is_not_weights_and_other_files_change_nothing(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    models, path = FakeModels(files=True), write(tmp_path / "model")
    first = models.acquire(str(path), CONFIG)
    (path / "config.json").touch()
    (path / "trainer_state.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"other")
    assert models.acquire(str(path), CONFIG).model is first.model
    (path / "config.json").write_text(json.dumps(HF_CONFIG | {"rope_theta": 20000.0}))
    assert models.acquire(str(path), CONFIG).model is not first.model


def test_files_that_are_gone_leave_a_loaded_model_as_it_is(tmp_path: Path, write: Callable[..., Path]) -> None:
    models, path = FakeModels(files=True), write(tmp_path / "model")
    session = Session(CONFIG, models=models)
    first = session.base_model(str(path)).result()
    shutil.rmtree(path)
    assert first.is_current() and session.base_model(str(path)).result() is first


def test_a_load_during_a_write_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    path, fakes = write(tmp_path / "model"), FakeModels(files=True)

    def open_engine(source: object, config: object) -> object:
        opened = fakes._open(source, config)  # type: ignore[arg-type]
        write(path, seed=2)
        return opened

    models = BaseModels(Loader(open_engine=open_engine))  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="was written while it was read"):
        models.acquire(str(path), CONFIG)
    assert models.loaded() == [] and fakes.opened[0].closed


def test_each_client_of_a_service_keeps_the_weights_it_was_made_with(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    path = write(tmp_path / "model")
    config = EngineConfig(state_dir=tmp_path / "state")
    with jax_client.ServiceClient(config=config, _models=FakeModels(files=True)) as service:
        before = service.create_sampling_client(base_model=str(path)).result()
        write(path, seed=1)
        after = service.create_sampling_client(base_model=str(path)).result()
        assert before._sampler.model_ref.model is not after._sampler.model_ref.model
        assert [engine["files_changed"] for engine in service.describe()["engines"]] == [True, False]


def test_an_idle_sampler_comes_back_with_its_own_weights_or_not_at_all(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    from jax_client.runs.lifecycle.sampler_handle import base_sampler

    path = write(tmp_path / "model")
    session = Session(EngineConfig(state_dir=tmp_path / "state"), models=FakeModels(files=True))
    sampler = base_sampler(session, str(path))
    remake = sampler.park()
    assert remake is not None
    write(path, seed=1)
    newer = base_sampler(session, str(path))
    assert remake().model_ref is sampler.model_ref is not newer.model_ref
    session.release_unused(keep=())
    with pytest.raises(BadRequestError, match="were written anew since this client was made"):
        remake()


def test_a_folder_with_a_tokenizer_changes_nothing_about_a_name(hub_model: str, tmp_path: Path) -> None:
    folder = Path(hub_model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    config = EngineConfig(state_dir=tmp_path / "state")
    with jax_client.ServiceClient(config=config, _models=FakeModels(files=True)) as service:
        client = service.create_lora_training_client(hub_model).result()
        state = client.save_state("a").result().path
        sampler = client.save_weights_for_sampler("b").result().path
        rest = service.create_rest_client()
        assert rest.get_weights_info_by_tinker_path(state).result().base_model == hub_model
        assert rest.get_training_run(client.model_id).result().base_model == hub_model
        assert service.create_sampling_client(model_path=sampler).result().get_base_model() == hub_model
        again = service.create_training_client_from_state(state).result()
        assert again.get_info().model_data.model_name == hub_model


def test_a_path_is_recorded_so_that_it_is_found_from_elsewhere(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(state_dir=tmp_path / "state")
    with jax_client.ServiceClient(config=config, _models=FakeModels(files=True)) as service:
        client = service.create_lora_training_client("model").result()
        monkeypatch.chdir("/")
        path = client.save_state("a").result().path
        record = CheckpointStore(tmp_path / "state").record(CheckpointKey.parse(path))
        assert api_records.base_model(record.metadata) == str(tmp_path / "model")
        service.create_training_client_from_state(path).result()


def test_an_earlier_record_of_such_a_folder_means_the_hub_model(hub_model: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / hub_model
    assert mended_name(str(elsewhere)) == hub_model, "the folder is gone"
    elsewhere.mkdir(parents=True)
    (elsewhere / "tokenizer.json").write_text("{}")
    assert mended_name(str(elsewhere)) == hub_model
    shutil.copytree(resolve(hub_model).path, elsewhere, dirs_exist_ok=True)
    assert mended_name(str(elsewhere)) == str(elsewhere), "it has weights of its own"
    for name in (hub_model, "/data/models/unknown", str(tmp_path / "model.gguf")):
        assert mended_name(name) == name


def test_files_of_this_moment_are_read_again(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model", HF_CONFIG, hf_tensors(HF_CONFIG))
    assert identity.stamp(resolve(str(path))) is None


def test_a_variant_for_long_contexts_is_its_model(hub_model: str) -> None:
    for find in (resolve, resolve_config):
        assert find(f"{hub_model}:peft:262144") == find(hub_model)
    with pytest.raises(NotFoundError, match=r"Some-Org/tiny-model:peft:long"):
        resolve("Some-Org/tiny-model:peft:long")
