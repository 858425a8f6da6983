"""Does a loss that runs on the server train as the same loss does in the client's own process?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

import jax_client
from jax_client.server.state.request_log import RequestLog
from jax_client.server.state.server import Server
from jax_client.server.wire import custom_losses
from support.golden_cases import sequences
from support.server.serving import ADAM, CASE, KEY, Running, config, write_model

torch = pytest.importorskip("torch")
# The SDK's own HTTP stack and pydantic warn in ways that are not this package's to fix.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
RANKS = {"logprobs": 1, "advantages": 1, "scale": 0}


def loss(logprobs, advantages, scale):
    """A clipped loss with a normalisation of its own, of which every token has a gradient."""
    ratio = torch.exp((logprobs + 4).clamp(-2, 2))
    value = -(ratio * advantages).sum() * scale / logprobs.shape[0] + 0.01 * logprobs.pow(2).mean()
    return value, {"custom/ratio:mean": ratio.mean(), "custom/tokens:sum": (advantages != 0).float().sum()}


def mixed(logprobs):
    """Of two targets per position."""
    total = -torch.logsumexp(logprobs, dim=-1).sum()
    return total, {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("state")
    found = Running(Server(config(directory), log=RequestLog(directory)))
    yield found
    found.stop()


@pytest.fixture
def service(running: Running) -> Any:
    return tinker.ServiceClient(base_url=running.url, api_key=KEY)


def batch() -> list[types.Datum]:
    out = []
    for i, s in enumerate(sequences(CASE)):
        advantages = np.random.default_rng(i).normal(size=len(s["tokens"])).astype(np.float32)
        inputs = {
            "target_tokens": s["targets"].tolist(),
            "advantages": types.TensorData.from_numpy(advantages),
            "scale": types.TensorData(data=[1.0 + i], dtype="float32", shape=[]),
        }
        tokens = types.ModelInput.from_ints(s["tokens"].tolist())
        out.append(types.Datum(model_input=tokens, loss_fn_inputs=inputs))
    return out


def client_of(service: Any, model: str) -> Any:
    return service.create_lora_training_client(base_model=model, rank=4, seed=7).result()


def train(client: Any, how: Any) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Two steps; return their metrics, and the logprobs that the trained adapter gives."""
    metrics = []
    for _ in range(2):
        passed, stepped = client.forward_backward_custom(batch(), how), client.optim_step(ADAM)
        metrics.append(dict(passed.result().metrics))
        metrics[-1]["norm"] = stepped.result().metrics["grad_norm:mean"]
    plain = [
        types.Datum(model_input=d.model_input, loss_fn_inputs={"target_tokens": d.loss_fn_inputs["target_tokens"]})
        for d in batch()
    ]
    return metrics, [o["logprobs"].to_numpy() for o in client.forward(plain, "cross_entropy").result().loss_fn_outputs]


def two_passes(data: Any, logprobs: Any) -> Any:
    """The same loss, as the SDK runs it in the client's process."""
    total: Any = 0.0
    sums: dict[str, float] = {}
    for datum, p in zip(data, logprobs, strict=True):
        inputs = (
            datum.loss_fn_inputs[name].to_torch().reshape(() if name == "scale" else -1) for name in list(RANKS)[1:]
        )
        value, own = loss(p, *inputs)
        total = total + value
        for name, each in own.items():
            sums[name] = sums.get(name, 0.0) + float(each.detach())
    return total, {name: each / (len(data) if name.endswith(":mean") else 1) for name, each in sums.items()}


def test_the_handle_trains_as_two_passes_and_as_in_process(service: Any, model: str, tmp_path: Path) -> None:
    handle = service.create_custom_loss(loss, RANKS).result()
    assert handle.loss_id == f"{handle.session_id}:loss:0"
    metrics, logprobs = train(client_of(service, model), handle)
    theirs, their_logprobs = train(client_of(service, model), two_passes)
    with jax_client.ServiceClient(config=config(tmp_path)) as local:
        ours, our_logprobs = train(client_of(local, model), local.create_custom_loss(loss, RANKS).result())
    for served, client_side, in_process in zip(metrics, theirs, ours, strict=True):
        assert served.keys() == client_side.keys() and in_process.keys() <= served.keys()
        assert {name: client_side[name] for name in served} == pytest.approx(served, rel=1e-5, abs=1e-5)
        assert {name: in_process[name] for name in in_process} == pytest.approx({k: served[k] for k in in_process}, rel=1e-5, abs=1e-5)  # noqa: E501 # fmt: skip
    for mine, two, local_ones in zip(logprobs, their_logprobs, our_logprobs, strict=True):
        np.testing.assert_allclose(mine, two, atol=1e-5)
        np.testing.assert_allclose(mine, local_ones, atol=1e-5)


def test_several_targets_per_position(service: Any, model: str) -> None:
    handle = service.create_custom_loss(mixed, {"logprobs": 2}).result()
    data = [types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [[3, 4], [5, 6]]})]  # noqa: E501 # fmt: skip
    answer = client_of(service, model).forward_backward_custom(data, handle).result()
    p = answer.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert p.shape == (2, 2)
    assert answer.metrics["loss:sum"] == pytest.approx(-np.log(np.exp(p).sum(-1)).sum(), rel=1e-5)


