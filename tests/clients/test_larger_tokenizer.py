"""Can a model be used whose tokenizer has more ids than its embedding, and is data with such an id refused by place?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tinker

import jax_client
from jax_client import types
from jax_client.server.state.server import Server
from jax_client.weights.read.source import ModelSource
from jax_client.weights.read.tokenizer import load_tokenizer
from support.golden_cases import CASES, base_values
from support.server.serving import KEY, Running, config
from support.weight_files import HF_CONFIG, hf_tensors, tokenizer_metadata, write_gguf, write_hf

VOCAB = 268
CASE = CASES["llama_tied"] | {"vocab_size": VOCAB}
PAD = VOCAB
# What the SDK raises for a request that a server refuses after it was accepted, and what this process raises.
REFUSED = (tinker.RequestFailedError, tinker.BadRequestError)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a model, and its tokenizer with one token more than the embedding has rows."""
    path = tmp_path_factory.mktemp("m")
    small = HF_CONFIG | {"vocab_size": VOCAB}
    gguf = write_gguf(path / "m.gguf", small, hf_tensors(small), metadata=tokenizer_metadata())
    tokenizer = load_tokenizer(ModelSource(name="m", path=gguf, kind="gguf"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    directory = write_hf(path / "model", CASE, base_values(CASE))
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=["in this process", "served"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = config(tmp_path_factory.mktemp("state"))
    if request.param == "served":
        running = Running(Server(settings, {}))
        yield tinker.ServiceClient(base_url=running.url, api_key=KEY)
        running.stop()
    else:
        with jax_client.ServiceClient(config=settings) as service:
            yield service


def test_such_an_id_is_refused_with_index_and_position(service: Any, model: str) -> None:
    client = service.create_lora_training_client(base_model=model, rank=4).result()
    tokenizer = client.get_tokenizer()
    assert tokenizer.encode("the[PAD]") == [tokenizer.encode("the")[0], PAD]

    def datum(tokens: list[int], targets: list[int]) -> types.Datum:
        inputs = {"target_tokens": targets, "weights": [1.0] * len(targets)}
        return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)

    good = datum([3, 4, 5], [4, 5, 6])
    for bad, place in (
        (datum([3, 4, PAD], [4, 5, 6]), r"data\[1\]\.model_input has token id 268 at position 2"),
        (datum([3, 4, 5], [4, PAD, 6]), r"data\[1\]\.loss_fn_inputs\['target_tokens'\] has token id 268 at position 1"),
    ):
        with pytest.raises(REFUSED, match=f"{place}.*0 to 267.*no row in the embedding"):
            client.forward_backward([good, bad], "cross_entropy").result()
    sampler = service.create_sampling_client(base_model=model)
    sampler = sampler.result() if hasattr(sampler, "result") else sampler
    prompt, params = types.ModelInput.from_ints([3, PAD]), types.SamplingParams(max_tokens=2, stop=["ing"])
    with pytest.raises(REFUSED, match="prompt has token id 268 at position 1"):
        sampler.sample(prompt, 1, params).result()
    if isinstance(sampler, jax_client.SamplingClient):  # a stop string is looked for in decoded tokens
        assert sampler.sample(types.ModelInput.from_ints([3]), 1, params).result().sequences[0].tokens
