"""Do the sampling clients score, follow and travel as they should?"""

from __future__ import annotations

import pytest
import tinker

from jax_client import types
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT, step

client, loaded, service = fake_engine.client, fake_engine.loaded, fake_engine.service
models = fake_engine.models


def test_sampling(service, client, loaded):
    step(client)
    sampler = client.save_weights_and_get_sampling_client()
    step(client)
    response = sampler.sample(PROMPT, 2, PARAMS, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
    assert [s.tokens for s in response.sequences] == [[5, 2], [5, 2]]
    assert response.sequences[0].logprobs == [-1.5, -1.5]
    assert len({s.sequence_id for s in response.sequences}) == 2
    assert response.prompt_logprobs == [None, -1.5, -1.5, -1.5]
    assert response.topk_prompt_logprobs[1] == [(7, -1.5), (7, -1.5)]
    assert sampler.sample(PROMPT, 1, PARAMS).result().prompt_logprobs is None
    last = sampler.sample(PROMPT, 1, PARAMS, True, 1, prompt_logprobs_last_n=1).result()
    assert last.prompt_logprobs == [None, None, None, -1.5]
    assert last.topk_prompt_logprobs == [None, None, None, [(7, -1.5)]]
    assert sampler.compute_logprobs(PROMPT, 2).result() == [None, None, -1.5, -1.5]
    assert sampler.compute_logprobs(types.ModelInput.from_ints([1] * 32)).result()[1:] == [-1.5] * 31
    assert loaded[0].requests[-1].num_samples == 0
    with pytest.raises(ValueError):
        sampler.sample(PROMPT, 1, PARAMS, prompt_logprobs_last_n=1)
    assert sampler.get_base_model() == MODEL


def test_a_request_without_a_seed_draws_its_own(service, loaded):
    sampler = service.create_sampling_client(base_model=MODEL).result()
    for seed in (None, None, 7, 7):
        sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1, seed=seed)).result()
    first, second, *seeded = [request.seed for request in loaded[0].requests]
    assert first != second and seeded == [7, 7]


def test_snapshot_and_inflight(client):
    def sampled(sampler):
        return sampler.sample(PROMPT, 1, PARAMS).result().sequences[0].logprobs[0]

    a = client.save_weights_and_get_sampling_client(kind="inflight").result()
    fixed = client.save_weights_and_get_sampling_client().result()
    step(client)
    assert sampled(a) == -1.0
    b = client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert sampled(a) == sampled(b) == -1.5
    assert sampled(fixed) == -1.0
    with pytest.raises(ValueError, match="kind"):
        client.save_weights_and_get_sampling_client(kind="latest")
    with pytest.warns(DeprecationWarning, match="name") as warned:
        client.save_weights_and_get_sampling_client("name").result()
    assert warned[0].filename == __file__


def test_saved_sampler_weights(service, client):
    step(client)
    path = client.save_weights_for_sampler("s").result().path
    for make in (service.create_sampling_client, client.create_sampling_client):
        assert make(path).compute_logprobs(PROMPT).result()[1] == -1.5
    state = client.save_state("s").result().path
    for arguments, text in (
        ({}, "Either model_path or base_model"),
        ({"model_path": path, "base_model": MODEL}, "both"),
        ({"model_path": "some/where"}, "tinker://"),
        ({"model_path": state}, "save_weights_for_sampler"),
        ({"base_model": " "}, "base_model"),
    ):
        with pytest.raises(ValueError, match=text):
            service.create_sampling_client(**arguments)
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(path + "x").result()