def test_a_refused_graph_says_why_and_the_function_itself_trains(service: Any, model: str) -> None:
    def unusual(logprobs):
        return torch.erfc(logprobs).sum(), {}

    with pytest.raises(tinker.BadRequestError, match=r"torch.erfc.*pass that to forward_backward_custom"):
        service.create_custom_loss(unusual, {"logprobs": 1}).result()
    client = client_of(service, model)
    answer = client.forward_backward_custom(batch(), lambda data, p: (sum(unusual(x)[0] for x in p), {})).result()
    assert np.isfinite(answer.metrics["loss:sum"])
    client.optim_step(ADAM).result()


def test_what_a_loss_cannot_do_fails_the_call_and_not_the_client(service: Any, model: str) -> None:
    def other(logprobs, advantages):
        return (logprobs * advantages[:3]).sum(), {}

    def nowhere(logprobs, advantages):
        return (logprobs / (advantages - advantages)).sum(), {}

    ranks = {"logprobs": 1, "advantages": 1}
    client, handles = (
        client_of(service, model),
        [service.create_custom_loss(f, ranks).result() for f in (other, nowhere)],
    )
    with pytest.raises(tinker.RequestFailedError, match=r"node 'mul' \(operator.mul\) cannot be computed"):
        client.forward_backward_custom(batch(), handles[0]).result()
    with pytest.raises(tinker.RequestFailedError, match="datum 0, whose gradient is") as failed:
        client.forward_backward_custom(batch(), handles[1]).result()
    assert failed.value.category == "user"
    with pytest.raises(tinker.RequestFailedError, match="no gradients"):
        client.optim_step(ADAM).result()
    with pytest.raises(tinker.RequestFailedError, match="'custom' is not supported"):
        client.forward(batch(), "custom", {"loss_id": handles[0].loss_id}).result()
    for settings in (None, {"loss_id": "x:loss:0"}, {"loss_id": f"{handles[0].session_id}:loss:99"}, {"loss_id": 1.0}):
        with pytest.raises(tinker.RequestFailedError, match=r"loss_id|custom loss"):
            client.forward_backward(batch(), "custom", settings).result()
    assert client.forward_backward(batch_of_weights(), "cross_entropy").result().metrics["loss:sum"] > 0


def batch_of_weights() -> list[types.Datum]:
    return [types.Datum(model_input=d.model_input, loss_fn_inputs={"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in batch()]  # noqa: E501 # fmt: skip


def test_a_loss_belongs_to_its_session(running: Running, service: Any, model: str) -> None:
    handle = service.create_custom_loss(loss, RANKS).result()
    stranger = client_of(tinker.ServiceClient(base_url=running.url, api_key=KEY), model)
    with pytest.raises(tinker.RequestFailedError, match="belongs to the session"):
        stranger.forward_backward(batch(), "custom", {"loss_id": handle.loss_id}).result()


def request_of(session_id: str, number: int = 0, target: str = "torch.sum") -> dict[str, Any]:
    nodes = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "call_function", "name": "total", "target": target, "args": [{"ref": "logprobs"}]},
        {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "total"}, {"dict": {}}]}]},
    ]
    inputs = [{"name": "logprobs", "rank": 1}]
    return {"session_id": session_id, "custom_loss_seq_id": number, "name": "f", "inputs": inputs, "graph": {"nodes": nodes}}  # noqa: E501 # fmt: skip


def test_a_request_sent_twice_makes_one_loss(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    http = httpx.Client(base_url=f"{running.url}/api/v1", headers={"X-API-Key": KEY}, timeout=30)
    session = http.post("/create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0.38"}).json()["session_id"]  # noqa: E501 # fmt: skip
    first = http.post("/create_custom_loss", json=request_of(session)).json()
    assert http.post("/create_custom_loss", json=request_of(session)).json() == first
    answer = http.post("/retrieve_future", json={"request_id": first["request_id"]}).json()
    assert answer == {"loss_id": f"{session}:loss:0", "type": "create_custom_loss"}
    other = http.post("/create_custom_loss", json=request_of(session, target="torch.mean"))
    assert other.status_code == 400 and "sent before with another body" in other.json()["detail"]
    assert http.post("/create_custom_loss", json=request_of("none")).status_code == 404
    assert http.post("/create_custom_loss", json=request_of(session, -1)).status_code == 400
    bad = http.post("/create_custom_loss", json=request_of(session, 1, "os.system"))
    assert bad.status_code == 400 and "node 'total' calls the function 'os.system'" in bad.json()["detail"]
    many = request_of(session, 1) | {"graph": {"nodes": [request_of(session)["graph"]["nodes"][0]] * 10**6}}
    assert http.post("/create_custom_loss", json=many).status_code == 413
    monkeypatch.setattr(custom_losses, "MAX_LOSSES", 1)
    full = http.post("/create_custom_loss", json=request_of(session, 1))
    assert full.status_code == 400 and "the most it may have" in full.json()["detail"]


def test_a_loss_outlives_a_restart(model: str, tmp_path: Path) -> None:
    first = Running(Server(config(tmp_path), log=RequestLog(tmp_path)))
    service = tinker.ServiceClient(base_url=first.url, api_key=KEY)
    handle = service.create_custom_loss(loss, RANKS).result()
    first.stop()
    second = Running(Server(config(tmp_path), log=RequestLog(tmp_path)), first.port)
    metrics = client_of(service, model).forward_backward_custom(batch(), handle).result().metrics
    assert metrics["custom/tokens:sum"] == sum(len(s["tokens"]) for s in sequences(CASE))
    second.stop()
