"""Which model do the commands talk to? A tiny random one with a tokenizer of characters, and a checkpoint of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jax_client
from jax_client import types
from support.server.serving import ADAM, CASE, write_model

CHARACTERS = " abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'-+*/()<>[]=_#$%&"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A state directory with a run: its model, and the paths of what it saved."""

    home: Path
    model: str
    weights: str
    sampler: str
    settings: jax_client.EngineConfig


def write_tokenizer(directory: Path) -> None:
    vocab = {character: index for index, character in enumerate(CHARACTERS)}
    assert len(vocab) <= CASE["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "#", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


def settings(home: Path) -> jax_client.EngineConfig:
    """Those of the commands, which thus use the engine that the fixture holds."""
    return jax_client.EngineConfig(dtype="float32", precompile=False, autosave_minutes=None, state_dir=home)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    home = tmp_path_factory.mktemp("talk")
    model = write_model(home)
    write_tokenizer(Path(model))
    with jax_client.ServiceClient(config=settings(home / "state")) as service:
        client = service.create_lora_training_client(model, rank=2, seed=1).result()
        inputs = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
        datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)
        for _ in range(3):
            client.forward_backward([datum], "cross_entropy")
            client.optim_step(ADAM).result()
        weights, sampler = client.save_state("s").result().path, client.save_weights_for_sampler("s").result().path
        yield Trained(
            home=home / "state", model=model, weights=weights, sampler=sampler, settings=settings(home / "state")
        )
