"""Does the unmodified SDK get from a server what it gets in-process?"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from starlette.responses import JSONResponse
from tinker import types

import jax_client
from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import main
from jax_client.losses.registry import LOSSES
from jax_client.server.model_names import ModelNames
from jax_client.server.state.server import Server
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.guard import SIGNED, Guard
from support.calls import datum, rl
from support.command_line import WITHOUT_TORCH
from support.server.serving import ADAM, KEY, Running, config, data, write_model

# The SDK's own HTTP stack and pydantic warn in ways that are not this package's to fix.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Running]:
    found = Running(Server(config(tmp_path_factory.mktemp("state")), ModelNames({"Some/Alias": model})))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def service(running: Running) -> Any:
    return tinker.ServiceClient(base_url=running.url, api_key=KEY)


def train(service: Any, model: str) -> dict[str, Any]:
    """A loop as users write it, on whatever service it is given; return all its numbers."""
    client = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    metrics = []
    for _ in range(3):
        fwdbwd = client.forward_backward(data(), "cross_entropy")
        step = client.optim_step(ADAM)
        metrics.append((fwdbwd.result().metrics["loss:sum"], step.result().metrics["grad_norm:mean"]))
    outputs = client.forward(data(), "cross_entropy").result().loss_fn_outputs
    prompt = types.ModelInput.from_ints([3, 1, 4, 1, 5])
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=8, temperature=0.7, seed=5, stop=[])
    answer = sampler.sample(
        prompt, 3, params, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=2
    ).result()
    return {
        "client": client,
        "metrics": metrics,
        "logprobs": [output["logprobs"].to_numpy() for output in outputs],
        "tokens": [sequence.tokens for sequence in answer.sequences],
        "sampled": [np.asarray(sequence.logprobs) for sequence in answer.sequences],
        "prompt": answer.prompt_logprobs,
        "topk": answer.topk_prompt_logprobs,
        "scores": sampler.compute_logprobs(prompt).result(),
    }


def test_the_numbers_are_those_of_the_same_loop_in_process(service: Any, model: str, tmp_path: Path) -> None:
    served = train(service, model)
    with jax_client.ServiceClient(config=config(tmp_path)) as local:
        ours = train(local, model)
    assert served["metrics"] == ours["metrics"]
    for name in ("logprobs", "sampled"):
        for theirs, mine in zip(served[name], ours[name], strict=True):
            np.testing.assert_array_equal(theirs, mine)
    for name in ("tokens", "prompt", "topk", "scores"):
        assert served[name] == ours[name], name


def test_spans_of_provenance_cost_nothing_with_any_loss(service: Any, model: str, tmp_path: Path) -> None:
    prompt, sampled = types.PromptProvenanceSpan, types.SampledProvenanceSpan
    spans = {
        "model_input": [prompt(sequence_id="s", length=2), sampled(sequence_id="s", length=1)],
        "loss_fn_inputs": [prompt(sequence_id="s", offset=1, length=1), sampled(sequence_id="s", length=2)],
    }
    with jax_client.ServiceClient(config=config(tmp_path)) as local:
        for client in (each.create_lora_training_client(model, rank=4, seed=1).result() for each in (service, local)):
            for loss in LOSSES:
                plain = datum() if loss == "cross_entropy" else rl()
                futures = [client.forward([each], loss) for each in (plain, plain.with_provenance(**spans))]
                one, other = (future.result().metrics for future in futures)
                assert one == other


def trained(service: Any, model: str) -> Any:
    """Return a client after one step."""
    client = service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
    client.forward_backward(data(), "cross_entropy")
    client.optim_step(ADAM).result()
    return client


def test_saved_state_comes_back_bit_for_bit(service: Any) -> None:
    client = trained(service, "Some/Alias")
    path = client.save_state("a").result().path
    assert path == f"tinker://{client.model_id}/weights/a"
    with pytest.raises(tinker.RequestFailedError, match="overwrite=True"):
        client.save_state("a").result()
    before = client.forward(data(), "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    client.forward_backward(data(), "cross_entropy")
    client.optim_step(ADAM).result()
    client.load_state_with_optimizer(path).result()
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    for each in (client, resumed):
        logprobs = each.forward(data(), "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
        np.testing.assert_array_equal(logprobs, before)


def test_saved_weights_are_sampled_from(service: Any, model: str) -> None:
    client = trained(service, "Some/Alias")
    saved = client.save_weights_for_sampler("s").result().path
    sampler = service.create_sampling_client(model_path=saved)
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    assert len(sampler.sample(types.ModelInput.from_ints([3, 1, 4]), 1, params).result().sequences[0].tokens) == 4
    info = client.get_info()
    assert info.lora_rank == 4 and info.model_name == model


def test_checkpoints_are_listed_changed_and_deleted(service: Any) -> None:
    client = trained(service, "Some/Alias")
    path = client.save_state("a", user_metadata={"k": "v"}).result().path
    client.save_weights_for_sampler("s").result()
    rest = service.create_rest_client()
    listed = {c.checkpoint_id for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert listed == {"weights/a", "sampler_weights/s"}
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    (mine,) = [c for c in rest.list_user_checkpoints().result().checkpoints if c.tinker_path == path]
    assert mine.public and mine.expires_at is not None and mine.user_metadata == {"k": "v"}
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    assert rest.get_training_run(client.model_id).result().last_checkpoint.tinker_path == path
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        rest.get_weights_info_by_tinker_path(path).result()


def test_wrong_requests_are_refused_by_name(service: Any, model: str) -> None:
    with pytest.raises(tinker.TinkerError, match="no-such-model"):
        service.create_lora_training_client(base_model="./no-such-model", rank=4).result()
    client = service.create_lora_training_client(base_model=model, rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="no gradients"):
        client.optim_step(ADAM).result()
    bad = [types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 10**6]})]
    with pytest.raises(tinker.RequestFailedError, match="1000000"):
        client.forward_backward(bad, "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match="no X25519 public key"):
        client.save_weights_external("x", age_encryption_recipients=["age1x"]).result()
    assert client.forward_backward(data(), "cross_entropy").result().metrics["loss:sum"] > 0, "and goes on"
    client.optim_step(ADAM).result()
    sampler = service.create_sampling_client(base_model=model)
    with pytest.raises(tinker.RequestFailedError, match="max_tokens"):
        sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=-1)).result()
    with pytest.raises(tinker.NotFoundError, match="has no checkpoint"):
        service.create_sampling_client(model_path=f"tinker://{client.model_id}/sampler_weights/none").result()


def test_what_only_a_hosted_service_has_is_refused_by_name(running: Running) -> None:
    admin = tinker.AdminClient(base_url=running.url, api_key=KEY)
    for call, text in (
        (admin.get_audit_log, "get_audit_log is not served: there is no organisation"),
        (admin.get_current_checkpoint_storage_usage, "use list_user_checkpoints"),
        (lambda: admin.get_billing_usage("2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z"), "nothing is billed"),
        (lambda: tinker.RestClient(base_url=running.url, api_key=KEY).export_session_trace("s"), "not traced"),
    ):
        with pytest.raises(tinker.BadRequestError, match=text):
            call().result()


def test_requests_start_in_order_and_once(running: Running, service: Any, model: str) -> None:
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.types.forward_backward_input import ForwardBackwardInput
    from tinker.types.forward_backward_request import ForwardBackwardRequest

    session = httpx.Client(base_url=running.url, headers={"X-API-Key": KEY}, timeout=60)
    made = session.post(
        "/api/v1/create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0.38"}
    ).json()
    lora = {"rank": 4, "seed": 3}
    body = {"session_id": made["session_id"], "model_seq_id": 0, "base_model": model, "lora_config": lora}
    first = session.post("/api/v1/create_model", json=body).json()
    assert session.post("/api/v1/create_model", json=body).json() == first

    def answer(request_id: str) -> httpx.Response:
        return session.post("/api/v1/retrieve_future", json={"request_id": request_id})

    model_id = answer(first["request_id"]).json()["model_id"]
    assert model_id == f"{made['session_id']}:train:0"

    def chunk(number: int, datums: list[types.Datum]) -> httpx.Response:
        asked = ForwardBackwardRequest(
            model_id=model_id,
            seq_id=number,
            forward_backward_input=ForwardBackwardInput(data=datums, loss_fn="cross_entropy"),
        )
        content = forward_backward_request_to_proto(asked).SerializeToString()
        headers = {"Content-Type": "application/x-protobuf"}
        return session.post("/api/v1/forward_backward", content=content, headers=headers)

    step = {"model_id": model_id, "seq_id": 3, "adam_params": {"learning_rate": 0.01}}
    stepped = session.post("/api/v1/optim_step", json=step).json()
    second = chunk(2, data()[1:]).json()
    assert chunk(2, data()[1:]).json() == second, "sent twice, known once"
    assert chunk(2, data()[:1]).status_code == 400
    first = chunk(1, data()[:1]).json()
    assert answer(stepped["request_id"]).json()["metrics"]["step:max"] == 1.0
    for request_id in (first["request_id"], second["request_id"]):
        assert answer(request_id).headers["content-type"] == "application/x-protobuf"
    assert answer("nothing").status_code == 404
    client = service.create_lora_training_client(base_model=model, rank=4, seed=3).result()
    whole = client.forward_backward(data(), "cross_entropy")
    norm = client.optim_step(ADAM).result().metrics["grad_norm:mean"]
    assert norm == pytest.approx(answer(stepped["request_id"]).json()["metrics"]["grad_norm:mean"], rel=1e-5)
    assert whole.result().metrics["loss:sum"] > 0


def test_a_host_is_known_however_its_name_is_written() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({})(scope, receive, send)

    async def status(host: str) -> int:
        transport = httpx.ASGITransport(Guard(answer, api_key=None, hosts=["DGX-A100", "127.0.0.1"], account=Account))
        async with httpx.AsyncClient(transport=transport, base_url="http://any:8000") as client:
            return (await client.get("/", headers={"Host": host})).status_code

    found = [asyncio.run(status(host)) for host in ("DGX-A100:8000", "dgx-a100", "127.0.0.1", "dgx-a1000")]
    assert found == [200, 200, 200, 403]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"X-API-Key": "tml-wrong"}, 401),
        ({"X-API-Key": KEY, "Host": "evil.example"}, 403),
        ({"X-API-Key": KEY, "Origin": "http://evil.example"}, 403),
        ({"X-API-Key": KEY, "Origin": "null"}, 403),
        ({"X-API-Key": KEY}, None),
    ],
)
def test_every_route_is_guarded(running: Running, headers: dict[str, str], status: int | None) -> None:
    from jax_client.server.app import routes

    for route in routes(running.server):
        if route.path.startswith(SIGNED):  # a link's signature stands in for the key: without one it is refused
            answer = httpx.get(f"{running.url}{SIGNED}run/name/file", headers=headers, timeout=10)
            assert answer.status_code == 403, route.path
            continue
        path = route.path.replace("{sampler:path}", "x").replace("{", "").replace("}", "")
        for method in route.methods - {"HEAD"}:
            answer = httpx.request(method, running.url + path, headers=headers, content=b"{}", timeout=10)
            assert answer.status_code < 500
            assert answer.status_code == status if status else answer.status_code not in (401, 403), (method, path)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a": NaN}', {}, 400),
        (b"[]", {}, 400),
        (b'{"session_id": 1}', {}, 400),
        (b"x", {"Content-Encoding": "gzip"}, 415),
        (b"x", {"Content-Encoding": "zstd"}, 400),
    ],
)
def test_bodies_that_are_no_requests(running: Running, content: bytes, headers: dict[str, str], status: int) -> None:
    for name in ("create_model", "optim_step", "asample", "retrieve_future", "create_session"):
        answer = httpx.post(
            f"{running.url}/api/v1/{name}", content=content, headers={"X-API-Key": KEY} | headers, timeout=10
        )
        assert answer.status_code == status, (name, answer.text)
        assert "Traceback" not in answer.text


def test_a_small_body_does_not_become_a_large_one(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    from jax_client.server.wire import bodies

    monkeypatch.setattr(bodies, "MAX_BYTES", 2**20)
    bomb = zstandard.ZstdCompressor().compress(b"\0" * 2**28)
    headers = {"X-API-Key": KEY, "Content-Encoding": "zstd"}
    answer = httpx.post(f"{running.url}/api/v1/forward_backward", content=bomb, headers=headers, timeout=30)
    assert len(bomb) < 2**16 and answer.status_code == 413


def serve(home: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "serve"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CLIENT_HOME": str(home)}
    return subprocess.Popen([*command, "--port", "0", *more], env=env, stderr=subprocess.PIPE, text=True)


def test_the_command_serves_until_a_signal_and_saves(model: str, tmp_path: Path) -> None:
    server = serve(tmp_path, "--dtype", "float32", "--alias", f"Some/Model={model}", "--model", "Some/Model")
    assert server.stderr is not None
    lines = []
    while not lines or not lines[-1].startswith("ready: "):
        lines.append(server.stderr.readline())
        assert lines[-1], lines
    assert [line.split()[0] for line in lines] == ["state", "loading", "loaded", "dashboard:", "ready:"]
    url = lines[-1].split()[1].removeprefix("TINKER_BASE_URL=")
    second = serve(tmp_path)
    assert second.communicate(timeout=60)[1].startswith(f"error: {tmp_path} is served by process {server.pid} on ")
    assert second.returncode == 1
    service = tinker.ServiceClient(base_url=url, api_key="tml-any")
    client = service.create_lora_training_client(base_model="Some/Model", rank=4).result()
    client.forward_backward(data(), "cross_entropy")
    client.optim_step(ADAM).result()
    server.send_signal(signal.SIGTERM)
    rest = server.communicate(timeout=60)[1]
    assert server.returncode == 128 + signal.SIGTERM
    assert "stopping: " in rest and "/weights/autosave-0" in rest
    session, _, _ = client.model_id.partition(":")
    for told in (
        f"client {session} connected",
        f"run {client.model_id}: start at step 0, base_model ",
        r"(compiled|loaded) \w+ \(",
    ):
        assert re.search(rf"^\d\d:\d\d:\d\d {told}", rest, re.M), rest
    assert [record.step for record in CheckpointStore(tmp_path).list()] == [1]


def test_wrong_ways_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for arguments, code, text in (
        (["--host", "0.0.0.0"], 2, "give an --api-key too"),
        (["--port", str(taken.getsockname()[1])], 1, "cannot be listened on"),
        (["--mesh", "wide"], 2, "'wide' is no mesh"),
        (["--alias", "a"], 2, "'a' is no alias"),
        (["--map-loss", "stable_reinforce=cross_entropy"], 2, "it can map stable_reinforce to importance_sampling"),
        (["--map-loss", "ppo=cispo"], 2, "maps 'ppo' to 'cispo'"),
    ):
        assert main(["--state-dir", str(tmp_path), "serve", *arguments]) == code
        assert text in capsys.readouterr().err
    taken.close()
    assert not list(tmp_path.iterdir())
