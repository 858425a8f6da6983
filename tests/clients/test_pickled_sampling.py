"""Does a sampling client that was sent to another process give the numbers of the one that stayed?"""

from __future__ import annotations

import base64
import copy
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import uvicorn

import jax_client
from jax_client.runs.sampler_address import SamplerAddress
from jax_client.server import LOOPBACK, sharing
from jax_client.server.app import build_app
from jax_client.server.state.eviction import IN_MEMORY
from jax_client.server.state.server import Server
from support import fake_engine, pickled_child
from support.fake_engine import MODEL
from support.pickled_child import numbers, sampled, scored, scored_from_bytes
from support.weight_files import HF_CONFIG, hf_tensors, tokenizer_metadata, write_gguf

client, loaded, service = fake_engine.client, fake_engine.loaded, fake_engine.service
models = fake_engine.models

# The SDK's own HTTP stack and pydantic warn in ways that are not this package's to fix.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = HF_CONFIG | {"vocab_size": 512}
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return str(write_gguf(path, config, hf_tensors(config), metadata=tokenizer_metadata()))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Any]:
    """A client whose numbers come out of an engine."""
    config = jax_client.EngineConfig(
        dtype="float32",
        state_dir=tmp_path_factory.mktemp("state"),
        compilation_cache_dir="",
        precompile=False,
        autosave_minutes=None,
    )
    with jax_client.ServiceClient(config=config) as service:
        yield service.create_sampling_client(base_model=model)


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(2) as found:
        yield found


def test_a_pool_gets_the_numbers_of_its_parent(pool: Any, real: Any) -> None:
    ours = numbers(real)
    found = pool.map(sampled, [real, real.result()] * 3, chunksize=1)
    assert os.getpid() not in {each["process"] for each in found}
    for theirs in found:
        assert {name: theirs[name] for name in ours} == ours
        assert theirs["onwards"] == ours["scores"]
        assert theirs["jax"] == [] and theirs["sdk"]


def test_an_executor_of_a_forkserver_too(real: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as executor:
        theirs = executor.submit(sampled, real.result()).result(60)
    ours = numbers(real)
    assert {name: theirs[name] for name in ours} == ours and theirs["jax"] == []


def test_weights_that_exist_nowhere_else(pool: Any, client: Any) -> None:
    before = client.save_weights_and_get_sampling_client()
    following = client.save_weights_and_get_sampling_client(kind="inflight")
    pickled = [pickle.dumps(before), pickle.dumps(following)]
    fake_engine.step(client)
    client.save_weights_and_get_sampling_client(kind="inflight").result()
    told = pool.map(scored_from_bytes, pickled)
    assert [each["scores"][1] for each in told] == [-1.0, -1.5]


def test_in_its_own_process_it_is_a_client_of_the_same_sampler(service: Any) -> None:
    future = service.create_sampling_client(base_model=MODEL)
    for again in (
        pickle.loads(pickle.dumps(future)),
        jax_client.SamplingClient.from_sampler_handle(future.get_sampler_handle(), api_key="tml-x"),
    ):
        assert type(again) is jax_client.SamplingClient
        assert again._sampler is future.result()._sampler
    assert copy.deepcopy(again) is again


def test_only_this_user_can_open_the_socket(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = service.create_sampling_client(base_model=MODEL)
    path = Path(SamplerAddress.decode(client.get_sampler_handle()).socket)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(os.fsencode(path)) <= sharing.MAX_PATH
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://owner/api/v1") as http:
        assert http.post("/client/config").status_code == 200
    # Whoever gets past the modes is asked by the system who he is.
    monkeypatch.setattr(sharing, "_user_of", lambda connection: os.geteuid() + 1)
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://owner/api/v1") as http,
        pytest.raises(httpx.TransportError),
    ):
        http.post("/client/config")


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="the system does not say who connects")
def test_the_system_says_who_connects() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert sharing._user_of(ours) == os.geteuid()


def test_where_the_socket_is_and_when_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    found = sharing.Sharing(jax_client.EngineConfig())
    assert os.path.exists(found.path) and not list(long.iterdir())
    # A forked process inherits the exit step, which must not remove the parent's socket.
    monkeypatch.setattr(sharing, "_sharing", found)
    with monkeypatch.context() as patch:
        patch.setattr(found, "leave", lambda: None)
        sharing._after_fork()
    sharing._at_exit()
    assert os.path.exists(found.path)
    monkeypatch.setattr(sharing, "_sharing", found)
    sharing._at_exit()
    assert not os.path.exists(os.path.dirname(found.path))


