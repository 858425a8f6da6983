"""What does the server tell a client about errors and waiting, and what does the unmodified SDK make of it?"""

from __future__ import annotations

import time
from typing import Any

import pytest
import tinker
from tinker import types
from tinker.lib.api_future_impl import _APIFuture
from tinker.types import UntypedAPIFuture

from jax_client.server.routes import polling
from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, poll, raw, wait_for
from support.server.serving import (
    Between,
)

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


def test_errors_are_raised_where_and_as_what_they_are(start: Any, loaded: Any) -> None:
    running = start()
    service = connect(running)
    with pytest.raises(tinker.TinkerError, match="there is no model 'missing'"):
        service.create_lora_training_client("missing", 4).result(LIMIT)
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    with pytest.raises(tinker.RequestFailedError, match="no gradients") as failed:
        client.optim_step(ADAM).result(LIMIT)
    assert failed.value.category == types.RequestErrorCategory.User
    loaded[0].train_batch = lambda *_: 1 / 0
    with pytest.raises(tinker.RequestFailedError, match="its log says why") as failed:
        client.forward_backward(DATA, "cross_entropy").result(LIMIT)
    assert failed.value.category == types.RequestErrorCategory.Server
    with pytest.raises(tinker.NotFoundError, match="has no checkpoint"):
        service.create_sampling_client(f"tinker://{client.model_id}/sampler_weights/none").result(LIMIT)
    unknown = UntypedAPIFuture(request_id="nothing")
    with pytest.raises(ValueError, match="unknown or expired"):
        _APIFuture(types.OptimStepResponse, client.holder, unknown, time.time(), "OptimStep").result(LIMIT)
    with raw(running) as http:
        for request_id in ("", "x" * 10_000, "a:b:c\0", "\u202e", f"{client.model_id}:99"):
            assert poll(http, request_id).status_code == 404
        assert http.get("/asample").status_code == 405 and http.post("/asample/").status_code != 200
        assert http.post("/nothing").status_code == 404, "the router knows what no table has"


def test_metrics_that_json_cannot_hold_are_left_out(start: Any) -> None:
    client = connect(start()).create_lora_training_client(MODEL, 4).result(LIMIT)
    passed = client.forward_backward(DATA, "cross_entropy")
    stepped = client.optim_step(ADAM).result(LIMIT).metrics
    assert "kl:mean" not in passed.result(LIMIT).metrics
    assert stepped["grad_norm:mean"] == 1.0 and stepped["nonfinite/update_norm:mean"] == 1.0


def test_long_work_is_polled_for_slowly_and_said_to_wait(
    start: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.5)
    # The SDK tells its user of a pause only after a quarter of an hour.
    monkeypatch.setattr("tinker.lib.queue_state_logger.PAUSE_GRACE_PERIOD", 0)
    between = Between()
    client = connect(start(between)).create_lora_training_client(MODEL, 4).result(LIMIT)
    loaded[0].gate.clear()
    before = between.counts["retrieve_future"]
    passes = [client.forward_backward(DATA, "cross_entropy") for _ in range(3)]
    time.sleep(2)
    polls = between.counts["retrieve_future"] - before
    loaded[0].gate.set()
    for each in passes:
        each.result(LIMIT)
    assert 3 <= polls <= 3 * 6
    assert "requests ahead" in caplog.text


def test_a_lost_sampling_request_is_sent_again(start: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.2)
    between = Between()
    running = start(between)
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    wait_for(lambda: loaded)  # in the background
    loaded[0].gate.clear()
    asked = sampler.sample(PROMPT, 1, PARAMS)
    wait_for(lambda: between.counts["retrieve_future"] > 0)
    # As if it had been accepted by a server that was killed before it could note it.
    ledger = running.server.ledger
    (lost,) = ledger._unanswered
    del ledger._unanswered[lost]
    ledger._log._ids.discard(lost)
    ledger._log._ahead.pop(lost, None)
    wait_for(lambda: between.counts["asample"] == 2)
    loaded[0].gate.set()
    assert asked.result(LIMIT).sequences[0].tokens == [5, 2]


def test_a_finished_session_is_told_so(start: Any) -> None:
    running = start()
    with raw(running) as http:
        about = {"tags": [], "user_metadata": None, "sdk_version": "0.38"}
        session = http.post("/create_session", json=about).json()["session_id"]
        beat = {"session_id": session}
        assert http.post("/session_heartbeat", json=beat).status_code == 200
        assert http.post(f"/sessions/{session}/finish", json={"reason": {"type": "success"}}).status_code == 200
        assert http.post("/session_heartbeat", json=beat).status_code in (404, 410)
