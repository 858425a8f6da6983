"""Does the unmodified SDK come through what networks, other clients and its own mistakes do to its requests?"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types
from tinker.lib.api_future_impl import _APIFuture
from tinker.types import UntypedAPIFuture

import jax_client
from jax_client.checkpoint.store import CheckpointStore
from jax_client.server.routes import polling, sessions
from jax_client.server.state import pending
from jax_client.server.state.request_log import RequestLog
from jax_client.server.state.server import Server
from jax_client.server.wire import bodies, connections
from jax_client.server.wire.admission import AdmissionLimits
from jax_client.values import CheckpointKey
from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT, datum
from support.serving import (
    API,
    KEY,
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
loaded = fake_engine.loaded
# What the SDK may take for its reaction; a hang is a failure.
LIMIT = 60


@pytest.fixture
def start(loaded: Any, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start servers over the fake engine; they are stopped at the end."""
    started = []

    def begin(between: Callable[[Any], Any] = lambda app: app) -> Running:
        log = RequestLog(tmp_path) if not started else None
        server = Server(jax_client.EngineConfig(state_dir=tmp_path), log=log)
        started.append(Running(server, between=between))
        return started[-1]

    yield begin
    for engine in loaded:
        engine.gate.set()
    for running in started:
        running.stop()


def connect(running: Running) -> Any:
    return tinker.ServiceClient(base_url=running.url, api_key=KEY)


def raw(running: Running) -> httpx.Client:
    return httpx.Client(base_url=running.url + API, headers={"X-API-Key": KEY}, timeout=LIMIT)


def poll(http: httpx.Client, request_id: str) -> httpx.Response:
    return http.post("/retrieve_future", json={"request_id": request_id})


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def sample_body(running: Running, number: int, **more: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": running.server.live.samplers.items()[0][0],
        "seq_id": number,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 4},
        **more,
    }


# Chunks of one call


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
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(LIMIT)
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
    monkeypatch.setattr(pending, "GAP_SECONDS", 0.5)
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.1)
    running = start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    with raw(running) as http:

        def send(number: int, datums: list[types.Datum] = DATA) -> httpx.Response:
            return http.post("/forward_backward", content=forward_backward_body(client.model_id, number, datums))

        second = send(2).json()["request_id"]
        time.sleep(0.4)
        third = send(3).json()["request_id"]
        time.sleep(0.2)
        assert poll(http, second).status_code == 408, "while others arrive, it is waited for"
        assert send(3, DATA * 2).status_code == 400, "the number is taken"
        first_poll = poll(http, third)
        assert first_poll.status_code == 408 and "request 1 of this model" in first_poll.json()["queue_state_reason"]
        wait_for(lambda: poll(http, third).status_code == 200)
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


# What the server says, and what the SDK makes of it


def test_errors_are_raised_where_and_as_what_they_are(start: Any, loaded: Any) -> None:
    running = start()
    service = connect(running)
    with pytest.raises(tinker.TinkerError, match="there is no model 'missing'"):
        service.create_lora_training_client("missing", 4).result(LIMIT)
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    with pytest.raises(tinker.RequestFailedError, match="no gradients") as failed:
        client.optim_step(ADAM).result(LIMIT)
    assert failed.value.category == types.RequestErrorCategory.User
    loaded[0].forward_backward = lambda *_: 1 / 0
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


# Twins


class Twice(Between):
    """Sends every POST twice, as a client does that lost the first answer."""

    def __init__(self) -> None:
        super().__init__(self._twice)
        self.paths: set[str] = set()

    async def _twice(self, served: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] != "POST":
            await served(scope, receive, send)
            return
        self.paths.add(scope["path"].removeprefix(API + "/"))
        body = await body_of(receive)
        await served(scope, whole_body(body), nowhere)
        await served(scope, whole_body(body), send)


