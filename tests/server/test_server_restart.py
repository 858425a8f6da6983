"""What does a client of a server lose when the server is restarted, killed, or short of memory?"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from jax_client.errors import DoesNotFitError, JaxClientError
from jax_client.runs.lifecycle import base_models
from jax_client.runs.lifecycle import run as runs
from jax_client.server.state import eviction, request_log, training_requests
from jax_client.server.state.ledger import RequestLedger
from jax_client.server.state.request_log import FILE, RequestLog
from jax_client.server.state.server import Server
from jax_client.server.wire.answers import Answer
from support.command_line import WITHOUT_TORCH
from support.server.serving import ADAM, CASE, KEY, Between, Running, config, data, held_model

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = types.ModelInput.from_ints([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with held_model(tmp_path_factory.mktemp("model")) as name:
        yield name


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = Running(Server(config(tmp_path), log=RequestLog(tmp_path)))
    yield found
    found.stop()


def again(running: Running, directory: Path) -> Running:
    return Running(Server(config(directory), log=RequestLog(directory)), running.port)


def step(client: Any) -> tuple[float, float]:
    passed, stepped = client.forward_backward(data(), "cross_entropy"), client.optim_step(ADAM)
    return passed.result().metrics["loss:sum"], stepped.result().metrics["grad_norm:mean"]


def sampled(sampler: Any) -> list[int]:
    params = types.SamplingParams(max_tokens=6, temperature=0.7, seed=5, stop=[])
    return list(sampler.sample(PROMPT, 1, params).result().sequences[0].tokens)


def test_clients_go_on_over_a_restart(model: str, tmp_path: Path) -> None:
    first = Running(Server(config(tmp_path), log=RequestLog(tmp_path)))
    service = tinker.ServiceClient(base_url=first.url, api_key=KEY, user_metadata={"who": "me"})
    client = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    halfway = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    whole = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    expected = [step(whole) for _ in range(4)]
    numbers = [step(client), step(client)]
    halfway.forward_backward(data(), "cross_entropy").result()
    sampler = service.create_sampling_client(base_model=model)
    saved = client.save_weights_for_sampler("s").result().path
    trained = service.create_sampling_client(model_path=saved)
    before = sampled(sampler), sampled(trained)
    unsaved = client.save_weights_and_get_sampling_client()
    sampled(unsaved)
    first.stop()
    second = again(first, tmp_path)
    numbers += [step(client), step(client)]
    assert numbers == expected, "bit for bit, as if nothing had happened"
    assert (sampled(sampler), sampled(trained)) == before
    with pytest.raises(tinker.NotFoundError, match="never saved"):
        sampled(unsaved)
    with pytest.raises(tinker.NotFoundError, match="was restarted"):
        halfway.optim_step(ADAM).result()
    assert client.get_info().model_name == model
    second.stop()


def test_a_killed_server_keeps_what_it_answered_and_says_what_is_lost(model: str, tmp_path: Path) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    taken.close()
    server = serve(tmp_path, port)
    service = tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key="tml-any")
    client = service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
    step(client)
    path = client.save_state("good").result().path
    sampler = service.create_sampling_client(base_model=model)
    expected = sampled(sampler)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=60)

    def ask(request_id: str) -> httpx.Response:
        return http.post("/retrieve_future", json={"request_id": request_id})

    answered = f"{client.model_id}:2"
    assert ask(answered).json()["metrics"]["step:max"] == 1.0
    long = types.SamplingParams(max_tokens=CASE["max_position_embeddings"] - 8, temperature=1.0, seed=1, stop=[])
    pending = [sampler.sample(PROMPT, 4, long) for _ in range(16)]
    training = client.forward_backward(data() * 60, "cross_entropy")
    time.sleep(0.3)
    server.kill()
    server.wait()
    server = serve(tmp_path, port)
    assert ask(answered).json()["metrics"]["step:max"] == 1.0
    with pytest.raises(tinker.TinkerError, match=path):
        training.result(timeout=60)
    assert all(len(each.result(timeout=60).sequences) == 4 for each in pending), "the SDK asked again"
    with pytest.raises(tinker.NotFoundError, match=path):
        client.optim_step(ADAM).result(timeout=60)
    assert sampled(sampler) == expected
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    step(resumed)
    server.send_signal(signal.SIGTERM)
    server.wait(60)


def serve(home: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "serve"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CLIENT_HOME": str(home)}
    # Tests name the model by its path, which they made in a temporary directory.
    own = ["--models-dir", tempfile.gettempdir()]
    server = subprocess.Popen([*command, "--port", str(port), "--dtype", "float32", *own], env=env)
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/api/v1/get_server_capabilities")
            return server
        except httpx.TransportError:
            assert server.poll() is None
            time.sleep(0.1)


def test_idle_models_make_room_and_come_back_as_they_were(
    model: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "IDLE_SECONDS", 0.0)
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    whole = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    expected = [step(whole), step(whole)]
    idle = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    numbers = [step(idle)]
    holding = service.create_lora_training_client(base_model=model, rank=4, seed=2).result()
    holding.forward_backward(data(), "cross_entropy").result()
    sampler = service.create_sampling_client(base_model=model)
    before = sampled(sampler)

    def there() -> set[str]:
        return {key for key, each in running.server.live.models.items() if each.evictable.value is not None}

    made, create = [], runs.create_run

    def tight(*args: Any) -> Any:
        if len(there()) > 1:
            raise DoesNotFitError("full", category="user")
        made.append(args[1])
        return create(*args)

    monkeypatch.setattr(training_requests, "create_run", tight)
    newcomer = service.create_lora_training_client(base_model=model, rank=4, seed=3).result()
    assert there() == {holding.model_id, newcomer.model_id}, "what holds gradients stays"
    numbers.append(step(idle))
    assert numbers == expected and idle.model_id in there()
    assert sampled(sampler) == before
    holding.optim_step(ADAM).result()


def test_a_base_model_that_nobody_uses_makes_room(
    model: str, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "IDLE_SECONDS", 0.0)
    other = shutil.copytree(model, tmp_path / "other")
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    sampler = service.create_sampling_client(base_model=str(other))
    before, create = sampled(sampler), runs.create_run
    loaded = lambda: {Path(each.source.path).name for each in base_models.shared.loaded()}  # noqa: E731

    def tight(*args: Any) -> Any:
        if "other" in loaded():
            raise DoesNotFitError("full", category="user")
        return create(*args)

    monkeypatch.setattr(training_requests, "create_run", tight)
    service.create_lora_training_client(base_model=model, rank=4, seed=3).result()
    assert "other" not in loaded()
    assert sampled(sampler) == before and "other" in loaded()


def test_a_request_that_does_not_fit_with_nothing_idle_is_refused(
    model: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise DoesNotFitError("there is no room at all", category="user")

    monkeypatch.setattr(training_requests, "create_run", full)
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    with pytest.raises(tinker.RequestFailedError, match="no room at all"):
        service.create_lora_training_client(base_model=model, rank=4).result()


def test_superseded_samplers_leave_the_device_and_still_answer(
    model: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "ON_DEVICE", 1)
    monkeypatch.setattr(eviction, "IN_MEMORY", 3)
    client = tinker.ServiceClient(base_url=running.url, api_key=KEY).create_lora_training_client(model, 4, 1).result()
    samplers, first = [], []
    for _ in range(4):
        step(client)
        samplers.append(client.save_weights_and_get_sampling_client())
        first.append(sampled(samplers[-1]))
    follower = client.save_weights_and_get_sampling_client(kind="inflight").result()
    here = [each.evictable.value is not None for each in running.server.live.samplers.values() if each.ephemeral]
    assert here == [False, False, True], "one was forgotten, two are on the host"
    assert [sampled(each) for each in samplers[1:]] == first[1:]
    with pytest.raises(tinker.NotFoundError):
        sampled(samplers[0])
    for _ in range(4):
        step(client)
        client.save_weights_and_get_sampling_client(kind="inflight").result()
    newest = client.save_weights_and_get_sampling_client()
    assert sampled(follower) == sampled(newest), "it follows its run, however many have come after it"


def test_samples_asked_for_together_are_those_asked_for_alone_also_after_a_restart(model: str, tmp_path: Path) -> None:
    between = Between()
    first = Running(Server(config(tmp_path), log=RequestLog(tmp_path)), between=between)
    service = tinker.ServiceClient(base_url=first.url, api_key=KEY)
    sampler = service.create_sampling_client(base_model=model)
    params = [types.SamplingParams(max_tokens=4, temperature=1.0, seed=i, stop=[]) for i in range(20)]
    alone = [sampler.sample(PROMPT, 1, each).result().sequences[0].tokens for each in params]
    together = [sampler.sample(PROMPT, 1, each) for each in params]
    assert [each.result().sequences[0].tokens for each in together] == alone
    with pytest.raises(tinker.RequestFailedError, match="max_tokens"):
        sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=-1)).result()
    first.stop()
    second = again(first, tmp_path)
    assert sampler.sample(PROMPT, 1, params[3]).result().sequences[0].tokens == alone[3]
    assert not between.counts["retrieve_futures"], "the server tells the SDK to poll for each request"
    second.stop()


def test_a_cancelled_request_frees_its_place(model: str, running: Running) -> None:
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    sampler = service.create_sampling_client(base_model=model)
    sampled(sampler)
    http = httpx.Client(base_url=running.url + "/api/v1", headers={"X-API-Key": KEY}, timeout=60)
    params = {"max_tokens": CASE["max_position_embeddings"] - 8, "stop": []}
    body = {
        "sampling_session_id": running.server.live.samplers.items()[0][0],
        "seq_id": 77,
        "num_samples": 64,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": params,
    }
    request_id = http.post("/asample", json=body).json()["request_id"]
    assert http.post("/cancel_future", json={"request_id": request_id}).is_success
    answer = http.post("/retrieve_future", json={"request_id": request_id}).json()
    assert "cancelled" in answer["error"]
    assert http.post("/cancel_future", json={"request_id": request_id}).is_success, "twice is no error"
    assert not running.server.ledger.unanswered()


def test_clients_that_join_a_sampler_get_numbers_of_their_own(model: str, tmp_path: Path) -> None:
    first = Server(config(tmp_path), log=RequestLog(tmp_path))
    made = first.create_session(types.CreateSessionRequest(tags=[], user_metadata=None, sdk_version="0.38"))
    asked = types.CreateSamplingSessionRequest(session_id=made.session_id, sampling_session_seq_id=0, base_model=model)
    sampler_id = first.sampling.create_sampling_session(asked).sampling_session_id
    first.sampling.sampler(sampler_id).result()
    numbers = [first.sampling.join_sampling_session(sampler_id) for _ in range(3)]
    first.close(60)
    second = Server(config(tmp_path), log=RequestLog(tmp_path))
    assert [*numbers, second.sampling.join_sampling_session(sampler_id)] == [1, 2, 3, 4]
    second.live.forget_session(made.session_id)
    made = second.create_session(types.CreateSessionRequest(tags=[], user_metadata=None, sdk_version="0.38"))
    asked = asked.model_copy(update={"session_id": made.session_id})
    other = second.sampling.create_sampling_session(asked).sampling_session_id
    assert second.sampling.join_sampling_session(other) == 5, "answers outlive a session, and no number is given twice"
    second.close(60)


def test_a_damaged_request_log_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all" * 1000)
    log = RequestLog(tmp_path)
    log.put("session", "s", {"a": 1})
    assert log.get("session", "s") == {"a": 1} and "is damaged" in caplog.text
    log.close()
    assert len(list(tmp_path.glob("server.damaged-*"))) == 1


def test_a_request_log_that_cannot_be_opened_now_is_not_set_aside(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    log.put("session", "s", {"a": 1})
    log.close()
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()  # SQLite: unable to open database file
    with pytest.raises(JaxClientError, match="cannot be opened: unable to open database file"):
        RequestLog(tmp_path)
    (tmp_path / FILE).rmdir()
    (tmp_path / FILE).write_bytes(whole)
    log = RequestLog(tmp_path)
    assert log.get("session", "s") == {"a": 1}
    log.close()


def test_a_clock_that_jumps_over_a_restart_forgets_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 2e9}
    monkeypatch.setattr(request_log, "time", SimpleNamespace(time=lambda: clock["now"]))
    decade, month = 10 * 365 * 86400.0, request_log.FORGOTTEN_SECONDS

    def known() -> set[str]:
        log = RequestLog(tmp_path)
        found = {name for name in ("old", "new", "newest") if log.get("session", name) is not None}
        log.close()
        return found

    log = RequestLog(tmp_path)
    for name, now in (("old", 2e9), ("new", 2e9 + 0.9 * month)):
        clock["now"] = now
        log.put("session", name, {})
    log.close()
    for jump in (decade, -decade, 0.0, decade):
        clock["now"] = 2e9 + 0.9 * month + jump
        assert known() == {"old", "new"}
    clock["now"] = 2e9 + 1.1 * month
    log = RequestLog(tmp_path)
    log.put("session", "newest", {})
    log.close()
    assert known() == {"new", "newest"}, "a month passed, and the server was used: who came before it is forgotten"


def test_old_answers_make_room_for_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_client.server.state.request_log.MAX_ANSWERS", 10)
    monkeypatch.setattr("jax_client.server.state.request_log._MORE_ANSWERS", 5)
    monkeypatch.setattr("jax_client.server.state.ledger.MAX_LOGGED_ANSWERS", 3)
    log = RequestLog(tmp_path)
    ledger = RequestLedger(log)
    for i in range(40):
        pending, new = ledger.accept(f"s:{i}", b"d", "sample")
        assert new
        pending.settle(Answer(body=str(i).encode()))
    for i in (39, 36, 31):
        assert ledger.get(f"s:{i}").answer.result().body == str(i).encode()
        assert ledger.accept(f"s:{i}", b"d", "sample")[1] is False
    log.close()
    reopened = RequestLog(tmp_path)
    kept = [entry for i in range(40) if (entry := reopened.find(f"s:{i}")) is not None]
    reopened.close()
    assert len(kept) == 10 and all(entry.answer is not None and entry.answer.body for entry in kept)


def test_the_memory_of_a_client_that_is_gone_is_given_to_the_next(
    model: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died between a pass and its step: such a run cannot be unloaded and brought back."""
    gone = tinker.ServiceClient(base_url=running.url, api_key=KEY).create_lora_training_client(model, 4, 1).result()
    step(gone)
    gone.forward_backward(data(), "cross_entropy").result()
    session_id = gone.model_id.partition(":")[0]
    make, failures = training_requests.create_run, []

    def full_until_it_ended(session: Any, run_id: str, *args: Any) -> Any:
        if not running.server.live.sessions.in_memory(session_id).closed:
            failures.append(run_id)
            raise DoesNotFitError("too little memory")
        return make(session, run_id, *args)

    monkeypatch.setattr(training_requests, "create_run", full_until_it_ended)
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    with pytest.raises(tinker.RequestFailedError, match="too little memory"):
        service.create_lora_training_client(model, 4, 2).result()
    running.server.live._use._signs[session_id] = 0.0  # no sign of life for long
    monkeypatch.setattr(running.server.live.model(gone.model_id).evictable, "_last_used", 0.0)
    step(service.create_lora_training_client(model, 4, 3).result())
    assert len(failures) == 2
    assert running.server.live.models.in_memory(gone.model_id) is None
    with pytest.raises(tinker.TinkerError):
        step(gone)
