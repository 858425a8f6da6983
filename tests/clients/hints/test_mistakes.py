"""Does a mistake get a hint? A future used as its answer, another client's method, a misspelt name, text for tokens."""

from __future__ import annotations

import asyncio
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

import jax_client
from jax_client import errors, types
from jax_client.weights.read import hub
from jax_client.weights.read.source import resolve
from support import fake_engine
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT

client, service, models = fake_engine.client, fake_engine.service, fake_engine.models


def test_a_future_that_is_used_as_its_answer_says_so(client: Any) -> None:
    future = client.forward_backward(DATA, "cross_entropy")
    with pytest.raises(AttributeError, match=r"Call .result\(\) first, or await it: x.result\(\).metrics$"):
        print(future.metrics)
    with pytest.raises(AttributeError, match=r"x.result\(\).sequences$"):
        print(client.save_weights_and_get_sampling_client().sample(PROMPT, 1, PARAMS).sequences)
    uses: list[Callable[[], object]] = [lambda: future["metrics"], lambda: list(future), lambda: [*future]]
    for use in uses:
        with pytest.raises(TypeError, match=r"future of an answer. Call .result\(\) first"):
            use()
    # It is true, and has what Python looks for itself.
    assert future and not hasattr(future, "__len__") and not hasattr(future, "_repr_html_")
    assert future.result().metrics

    async def awaited_once() -> object:
        return (await client.optim_step_async(ADAM)).metrics

    with pytest.raises(AttributeError, match="or await it"):
        asyncio.run(awaited_once())


def test_a_method_of_another_client_is_named_with_its_client(service: Any, client: Any) -> None:
    with pytest.raises(AttributeError, match=r"SamplingClient has it. Get one by client.save_weights_and_get"):
        client.sample(PROMPT, 1, PARAMS)
    sampler = client.save_weights_and_get_sampling_client().result()
    with pytest.raises(AttributeError, match=r"TrainingClient has it. Get one by service.create_lora_training_client"):
        sampler.forward_backward(DATA, "cross_entropy")
    with pytest.raises(AttributeError, match="TrainingClient has it"):
        service.optim_step(ADAM)
    with pytest.raises(AttributeError, match=r"RestClient has it. Get one by service.create_rest_client\(\)"):
        service.list_training_runs()
    with pytest.raises(AttributeError, match="did you mean 'optim_step'"):
        client.optimstep(ADAM)
    # The future of a client too, which is the client.
    with pytest.raises(AttributeError, match="SamplingClient has it"):
        service.create_lora_training_client(MODEL, rank=8).sample(PROMPT, 1, PARAMS)
    assert not hasattr(client, "sample") and not inspect.isawaitable(client)


def test_a_misspelt_name_is_told_its_nearest(client: Any) -> None:
    with pytest.raises(
        errors.BadRequestError, match=r"EngineConfig has no field 'max_token_per_micro_batch'; did you "
    ):
        jax_client.EngineConfig(max_token_per_micro_batch=64)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="the fields are dtype, mesh"):
        jax_client.EngineConfig(colour=1)  # type: ignore[call-arg]
    with pytest.raises(errors.BadRequestError, match="did you mean 'cross_entropy'"):
        client.forward_backward(DATA, "crossentropy")
    for misspelt, right, loss in (
        ("weight", "weights", "cross_entropy"),
        ("advantage", "advantages", "importance_sampling"),
    ):
        ones = types.TensorData(data=[1.0, 1.0], dtype="float32", shape=[2])
        inputs = {"target_tokens": [2, 3], misspelt: ones}
        datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)
        with pytest.raises(errors.BadRequestError, match=f"did you mean '{right}'"):
            client.forward_backward([datum], loss)
    targets = types.TensorData(data=[2, 3], dtype="int64", shape=[2])
    datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_token": targets})
    with pytest.raises(errors.BadRequestError, match="Did you mean 'target_tokens' by 'target_token'"):
        client.forward_backward([datum], "cross_entropy")


def test_text_in_place_of_tokens_is_told_how_to_encode_it(client: Any) -> None:
    sampler = client.save_weights_and_get_sampling_client().result()
    with pytest.raises(errors.BadTypeError, match=r"prompt is text; .*get_tokenizer\(\).encode\(text\)"):
        sampler.sample("The lamp is", 1, PARAMS)
    raw = types.ModelInput.model_construct(chunks=[types.EncodedTextChunk.model_construct(tokens="The lamp")])
    with pytest.raises(errors.BadTypeError, match=r"tokens is text; .*encode\(text\)"):
        sampler.sample(raw, 1, PARAMS)
    with pytest.raises(errors.BadTypeError, match=r"data\[0\] is text; make a types.Datum"):
        client.forward_backward(["The lamp is lit."], "cross_entropy")


def test_a_model_that_would_be_refused_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = {
        "org/new": ('{"architectures": ["MambaForCausalLM"]}', "org/new: config.json: architecture 'MambaForCausalLM'"),
        "org/code": ('{"auto_map": {"AutoModel": "x.py"}}', "auto_map"),
    }

    def hf_hub_download(name: str, file: str, **_: Any) -> str:
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(configs[name][0])
        return str(path)

    def snapshot_download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            raise hub_errors.LocalEntryNotFoundError("not cached")
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "cache_directory", lambda: tmp_path)
    for name, (_, words) in configs.items():
        with pytest.raises(errors.UnsupportedError, match=words):
            resolve(name)


SILENT = """
import logging, sys
sys.modules["torch"] = None
from jax_client.weights.read import tokenizer
print(hasattr(tokenizer._transformers(), "PreTrainedTokenizerFast"))
logging.getLogger("transformers").warning("another warning")
"""


def test_transformers_does_not_begin_with_a_warning_that_torch_is_not_there() -> None:
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "PyTorch" not in done.stderr and "another warning" in done.stderr
    assert not logging.getLogger("transformers").filters