def use_everything(running: Running) -> tuple[list[float], list[str]]:
    service = connect(running)
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    numbers = []
    for _ in range(2):
        client.forward_backward(DATA, "cross_entropy").result(LIMIT)
        numbers.append(client.optim_step(ADAM).result(LIMIT).metrics["grad_norm:mean"])
    path = client.save_state("a").result(LIMIT).path
    client.load_state_with_optimizer(path).result(LIMIT)
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    saved = client.save_weights_for_sampler("s").result(LIMIT).path
    service.create_sampling_client(saved).sample(PROMPT, 1, PARAMS).result(LIMIT)
    resumed = service.create_training_client_from_state_with_optimizer(path).result(LIMIT)
    resumed.forward_backward(DATA, "cross_entropy").result(LIMIT)
    logprobs = resumed.forward(DATA, "cross_entropy").result(LIMIT).loss_fn_outputs[0]["logprobs"].to_numpy()
    numbers.extend(logprobs.tolist())
    return numbers, [str(record.name) for record in running.server.live.own.store.list()]


def test_what_is_sent_twice_is_done_once(start: Any, loaded: Any) -> None:
    once = use_everything(start())
    twice = Twice()
    again = use_everything(start(twice))
    assert again[0] == once[0]
    assert sorted(again[1]) == sorted(once[1] * 2), "those of the first server, and as many"
    assert loaded[0].log == 2 * loaded[0].log[: len(loaded[0].log) // 2]
    promising = {"create_model", "load_weights", "optim_step", "save_weights", "save_weights_for_sampler"}
    assert twice.paths >= promising | {"forward_backward", "asample", "retrieve_future", "create_sampling_session"}


# Clients that go away, are slow, or lie


def sent(running: Running, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    connection.sendall(f"{head}\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\n".encode() + body)
    return connection


def received(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        # A server that closes before it has read everything resets the connection.
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionResetError:
            pass
    return found


def in_use(running: Running) -> tuple[int, int, int, int]:
    state = running.http.server_state
    return len(state.tasks), len(state.connections), running.server.admission.bytes, running.server.admission.requests


def test_clients_that_go_away_leave_nothing_behind(start: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.5)
    running = start()
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    wait_for(lambda: in_use(running)[0] == 0)
    before, files = in_use(running), len(os.listdir("/proc/self/fd"))
    loaded[0].gate.clear()
    with raw(running) as http:
        request_id = http.post("/asample", json=sample_body(running, 77)).json()["request_id"]
    for _ in range(20):
        half = f"POST {API}/forward_backward HTTP/1.1\r\nContent-Length: 100000"
        sent(running, half, b"\r\n" + b"x" * 50_000).close()
        asked = json.dumps({"request_id": request_id}).encode()
        waiting = f"POST {API}/retrieve_future HTTP/1.1\r\nContent-Length: {len(asked)}"
        sent(running, waiting, b"\r\n" + asked).close()
    loaded[0].gate.set()
    wait_for(lambda: in_use(running) == before)
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files)
    with raw(running) as http:
        assert poll(http, request_id).headers["content-type"] == "application/x-protobuf"


def test_slow_and_lying_clients_are_cut_off(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "MAX_BYTES", 10_000)
    running = start()
    post = f"POST {API}/forward_backward HTTP/1.1"
    silent = socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT)
    cases = {
        b"": silent,
        b" 408 ": sent(running, f"{post}\r\nContent-Length: 100", b"\r\nten bytes."),
        b" 400 ": sent(running, f"{post}\r\nContent-Length: -1", b"\r\n"),
        b" 413 ": sent(running, f"{post}\r\nTransfer-Encoding: chunked", b"\r\n"),
    }
    with pytest.raises(OSError):
        for _ in range(10_000):
            cases[b" 413 "].sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    for status, connection in cases.items():
        answer = received(connection)
        assert status in answer[:20] or status == b" 413 ", (status, answer)
        assert b"Traceback" not in answer
    loris = sent(running, f"GET {API}/healthz HTTP/1.1")
    with pytest.raises(OSError):
        for _ in range(100):
            loris.sendall(b"X-More: 1\r\n")
            time.sleep(0.1)
    loris.close()
    large = sent(running, f"GET {API}/healthz HTTP/1.1")
    with pytest.raises(OSError):
        for _ in range(1_000):
            large.sendall(b"X-Large: " + b"x" * 10_000)
    large.close()
    for start_line in (
        "GET http://[::1 HTTP/1.1",
        "GET * HTTP/1.1",
        "G\0T / HTTP/1.1",
        "GET /%ff%00 HTTP/9.9",
        "\x16\x03\x01",
    ):
        with sent(running, start_line, b"Connection: close\r\n\r\n") as odd:
            assert odd.recv(13)[9:10] == b"4", start_line
    smuggled = received(
        sent(running, f"{post}\r\nContent-Length: 1", b"\r\nxGET /evil HTTP/1.1\r\nConnection: close\r\n\r\n")
    )
    assert smuggled.count(b"HTTP/1.1 4") == 2, "a body, and a request without a host"
    wait_for(lambda: in_use(running) == (0, 0, 0, 0))


@pytest.mark.parametrize("of", ["training_runs/{}", "training_runs/{}/checkpoints", "samplers/{}", "sessions/{}"])
def test_names_in_paths_are_only_looked_up(start: Any, of: str) -> None:
    with raw(start()) as http:
        for name in ("..%2f..%2fetc%2fpasswd", "%00", "%2e%2e", "%ff%fe", "a%0d%0ab", "x" * 5_000, "%252e"):
            answer = http.get("/" + of.format(name))
            assert answer.status_code in (400, 404), (name, answer.text)
            assert "/jax_client/" not in answer.text
        kinds = "/training_runs/x/checkpoints/{}/{}"
        for kind, name in (("weights", "%00"), ("%2e%2e", "%2e%2e"), ("sampler_weights", "%2e%2e")):
            assert http.delete(kinds.format(kind, name)).status_code in (400, 404)
            assert http.put(kinds.format(kind, name) + "/ttl", json={"ttl_seconds": 1}).status_code in (400, 404)


def test_pages_are_numbers_in_range(start: Any) -> None:
    with raw(start()) as http:
        for path in ("training_runs", "checkpoints", "sessions"):
            for query in ("limit=-1", "limit=1000000000000", "limit=a", "offset=-1", "limit=1e3", "offset=٣", "limit="):
                answer = http.get(f"/{path}?{query}")
                assert answer.status_code == 400 and query.split("=")[0] in answer.text, (path, query, answer.text)
        assert http.get("/training_runs?limit=5&offset=3").status_code == 200
        assert httpx.get(f"{http.base_url}training_runs?X-API-Key={KEY}", timeout=LIMIT).status_code == 401


def test_deleting_a_checkpoint_leaves_open_samplers_alone(start: Any) -> None:
    service = connect(start())
    client = service.create_lora_training_client(MODEL, 4).result(LIMIT)
    path = client.save_weights_for_sampler("s").result(LIMIT).path
    sampler = service.create_sampling_client(path)
    first = sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result(LIMIT)
    assert sampler.sample(PROMPT, 1, PARAMS).result(LIMIT).sequences[0].tokens == first.sequences[0].tokens
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(path).result(LIMIT)


# More than there is room for


def test_a_full_queue_costs_time_and_no_request(start: Any, loaded: Any) -> None:
    between = Between()
    running = start(between)
    running.server.admission = AdmissionLimits(max_requests=8)
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    loaded[0].gate.clear()
    asked = [sampler.sample(types.ModelInput.from_ints([1, 2, 3, i]), 1, PARAMS) for i in range(12)]
    wait_for(lambda: running.server.admission.requests == 8 and between.counts["asample"] > 9)
    with raw(running) as http:
        refused = http.post("/asample", json=sample_body(running, 10**6))
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert "8 sampling requests" in refused.json()["detail"]
    loaded[0].gate.set()
    assert all(each.result(LIMIT).sequences[0].tokens == [5, 2] for each in asked)
    prompts = [request.tokens_T.tolist() for request in loaded[0].requests[1:]]
    assert sorted(prompts) == [[1, 2, 3, i] for i in range(12)], "none was lost, none came twice"
    assert running.server.admission.requests == running.server.admission.samples == 0


def test_samples_count_too_and_one_large_request_always_fits(start: Any, loaded: Any) -> None:
    running = start()
    running.server.admission = AdmissionLimits(max_samples=100)
    connect(running).create_sampling_client(base_model=MODEL).sample(PROMPT, 1, PARAMS).result(LIMIT)
    loaded[0].gate.clear()
    with raw(running) as http:
        for number, samples, status in ((1, 500, 200), (2, 1, 429)):
            body = sample_body(running, 10**6 + number, num_samples=samples)
            assert http.post("/asample", json=body).status_code == status
        assert http.post("/asample", json=sample_body(running, 10**6 + 1, num_samples=500)).status_code in (200, 429)
        for samples in (0, -1, 10**9):
            running.server.admission = AdmissionLimits()
            body = sample_body(running, 10**7 + samples, num_samples=samples)
            request_id = http.post("/asample", json=body).json()["request_id"]
            assert "num_samples" in poll(http, request_id).json()["error"]


def test_bodies_wait_for_room(start: Any, loaded: Any) -> None:
    between = Between()
    running = start(between)
    body = len(forward_backward_body("x" * 44, 1, DATA))
    running.server.admission = AdmissionLimits(max_bytes=4 * body)
    clients = [connect(running).create_lora_training_client(MODEL, 4).result(LIMIT) for _ in range(2)]
    loaded[0].gate.clear()
    passes = [client.forward_backward(DATA, "cross_entropy") for _ in range(3) for client in clients]
    wait_for(lambda: between.counts["forward_backward"] > 6)
    assert 0 < running.server.admission.bytes <= 4 * body
    with raw(running) as http:
        assert http.post("/forward_backward", content=forward_backward_body("x", 1, DATA * 9)).status_code == 429
        assert http.get("/healthz").status_code == 200
    loaded[0].gate.set()
    assert all(each.result(LIMIT).metrics["loss:sum"] == 1.0 for each in passes)
    assert loaded[0].log.count("forward_backward") == 6 and running.server.admission.bytes == 0


def test_slow_bodies_hold_no_more_than_the_limit(start: Any) -> None:
    running = start()
    running.server.admission = AdmissionLimits(max_bytes=1_000_000)
    head = f"POST {API}/forward_backward HTTP/1.1\r\nContent-Length: 5000000"
    slow = [sent(running, head, b"\r\n" + b"x" * 100_000) for _ in range(20)]
    wait_for(lambda: running.server.admission.bytes > 800_000)
    time.sleep(0.2)
    assert running.server.admission.bytes <= 1_000_000
    sampler = connect(running).create_sampling_client(base_model=MODEL).result(LIMIT)
    for connection in slow[:5]:
        connection.close()
    assert sampler.sample(PROMPT, 1, PARAMS).result(LIMIT)
    for connection in slow:
        connection.close()
    wait_for(lambda: running.server.admission.bytes == 0)


def test_what_waits_for_nothing_makes_room(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "GAP_SECONDS", 0.3)
    running = start()
    client = connect(running).create_lora_training_client(MODEL, 4).result(LIMIT)
    body = forward_backward_body(client.model_id, 2, [datum()] * 20)
    running.server.admission = AdmissionLimits(running.server.ledger.queues.give_up, max_bytes=len(body) + 10)
    with raw(running) as http:
        waiting = http.post("/forward_backward", content=body).json()["request_id"]
        third = forward_backward_body(client.model_id, 3, [datum()] * 20)
        assert http.post("/forward_backward", content=third).status_code == 429
        wait_for(lambda: http.post("/forward_backward", content=third).status_code == 200)
        assert "did not come" in poll(http, waiting).json()["error"]
