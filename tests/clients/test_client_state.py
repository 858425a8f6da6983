"""Can state be saved, loaded, resumed and listed?"""

from __future__ import annotations

import asyncio

import pytest
import tinker

import jax_client
from jax_client.runs import listings
from support import fake_engine
from support.fake_engine import MODEL, logprob, number, step

client, loaded, service = fake_engine.client, fake_engine.loaded, fake_engine.service
models = fake_engine.models


def test_saving_and_loading(service, client):
    step(client)
    saved = client.save_state("first", user_metadata={"k": "v"}).result()
    assert saved.path == f"tinker://{client.model_id}/weights/first"
    with pytest.raises(tinker.RequestFailedError, match="overwrite=True") as caught:
        client.save_state("first").result()
    assert caught.value.category == "user"
    step(client)
    assert logprob(client) == -2.0
    client.load_state(saved.path).result()
    assert logprob(client) == -1.5
    client.save_state("first", overwrite=True).result()

    exact = service.create_training_client_from_state_with_optimizer(saved.path)
    fresh = service.create_training_client_from_state(saved.path, MODEL)
    assert logprob(exact) == logprob(fresh) == -1.5
    assert exact.get_info().lora_rank == 8
    assert exact.model_id != client.model_id


def test_optimizer_state_goes_with_the_state(service, client):
    step(client)
    path = client.save_state("s").result().path
    for make, moment in (
        (service.create_training_client_from_state_with_optimizer, 1.0),
        (service.create_training_client_from_state, 0.0),
    ):
        adapter = make(path).result()._run._adapter
        assert (number(adapter.mu), adapter.step, number(adapter.weights)) == (moment, int(moment), 0.5)
    client.load_state(path).result()
    assert number(client._run._adapter.mu) == 0.0
    client.load_state_with_optimizer(path).result()
    assert number(client._run._adapter.mu) == 1.0


def test_a_checkpoint_that_does_not_fit(service, client):
    path = client.save_state("s").result().path
    other = service.create_lora_training_client(MODEL, rank=4, train_mlp=False).result()
    with pytest.raises(ValueError, match=r"(?s)checkpoint: rank=8.*client: +rank=4, .*train_mlp=False"):
        other.load_state(path)
    with pytest.raises(tinker.BadRequestError, match="'tiny/model', but this is 'other'"):
        service.create_training_client_from_state(path, base_model="other").result()
    with pytest.raises(tinker.NotFoundError):
        client.load_state(f"tinker://{client.model_id}/weights/unknown")
    with pytest.raises(ValueError):
        client.load_state("weights/s")
    sampler = client.save_weights_for_sampler("s").result().path
    with pytest.raises(ValueError):
        client.load_state(sampler)
    assert logprob(client) == -1.0


def test_a_damaged_entry_of_a_run_stops_nobody_from_going_on(models, tmp_path, caplog):
    config = jax_client.EngineConfig(state_dir=tmp_path)
    with jax_client.ServiceClient(config=config, _models=models) as service:
        client = service.create_lora_training_client(MODEL, user_metadata={"who": "me"}).result()
        path = client.save_state("s").result().path
        (entry,) = tmp_path.glob("runs/*/run.json")
        entry.write_bytes(entry.read_bytes().replace(b"me", b"we"))
        service.create_training_client_from_state_with_optimizer(path).result()
        assert "run.json is damaged" in caplog.text
        assert service.create_rest_client().copy_weights(path, "p1").result()