def test_nothing_secret_travels(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINKER_API_KEY", "JAX_CLIENT_API_KEY", "CLOUDFLARE_ACCESS_CLIENT_SECRET", "HF_TOKEN"):
        monkeypatch.setenv(name, "tml-secret")
    client = service.create_sampling_client(base_model=MODEL)
    handle = client.get_sampler_handle()
    for travels in (pickle.dumps(client), base64.urlsafe_b64decode(handle)):
        assert b"tml-secret" not in travels
    assert set(json.loads(base64.urlsafe_b64decode(handle))) == {
        "socket", "process", "session_id", "sampler_id", "base_model", "model_path", "model_kind", "client_config",
        "dynamic_config",
    }  # fmt: skip


@pytest.mark.parametrize("handle", ["", "nonsense", "e30=", base64.urlsafe_b64encode(b"[1]").decode()])
def test_what_is_no_handle_is_refused(handle: str) -> None:
    with pytest.raises(tinker.BadRequestError, match="not a sampler handle"):
        jax_client.SamplingClient.from_sampler_handle(handle)


def test_a_closed_session_is_told_at_once(pool: Any, service: Any) -> None:
    client = service.create_sampling_client(base_model=MODEL).result()
    pickled = pickle.dumps(client)
    assert pool.apply(scored_from_bytes, (pickled,)) == {"scores": scored(client)}
    service.close("success").result()
    told = pool.apply(scored_from_bytes, (pickled,))
    assert "ServiceClient is closed (success at " in told["error"] and told["seconds"] < 20
    with pytest.raises(tinker.NotFoundError, match="ServiceClient is closed"):
        pickle.dumps(client)


def test_the_newest_samplers_outlive_their_clients(pool: Any, service: Any) -> None:
    first = pickle.dumps(service.create_sampling_client(base_model=MODEL).result())
    assert "scores" in pool.apply(scored_from_bytes, (first,))
    kept = service.create_sampling_client(base_model=MODEL).result()
    pickled = pickle.dumps(kept)
    rest = [pickle.dumps(service.create_sampling_client(base_model=MODEL).result()) for _ in range(IN_MEMORY)]
    gc.collect()
    told = pool.apply(scored_from_bytes, (first,))
    assert f"process {os.getpid()} has no sampler" in told["error"] and told["seconds"] < 20
    for each in (pickled, rest[0], rest[-1]):
        assert pool.apply(scored_from_bytes, (each,)) == {"scores": scored(kept)}


def test_forks_and_the_end_of_the_process(pool: Any, model: str, tmp_path: Path) -> None:
    program = [sys.executable, pickled_child.__file__, model, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as owner:
        assert owner.stdout is not None
        told = pickle.load(owner.stdout)
        try:
            assert f"came from process {owner.pid} by a fork" in told["inherited"]["error"]
            assert told["sent"] == {"scores": told["here"]}
            assert pool.apply(scored_from_bytes, (told["pickled"],)) == told["sent"]
            # One request is under way when the owner ends, the other comes later. A fork of the owner is still there.
            owner.send_signal(signal.SIGSTOP)
            under_way = pool.apply_async(scored_from_bytes, (told["pickled"],))
            with pytest.raises(multiprocessing.TimeoutError):
                under_way.get(1)
            owner.kill()
            owner.wait()
            after = [under_way.get(60), pool.apply(scored_from_bytes, (told["pickled"],))]
        finally:
            owner.kill()
            os.kill(told["sleeper"], signal.SIGKILL)
            # Who is killed cannot.
            shutil.rmtree(Path(SamplerAddress.decode(told["handle"]).socket).parent)
    for each in after:
        assert f"process {owner.pid}, which has the weights" in each["error"] and each["seconds"] < 20


def test_the_sdks_own_clients_travel_from_a_server(pool: Any, models: Any, tmp_path: Path) -> None:
    server, listening = Server(jax_client.EngineConfig(state_dir=tmp_path), base_models=models), socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = build_app(server, api_key="tml-secret", hosts=LOOPBACK)
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        service = tinker.ServiceClient(base_url=url, api_key="tml-secret")
        client = service.create_sampling_client(base_model=MODEL).result()
        assert pool.map(scored, [client, client]) == [scored(client)] * 2 == [[None, -1.0, -1.0, -1.0, -1.0]] * 2
    finally:
        http.should_exit = True
        thread.join(30)
        server.close(60)
