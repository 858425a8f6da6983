"""Does the playground sample what the SDK samples, and hold no more models than it may?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import jax_client
from jax_client import types
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.runs.lifecycle.base_models import BaseModels, Loader
from jax_client.runs.lifecycle.session import Session, live_sessions
from jax_client.server.dashboard.playground.asked import sample_asked, score_asked
from jax_client.server.dashboard.playground.samplers import Samplers
from jax_client.values import AdapterState, CheckpointKey, Kind
from jax_client.weights.read.identity import fingerprint
from jax_client.weights.read.source import resolve
from support.golden_cases import lora_values
from support.golden_engine import SPEC, to_ours
from support.server.pages import Page, Parts, no_session
from support.server.serving import CASE, config, write_model

API = "/dashboard/api/playground"
KINDS: tuple[Kind, ...] = ("weights", "sampler_weights")
PROMPT = "w1 w5 w9 w2"
CHAT = [{"role": "user", "content": "w3 w4"}]
TEMPLATE = "{% for m in messages %}w7 {{ m.content }} w8 {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(CASE["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    words.decoder = decoders.WordPiece("##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A model, a checkpoint of each kind, and what the SDK says of them."""
    folder = tmp_path_factory.mktemp("trained")
    model = write_model(folder)
    tokenizer = word_tokenizer()
    models = BaseModels(Loader(load_tokenizer=lambda source: tokenizer))
    home = folder / "home"
    settings = config(home)
    weights = to_ours(CASE, {name: 3 * array for name, array in lora_values(CASE).items()})
    adapter = AdapterState(spec=SPEC, step=1, weights=weights)
    metadata = {
        "base_model": model,
        "base_fingerprint": fingerprint(resolve(model)),
        "spec": asdict(SPEC),
        "step": 1,
        "optimizer": None,
        "user_metadata": None,
    }
    keys = [CheckpointKey("0b1c2d3e-aaaa:train:0", kind, "a") for kind in KINDS]
    for key in keys:
        CheckpointStore(home).save(key=key, state=adapter, metadata=metadata)
    with jax_client.ServiceClient(config=settings, _models=models) as service:
        yield SimpleNamespace(
            model=model, paths=list(map(str, keys)), service=service, models=models, settings=settings, home=home
        )


@pytest.fixture
def playground(trained: SimpleNamespace) -> Iterator[tuple[Samplers, httpx.Client]]:
    samplers = Samplers(lambda: Session(trained.settings, models=trained.models))
    parts = Parts(trained.home, samplers=samplers, models=[trained.model])
    page = Page(parts.guard())
    with page.client() as client:
        yield samplers, client
    page.stop()
    samplers.close()


def ask(client: httpx.Client, **fields: Any) -> Any:
    answer = client.post(f"{API}/sample", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_samples_are_the_sdks(trained: SimpleNamespace, playground: tuple[Samplers, httpx.Client]) -> None:
    samplers, client = playground
    sdk = trained.service.create_sampling_client(model_path=trained.paths[1])
    ids = [int(word[1:]) for word in PROMPT.split()]
    prompt, asked = types.ModelInput.from_ints(ids), {"max_tokens": 6, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    want = sdk.sample(prompt, 3, types.SamplingParams(**asked)).result().sequences
    scored = sdk.compute_logprobs(prompt).result()
    for path in trained.paths:
        got = ask(client, prompt=PROMPT, num_samples=3, path=path, **asked)
        for sample, sequence in zip(got["samples"], want, strict=True):
            assert [token["id"] for token in sample["tokens"]] == sequence.tokens
            assert [token["logprob"] for token in sample["tokens"]] == pytest.approx(sequence.logprobs, abs=1e-6)
            assert sample["stop_reason"] == sequence.stop_reason
            assert "".join(token["text"] for token in sample["tokens"]) == sample["text"]
            assert {str(token["alternatives"]) for token in sample["tokens"]} == {"[]"}
        assert [token["id"] for token in got["prompt"]] == ids and got["prompt"][0]["logprob"] is None
        assert [t["logprob"] for t in got["prompt"][1:]] == pytest.approx(scored[1:], abs=1e-6)
        assert "".join(token["text"] for token in got["prompt"]) == PROMPT and got["seed"] == 7
    assert len(samplers.names()) == 2
    with_others = ask(client, prompt=PROMPT, num_samples=3, path=trained.paths[1], alternatives=4, **asked)
    for sample, sequence in zip(with_others["samples"], want, strict=True):
        assert [token["id"] for token in sample["tokens"]] == sequence.tokens
        for token in sample["tokens"]:
            likeliest = token["alternatives"]
            assert len(likeliest) == 4 and likeliest == sorted(likeliest, key=lambda each: -each["logprob"])
            drawn = [place for place, each in enumerate(likeliest, 1) if each["id"] == token["id"]]
            assert token["rank"] == (drawn[0] if drawn else None)
    # Two side by side: what the base model says of the same tokens.
    drawn_ids = want[0].tokens
    base = trained.service.create_sampling_client(base_model=trained.model)
    whole = base.compute_logprobs(types.ModelInput.from_ints([*ids, *drawn_ids])).result()[len(ids) :]
    found = client.post(f"{API}/score", json={"model": trained.model, "prompt_ids": ids, "ids": drawn_ids}).json()
    assert [t["logprob"] for t in found["tokens"]] == pytest.approx(whole, abs=1e-6)
    assert [token["id"] for token in found["tokens"]] == drawn_ids
    assert whole != pytest.approx(want[0].logprobs, abs=1e-3), "a checkpoint is not its base model"


def test_a_chat_goes_through_the_tokenizers_template(
    trained: SimpleNamespace, playground: tuple[Samplers, httpx.Client]
) -> None:
    _, client = playground
    found = ask(client, messages=CHAT, model=trained.model, max_tokens=2, temperature=0)
    assert [token["id"] for token in found["prompt"]] == [7, 3, 4, 8, 9]
    again = ask(client, prompt_ids=[7, 3, 4, 8, 9], model=trained.model, max_tokens=2, temperature=0)
    assert again["samples"] == found["samples"]


def test_refusals_say_what_to_do(trained: SimpleNamespace, playground: tuple[Samplers, httpx.Client]) -> None:
    _, client = playground
    where = {"model": trained.model, "prompt": PROMPT}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "no prompt"),
        ({**where, "messages": CHAT}, "prompt and messages"),
        ({"prompt": PROMPT}, "model"),
        ({**where, "num_samples": 17}, "num_samples"),
        ({**where, "max_tokens": 0}, "max_tokens"),
        ({**where, "max_tokens": 8_000}, "context"),
        ({**where, "temperature": "hot"}, "temperature"),
        ({**where, "temperature": -1}, "temperature"),
        ({**where, "top_p": 2}, "top_p"),
        ({**where, "top_k": 0}, "top_k"),
        ({**where, "alternatives": 11}, "alternatives"),
        ({**where, "seed": -1}, "seed"),
        ({**where, "path": "tinker://no/weights/a"}, "run"),
        ({**where, "path": "tinker://0b1c2d3e-cccc:train:0/weights/a"}, "no checkpoint"),
        ({"model": trained.model, "prompt_ids": [10**6]}, "token"),
        ({"model": trained.model, "prompt_ids": [True]}, "token ids"),
    ]
    for fields, word in cases:
        answer = client.post(f"{API}/sample", json=fields)
        assert 400 <= answer.status_code < 500 and word in answer.json()["detail"], (fields, answer.text)
    for fields in ({}, {"model": trained.model}, {"model": trained.model, "prompt_ids": [1], "ids": []}):
        assert client.post(f"{API}/score", json=fields).status_code == 400


