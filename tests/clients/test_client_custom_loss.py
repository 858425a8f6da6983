"""What happens to a batch, and to the client, around a loss of the user's own?"""

from __future__ import annotations

import math

import pytest
import tinker

import jax_client
from support import fake_engine
from support.fake_engine import ADAM, DATA, PROMPT, datum

client, loaded, service = fake_engine.client, fake_engine.loaded, fake_engine.service
models = fake_engine.models

pytestmark = pytest.mark.torch


def negative_sum(data, logprobs):
    return -sum(p.sum() for p in logprobs), {"mine": 2.0}


def test_custom_loss(client):
    seen = []

    def loss(data, logprobs):
        seen.append(data)
        data[0].loss_fn_inputs["weights"].to_numpy()[:] = 9
        data[0].loss_fn_inputs.clear()
        return negative_sum(data, logprobs)

    batch = [datum()]
    result = client.forward_backward_custom(batch, loss).result()
    assert result.metrics == {"tokens:sum": 3.0, "mine": 2.0, "loss:sum": 3.0, "surrogate_loss:sum": 3.0}
    assert seen[0][0] is not batch[0]
    assert batch[0].loss_fn_inputs["weights"].tolist() == [1.0, 1.0, 1.0]
    assert client.optim_step(ADAM).result().metrics


def test_a_failing_custom_loss_leaves_the_client_usable(client):
    def loss(data, logprobs):
        raise ZeroDivisionError("mine")

    failing = client.forward_backward_custom(DATA, loss)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        failing.result()
    assert any(entry.name == "loss" for entry in caught.traceback)
    assert any("no gradients were accumulated" in note for note in caught.value.__notes__)
    with pytest.raises(tinker.RequestFailedError, match="no gradients"):
        client.optim_step(ADAM).result()
    with pytest.raises(tinker.BadRequestError, match="must return"):
        client.forward_backward_custom(DATA, lambda data, logprobs: None).result()
    with pytest.raises(tinker.RequestFailedError, match="your loss is nan"):
        client.forward_backward_custom(DATA, lambda data, logprobs: (logprobs[0].sum() * math.nan, {})).result()
    assert client.forward_backward_custom(DATA, negative_sum).result().metrics["loss:sum"] == 3.0


def test_reentrant_calls(service, client):
    other = service.create_sampling_client(base_model="other").result()

    def reentrant(data, logprobs):
        return client.forward(DATA, "cross_entropy").result(), {}

    def elsewhere(data, logprobs):
        assert other.compute_logprobs(PROMPT).result(30)
        return negative_sum(data, logprobs)

    with pytest.raises(RuntimeError, match="re-entrant call"):
        client.forward_backward_custom(DATA, reentrant).result(30)
    assert client.forward_backward_custom(DATA, elsewhere).result(30).metrics["mine"] == 2.0
    assert client.forward(DATA, "cross_entropy").result(30)


def test_custom_loss_arguments(client):
    with pytest.raises(TypeError, match="loss_fn is str"):
        client.forward_backward_custom(DATA, "cross_entropy")
    with pytest.raises(ValueError, match="No data provided"):
        client.forward_backward_custom([], negative_sum)
    with pytest.warns(DeprecationWarning, match="loss_type_input") as warned:
        client.forward_backward_custom(DATA, negative_sum, loss_type_input="logprobs").result()
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="'logits'"):
        client.forward_backward_custom(DATA, negative_sum, loss_type_input="logits")


def test_loss_handles_run_locally(service, client):
    def weighted(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nll:sum": loss}

    ranks = {"logprobs": 1, "weights": 1}
    handle = service.create_custom_loss(weighted, ranks).result()
    assert isinstance(handle, jax_client.LossHandle)
    metrics = client.forward_backward_custom([datum(), datum()], handle).result().metrics
    assert metrics["loss:sum"] == metrics["custom/nll:sum"] == 6.0
    with pytest.raises(ValueError, match="already created"):
        service.create_custom_loss(weighted, ranks)
    other = jax_client.ServiceClient().create_custom_loss(weighted, ranks).result()
    with pytest.raises(ValueError, match="session"):
        client.forward_backward_custom(DATA, other)
    matrix = service.create_custom_loss(weighted, {"logprobs": 1, "weights": 2}).result()
    with pytest.raises(ValueError, match="rank"):
        client.forward_backward_custom(DATA, matrix)
