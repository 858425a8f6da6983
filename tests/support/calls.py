"""How do the tests call the checks of data, settings and sampling? Good calls, with one argument replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
from tinker import types

from jax_client.runs import checks

VOCAB, CONTEXT = 100, 16
NAN = float("nan")


def text(*tokens: int) -> types.ModelInput:
    return types.ModelInput.from_ints(list(tokens))


def unchecked(**fields: Any) -> types.TensorData:
    """A TensorData as a hostile or careless peer could send it, past the SDK's own checks."""
    tensor = types.TensorData(data=[1.0], dtype="float32")
    for field, value in fields.items():
        object.__setattr__(tensor, field, value)
    return tensor


def csr(data: list[float], crow: object, col: object, shape: list[int] | None) -> types.TensorData:
    return unchecked(_numpy=np.asarray(data, np.float32), sparse_crow_indices=crow, sparse_col_indices=col, shape=shape)


def datum(tokens: Any = (1, 2, 3), targets: Any = (2, 3, 4), **inputs: Any) -> types.Datum:
    given: dict[str, Any] = (
        {} if targets is None else {"target_tokens": list(targets) if isinstance(targets, tuple) else targets}
    )
    return types.Datum(
        model_input=tokens if isinstance(tokens, types.ModelInput) else text(*tokens),
        loss_fn_inputs=given | inputs,
    )


def rl(**changes: Any) -> types.Datum:
    inputs = {"logprobs": [-1.0, -2.0, -3.0], "advantages": [1.0, 0.0, -1.0]} | changes
    return datum(**{key: value for key, value in inputs.items() if value is not None})


def wide_gspo() -> types.Datum:
    twice: Any = [[1.0, 2.0]] * 3
    return rl(targets=[[2, 3]] * 3, logprobs=twice, advantages=twice, sequence_ratio_mask=twice)


def train(
    data: object, loss_fn: object = "cross_entropy", config: object = None, warned: set[str] | None = None
) -> Any:
    return checks.training_data(data, loss_fn, config, vocab_size=VOCAB, max_context=CONTEXT, warned=warned)


def custom(data: object) -> Any:
    return checks.custom_data(data, vocab_size=VOCAB, max_context=CONTEXT)


def lora(base_model: object = "m", rank: object = 8, seed: object = 0, **train: object) -> Any:
    switches = {"train_mlp": True, "train_attn": True, "train_unembed": True} | train
    return checks.lora_spec(base_model, rank, seed, **switches)


def adam(**fields: object) -> Any:
    return checks.adam_settings(types.AdamParams.model_construct(**{**dict(types.AdamParams()), **fields}), None)


def decode(tokens: list[int]) -> str:
    return "".join(chr(token) for token in tokens)


def sample(prompt: object = None, num_samples: object = 1, params: object = None, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_context": CONTEXT,
        "eos_token_ids": (7, 9),
        "decode": decode,
    } | changes
    prompt = text(1, 2, 3) if prompt is None else prompt
    return checks.generation(prompt, num_samples, types.SamplingParams() if params is None else params, **fields)


def targets(ids_TK: np.ndarray) -> Any:
    return sample(target_prompt_logprobs=types.TensorData.from_numpy(ids_TK))


def params(**fields: Any) -> types.SamplingParams:
    return types.SamplingParams.model_construct(**{**dict(types.SamplingParams()), **fields})


def wide(value: float) -> list[float]:
    return [1.0, value, 1.0]


IMAGE = types.ImageChunk(data=b"png", format="png", expected_tokens=1)
POINTER = types.ImageAssetPointerChunk(format="png", location="http://x/y.png", expected_tokens=1)
DMEL = types.DmelChunk(dmel=b"x")
TEXT = types.EncodedTextChunk(tokens=[1, 2])


def mixed(chunk: Any) -> types.ModelInput:
    return types.ModelInput(chunks=[TEXT, chunk])


def raw_chunk(tokens: object) -> types.ModelInput:
    return types.ModelInput.model_construct(chunks=[types.EncodedTextChunk.model_construct(tokens=tokens)])