def test_runs_and_checkpoints_are_listed(models, tmp_path):
    config = jax_client.EngineConfig(state_dir=tmp_path)
    about = {"renderer": "x"}
    with jax_client.ServiceClient({"who": "me"}, "p1", display_name="d", config=config, _models=models) as service:
        client = service.create_lora_training_client(MODEL, user_metadata=about).result()
        path = client.save_state("s", ttl_seconds=3600, user_metadata=about).result().path
        sampler_path = client.save_weights_for_sampler("t").result().path
        sampler = service.create_sampling_client(sampler_path).result()
        sampler_id = sampler._sampler.sampler_id
        rest = service.create_rest_client()
        assert rest.get_sampler(sampler_id).result().model_path == sampler_path
        assert rest.get_session(client.model_id.split(":")[0]).result().sampler_ids == [sampler_id]

    # Another process would see the same.
    rest = jax_client.RestClient(config=config)
    run = rest.get_training_run_by_tinker_path(path).result()
    assert (run.training_run_id, run.lora_rank, run.user_metadata) == (client.model_id, 32, about)
    assert run.last_checkpoint.tinker_path == path
    assert run.last_sampler_checkpoint.tinker_path == sampler_path
    assert asyncio.run(rest.get_training_run_async(client.model_id)) == run
    listed = rest.list_training_runs(project_id="p1").result()
    assert listed.training_runs == [run] and listed.cursor.total_count == 1
    assert rest.list_training_runs(project_id="p2").result().training_runs == []
    saved = {c.checkpoint_id: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert set(saved) == {"weights/s", "sampler_weights/t"}
    assert saved["weights/s"].expires_at > saved["weights/s"].time
    assert saved["weights/s"].user_metadata == about
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (MODEL, 32, True)
    session = rest.list_sessions().result().sessions[-1]
    assert rest.get_session(session).result().training_run_ids == [client.model_id]
    assert rest.get_session(session).result().user_metadata == {"who": "me"}
    rest.delete_checkpoint(client.model_id, "weights/s").result()
    rest.delete_checkpoint_from_tinker_path(sampler_path).result()
    assert rest.list_user_checkpoints().result().cursor.total_count == 0
    for call in (
        lambda: rest.get_training_run("unknown"),
        lambda: rest.list_checkpoints("unknown"),
        lambda: rest.get_session("unknown"),
        lambda: rest.get_sampler("unknown"),
        lambda: rest.delete_checkpoint_from_tinker_path(path),
    ):
        with pytest.raises(tinker.NotFoundError):
            call().result()
    with pytest.raises(tinker.BadRequestError, match="limit"):
        rest.list_training_runs(limit=0)


def test_lifetime_and_visibility_can_be_changed(service, client):
    rest = service.create_rest_client()
    path = client.save_state("s", ttl_seconds=3600).result().path

    def listed():
        (found,) = rest.list_checkpoints(client.model_id).result().checkpoints
        return found

    first = listed().expires_at
    assert not listed().public
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    assert (listed().expires_at - first).total_seconds() == pytest.approx(3600, abs=60)
    rest.publish_checkpoint_from_tinker_path(path).result()
    asyncio.run(rest.set_checkpoint_ttl_from_tinker_path_async(path, None))
    assert listed().public and listed().expires_at is None
    asyncio.run(rest.unpublish_checkpoint_from_tinker_path_async(path))
    assert not listed().public
    unknown = f"tinker://{client.model_id}/weights/unknown"
    for call in (
        lambda: rest.publish_checkpoint_from_tinker_path(unknown),
        lambda: rest.set_checkpoint_ttl_from_tinker_path(unknown, None),
        lambda: rest.copy_weights(unknown, "p"),
    ):
        with pytest.raises(tinker.NotFoundError, match="it has s"):
            call().result()
    for ttl in (0, 1.5, 10**12):
        with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
            rest.set_checkpoint_ttl_from_tinker_path(path, ttl)
    with pytest.raises(tinker.BadRequestError, match="save_weights_external"):
        rest.get_external_weights_urls(path)


def test_a_sampler_outlives_its_checkpoint(service, client):
    step(client)
    path = client.save_weights_for_sampler("s").result().path
    sampler = service.create_sampling_client(path).result()
    before = sampler.sample(fake_engine.PROMPT, 1, fake_engine.PARAMS).result()
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result()
    after = sampler.sample(fake_engine.PROMPT, 1, fake_engine.PARAMS).result()
    assert after.sequences[0].logprobs == before.sequences[0].logprobs
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(path).result()


def test_copies_belong_to_a_project_and_to_nobody_else(models, tmp_path, monkeypatch):
    monkeypatch.delenv("TINKER_PROJECT_ID", raising=False)
    config = jax_client.EngineConfig(state_dir=tmp_path)
    with jax_client.ServiceClient(project_id="archive", config=config, _models=models) as service:
        client = service.create_lora_training_client(MODEL, user_metadata={"a": "b"}).result()
        step(client)
        path = client.save_state("s", user_metadata={"k": "v"}).result().path
        copied = service.copy_weights(path, ttl_seconds=3600).result()
        rest = service.create_rest_client()
        rest.delete_checkpoint_from_tinker_path(path).result()
        run = rest.get_training_run_by_tinker_path(copied).result()
        assert run.training_run_id != client.model_id and run.user_metadata == {"a": "b"}
        assert run.last_checkpoint.user_metadata == {"k": "v"} and run.last_checkpoint.expires_at is not None
        assert run in rest.list_training_runs(project_id="archive").result().training_runs
        assert logprob(service.create_training_client_from_state_with_optimizer(copied)) == -1.5
        with pytest.raises(tinker.BadRequestError, match="TINKER_PROJECT_ID"):
            rest.copy_weights(copied)
        session = client.model_id.split(":")[0]
        rest.assign_session_project(session, "other").result()
        assert {r.training_run_id for r in rest.list_training_runs(project_id="other").result().training_runs} >= {
            client.model_id
        }
        with pytest.raises(tinker.NotFoundError, match="list_sessions"):
            rest.assign_session_project("unknown", "other").result()


def test_listing_the_models_downloads_none(monkeypatch):
    monkeypatch.setattr(listings, "known_models", lambda: ["far/away"])
    monkeypatch.setattr(listings, "local_models", lambda: [])
    monkeypatch.setattr(listings, "resolve", lambda name: pytest.fail("resolved"))
    (model,) = jax_client.RestClient().get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length, model.trainable) == ("far/away", None, True)


def test_a_resumed_run_keeps_its_metadata(service):
    client = service.create_lora_training_client(MODEL, user_metadata={"renderer": "x"}).result()
    path = client.save_state("s").result().path
    resumed = service.create_training_client_from_state(path).result()
    run = service.create_rest_client().get_training_run(resumed.model_id).result()
    assert run.user_metadata == {"renderer": "x"}
