"""Do a model's requests take effect in the order of their numbers, whatever the network does to them?"""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from jax_client.checkpoint.store import CheckpointStore
from jax_client.server.routes import polling, sessions
from jax_client.server.state import pending
from jax_client.server.state.server import Server
from jax_client.values import CheckpointKey
from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL
from support.server import served_fake
from support.server.served_fake import LIMIT, connect, poll, raw
from support.server.serving import (
    API,
    Between,
    Running,
    body_of,
    config,
    forward_backward_body,
    nowhere,
    whole_body,
    write_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start


class Shuffled(Between):
    """Lets the chunks of a call through in another order, once all but the first are there, and one of them twice."""

    def __init__(self, chunks: int) -> None:
        super().__init__(self._hold)
        self._chunks = chunks
        self._held: list[asyncio.Event] = []
        self._turn = asyncio.Lock()

    async def _hold(self, served: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != f"{API}/forward_backward":
            await served(scope, receive, send)
            return
        body = await body_of(receive)
        mine = asyncio.Event()
        self._held.append(mine)
        place = len(self._held)
        # The SDK sends the first chunk when the others were accepted.
        if place == self._chunks - 1:
            order = self._held.copy()
            random.Random(5).shuffle(order)
            for each in order:
                each.set()
                await asyncio.sleep(0.001)
        elif place < self._chunks - 1:
            await mine.wait()
        async with self._turn:
            if place == 7:
                await served(scope, whole_body(body), nowhere)
            await served(scope, whole_body(body), send)


def test_chunks_in_any_order_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path)
    rng = np.random.default_rng(0)
    datums = []
    for _ in range(2_000):
        tokens = rng.integers(0, 64, 4).tolist()
        inputs = {"target_tokens": tokens[1:], "weights": [1.0, 0.5, 1.0]}
        datums.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:3]), loss_fn_inputs=inputs))
    between, state_dir = Shuffled(20), tmp_path / "state"
    shuffle, between.act = between.act, None
    running = Running(Server(config(state_dir)), between=between)

    def train(parallel: bool) -> tuple[dict[str, float], list[bytes], dict[str, np.ndarray]]:
        flags = {"fwdbwd_max_chunk_len": 100, "parallel_fwdbwd_chunks": parallel}
        monkeypatch.setattr(sessions, "CLIENT_CONFIG", sessions.CLIENT_CONFIG.model_copy(update=flags))
        client = connect(running).create_lora_training_client(base_model=model, rank=4, seed=3).result(LIMIT)
        passed = client.forward_backward(datums, "cross_entropy")
        # Compiles, too.
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(5 * LIMIT)
        output = passed.result(LIMIT)
        path = CheckpointKey.parse(client.save_state("end").result(LIMIT).path)
        state, _ = CheckpointStore(state_dir).load(path)
        logprobs = [datum["logprobs"].to_numpy().tobytes() for datum in output.loss_fn_outputs]
        return output.metrics, logprobs, dict(state.weights)

    plain = train(parallel=False)
    between.act = shuffle
    shuffled = train(parallel=True)
    running.stop()
    assert between.counts["forward_backward"] == 40
    assert shuffled[:2] == plain[:2] and len(plain[1]) == 2_000
    assert all(np.array_equal(shuffled[2][name], plain[2][name]) for name in plain[2] | shuffled[2])


def test_a_chunk_that_never_comes_fails_what_waits_and_no_more(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(pending, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.1)
    running = start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    with raw(running) as http:

        def send(number: int, datums: list[types.Datum] = DATA) -> httpx.Response:
            return http.post("/forward_backward", content=forward_backward_body(client.model_id, number, datums))

        second = send(2).json()["request_id"]
        now += 0.8 * pending.GAP_SECONDS
        third = send(3).json()["request_id"]
        now += 0.4 * pending.GAP_SECONDS
        assert poll(http, second).status_code == 408, "while others arrive, it is waited for"
        assert send(3, DATA * 2).status_code == 400, "the number is taken"
        first_poll = poll(http, third)
        assert first_poll.status_code == 408 and "request 1 of this model" in first_poll.json()["queue_state_reason"]
        now += 0.7 * pending.GAP_SECONDS
        assert poll(http, third).status_code == 200
        for request_id in (second, third):
            assert "did not come within" in poll(http, request_id).json()["error"]
        late = send(1).json()["request_id"]
        assert "came after request 3" in poll(http, late).json()["error"], "and never sets the order back"
        assert "error" not in poll(http, send(4).json()["request_id"]).text


def test_a_refused_chunk_fails_its_call_and_the_next_ones_go_on(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "GAP_SECONDS", 0.5)
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.2)

    async def refuse(served: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == f"{API}/forward_backward" and between.counts["forward_backward"] == 1:
            receive = whole_body(b"no message")
        await served(scope, receive, send)

    between = Between(refuse)
    client = connect(start(between)).create_lora_training_client(MODEL, 4).result(LIMIT)
    with pytest.raises(tinker.BadRequestError):
        client.forward_backward(DATA, "cross_entropy").result(LIMIT)
    with pytest.raises(tinker.RequestFailedError, match="number 1 of this model did not come"):
        client.optim_step(ADAM).result(LIMIT)
    client.forward_backward(DATA, "cross_entropy").result(LIMIT)
    client.optim_step(ADAM).result(LIMIT)


def test_a_number_whose_request_is_refused_is_not_waited_for(start: Any) -> None:
    running = start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    with raw(running) as http:
        wrong = {"model_id": client.model_id, "seq_id": 1, "adam_params": {"learning_rate": "fast"}}
        assert http.post("/optim_step", json=wrong).status_code == 400
        content = json.dumps(wrong | {"seq_id": 2}).replace('"fast"', "NaN")
        assert http.post("/optim_step", content=content).status_code == 400
        body = forward_backward_body(client.model_id, 3, DATA)
        third = http.post("/forward_backward", content=body).json()["request_id"]
        assert poll(http, third).headers["content-type"] == "application/x-protobuf"