class Handle:
    """What stands for a loaded sampler."""

    def __init__(self, name: str) -> None:
        self.sampler_id = name
        self.model_ref = SimpleNamespace(name=name)


class FakeSession:
    def __init__(self) -> None:
        self.session_id, self.samplers, self.closed = "page", {}, False
        self.kept: list[set[str]] = []

    def release_unused(self, keep: set[str]) -> bool:
        self.kept.append(set(keep))
        return True

    def close(self, status: str, detail: str | None) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    session = FakeSession()
    loads: Any = lambda session, name: Handle(name)  # noqa: E731
    monkeypatch.setattr("jax_client.runs.lifecycle.sampler_handle.base_sampler", loads)
    return session


def use(samplers: Samplers, name: str) -> None:
    taken = samplers.take(("", name))
    assert taken.handle.result(10).sampler_id == name
    samplers.give(taken)


def test_few_samplers_stay_loaded(fake: Any) -> None:
    samplers = Samplers(lambda: fake, most=2)
    held = samplers.take(("", "held"))
    held.handle.result(10)
    for name in ("a", "b", "c"):
        use(samplers, name)
    assert [name for _, name in samplers.names()] == ["held", "c"], "who is in use stays, then the newest"
    assert fake.kept[-1] == {"held", "c"}
    samplers.give(held)
    samplers.release_idle(0.0)
    assert samplers.names() == [] and fake.kept[-1] == set()
    samplers.close()
    assert fake.closed and "page" not in live_sessions


def test_a_load_that_fails_is_tried_again(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Any, name: str) -> Any:
        raise RuntimeError("UNAVAILABLE: the TPU is in use\nmore lines")

    samplers = Samplers(lambda: fake)
    with monkeypatch.context() as patch:
        patch.setattr("jax_client.runs.lifecycle.sampler_handle.base_sampler", fail)
        failed = samplers.take(("", "m"))
        with pytest.raises(
            RequestFailedError, match="cannot be loaded in this process: UNAVAILABLE: the TPU is in use"
        ):
            failed.handle.result(10)
    again = samplers.take(("", "m"))
    samplers.give(failed)
    samplers.release_idle(0.0)
    assert again.handle.result(10) and samplers.names() == [("", "m")], "who gives back the failed one frees no other"
    samplers.give(again)
    use(samplers, "m")


def test_a_process_without_devices_says_so(trained: SimpleNamespace, tmp_path: Path) -> None:
    words = "the TPU of this machine is in use by process 5 (python)."
    parts = Parts(tmp_path / "home", samplers=Samplers(no_session, refusal=lambda: words))
    page = Page(parts.guard())
    try:
        with page.client() as client:
            state = client.get("/dashboard/api/state").json()["playground"]
            assert (state["available"], state["reason"]) == (False, words)
            answer = client.post(f"{API}/sample", json={"model": "m", "prompt": "a"})
            assert answer.status_code == 400 and words in answer.json()["detail"]
    finally:
        page.stop()


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), True, "1", [1], {}])
def test_numbers_are_numbers(value: Any) -> None:
    where = {"model": "m", "prompt": "a"}
    for name in ("temperature", "top_p", "top_k", "seed", "num_samples", "max_tokens", "alternatives"):
        with pytest.raises(BadRequestError, match=name):
            sample_asked({**where, name: value})
    for name in ("ids", "prompt_ids"):
        with pytest.raises(BadRequestError, match=name):
            score_asked({"model": "m", "prompt_ids": [1], "ids": [1], name: [value]})


def test_a_seed_is_drawn_and_told() -> None:
    seeds = {sample_asked({"model": "m", "prompt": "a"}).seed for _ in range(5)}
    assert len(seeds) == 5
    with pytest.raises(BadRequestError):
        sample_asked({"model": "m", "prompt": ""})
