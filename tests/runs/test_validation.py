"""Is every bad call refused at once, with a message that says what was wrong and what to do?"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tinker import types

from jax_client.errors import BadRequestError, BadTypeError, UnsupportedError
from jax_client.runs import checks
from jax_client.runs.checks import data
from jax_client.runs.paths import sampler_path, training_path
from jax_client.values import CheckpointKey

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


def train(data: object, loss_fn: object = "cross_entropy", config: object = None) -> Any:
    return checks.training_data(data, loss_fn, config, vocab_size=VOCAB, max_context=CONTEXT)


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


# Row of the bad-input matrix, call, error class, and what the message must contain.
BAD: list[tuple[int, Callable[[], object], type[Exception], list[str]]] = [
    (1, lambda: lora(""), BadRequestError, ["base_model is required", "get_server_capabilities"]),
    (1, lambda: lora(None), BadRequestError, ["base_model is required"]),
    (3, lambda: lora(rank=0), BadRequestError, ["rank is 0", "from 1 to 512"]),
    (3, lambda: lora(rank=-1), BadRequestError, ["rank is -1", "from 1 to 512"]),
    (3, lambda: lora(rank=2.5), BadTypeError, ["rank is 2.5 (float)", "from 1 to 512"]),
    (3, lambda: lora(rank="8"), BadTypeError, ["rank is '8' (str)"]),
    (3, lambda: lora(rank=True), BadTypeError, ["rank is True (bool)"]),
    (3, lambda: lora(rank=10**9), BadRequestError, ["rank is 1000000000", "from 1 to 512"]),
    (
        4,
        lambda: lora(train_mlp=False, train_attn=False, train_unembed=False),
        AssertionError,
        ["At least one of train_mlp, train_attn, or train_unembed must be True"],
    ),
    (4, lambda: lora(train_mlp=1), BadTypeError, ["train_mlp is 1 (int)"]),
    (6, lambda: lora(seed=-1), BadRequestError, ["seed is -1", "from 0 to 4294967295"]),
    (6, lambda: lora(seed=2**64), BadRequestError, ["seed is 18446744073709551616"]),
    (6, lambda: lora(seed=1.5), BadTypeError, ["seed is 1.5"]),
    (6, lambda: checks.user_metadata(["a"]), BadTypeError, ["user_metadata", "dict of str to str"]),
    (6, lambda: checks.user_metadata({"a": 1}), BadTypeError, ["user_metadata['a'] is 1 (int)"]),
    (6, lambda: checks.user_metadata({1: "a"}), BadTypeError, ["user_metadata[1]"]),
    (6, lambda: checks.user_metadata({"a": "é" * 2**19}), BadRequestError, ["1048577 bytes", "limit is 65536"]),
    (6, lambda: checks.user_metadata({"a": "\ud800"}), BadRequestError, ["user_metadata['a']", "Unicode"]),
    (6, lambda: checks.refuse_optimizer(types.DimuonOptimizerConfig()), UnsupportedError, ["Dimuon", "AdamW"]),
    (6, lambda: checks.refuse_optimizer("adamw"), BadTypeError, ["'adamw' (str)", "AdamOptimizerConfig"]),
    (20, lambda: train([]), BadRequestError, ["No data provided"]),
    (20, lambda: custom([]), BadRequestError, ["No data provided"]),
    (21, lambda: train({}), BadTypeError, ["data is dict, expected a list of Datum"]),
    (21, lambda: train(datum() for _ in range(2)), BadTypeError, ["data is generator"]),
    (21, lambda: train([datum(), datum(), datum(), {}]), BadTypeError, ["data[3] is dict, expected Datum"]),
    (21, lambda: custom([datum(), None]), BadTypeError, ["data[1] is NoneType, expected Datum"]),
    (
        21,
        lambda: train([types.Datum(model_input=[1], loss_fn_inputs={})]),  # type: ignore[arg-type]
        BadTypeError,
        ["data[0].model_input is list", "ModelInput.from_ints"],
    ),
    (22, lambda: train([datum()], "crossentropy"), BadRequestError, ["did you mean 'cross_entropy'", "ppo"]),
    (22, lambda: train([datum()], None), BadTypeError, ["loss_fn is None", "cross_entropy"]),
    (22, lambda: train([datum()], len), BadTypeError, ["use forward_backward_custom"]),
    (24, lambda: train([rl()], "gspo"), BadRequestError, ["no 'sequence_ratio_mask'", "gspo"]),
    (22, lambda: train([wide_gspo()], "gspo"), UnsupportedError, ["2 targets per position", "'gspo'", "[N]"]),
    (22, lambda: train([datum()], "stable_reinforce"), UnsupportedError, ["'stable_reinforce'"]),
    (22, lambda: train([datum()], "custom"), UnsupportedError, ["'custom'", "forward_backward_custom"]),
    (
        23,
        lambda: train([rl()], "ppo", {"clip_low_treshold": 0.8}),
        BadRequestError,
        ["'clip_low_treshold'", "did you mean 'clip_low_threshold'", "clip_high_threshold"],
    ),
    (23, lambda: train([datum()], config={"x": 1}), BadRequestError, ["'x'", "allowed for 'cross_entropy': none"]),
    (23, lambda: train([rl()], "dro", {"beta": NAN}), BadRequestError, ["loss_fn_config['beta'] is nan"]),
    (23, lambda: train([rl()], "dro", {"beta": "0.1"}), BadTypeError, ["loss_fn_config['beta'] is '0.1' (str)"]),
    (23, lambda: train([rl()], "dro", [("beta", 1)]), BadTypeError, ["loss_fn_config", "dict or None"]),
    (23, lambda: train([rl()], "ppo", {"clip_low_threshold": 2.0}), BadRequestError, ["2 above", "0.8 and 1.2"]),
    (
        24,
        lambda: train([rl(), rl(advantages=None)], "ppo"),
        BadRequestError,
        ["data[1]", "no 'advantages', which ppo needs", "present: target_tokens, logprobs"],
    ),
    (24, lambda: train([datum(targets=None)]), BadRequestError, ["data[0]", "no 'target_tokens'", "present: none"]),
    (24, lambda: custom([datum(targets=None)]), BadRequestError, ["data[0]", "no 'target_tokens'"]),
    (25, lambda: train([datum(mask=np.ones(3))]), BadRequestError, ["data[0]", "'mask'", "target_tokens, weights"]),
    (25, lambda: train([rl(weights=wide(1))], "ppo"), BadRequestError, ["'weights'", "advantages to 0"]),
    (
        26,
        lambda: train([datum(), datum(targets=(1, 2), weights=[1.0])]),
        BadRequestError,
        ["data[1] has 3 tokens", "target_tokens [2]", "weights [1]", "shift"],
    ),
    (
        26,
        lambda: train([datum(targets=np.ones((3, 1), np.int64), weights=[1.0, 1.0, 1.0])]),
        BadRequestError,
        ["target_tokens [3, 1]", "weights [3]", "exactly the shape"],
    ),
    (26, lambda: custom([datum(targets=(1, 2))]), BadRequestError, ["data[0] has 3 tokens", "target_tokens [2]"]),
    (26, lambda: train([datum(targets=np.ones((3, 1, 1), np.int64))]), BadRequestError, ["[3, 1, 1]", "[N, K]"]),
    (26, lambda: train([datum(targets=np.ones((3, 0), np.int64))]), BadRequestError, ["shape [3, 0]"]),
    (
        27,
        lambda: train([datum(), datum((1, 2, 100))]),
        BadRequestError,
        ["data[1].model_input", "token id 100 at position 2", "0 to 99", "vocabulary size 100"],
    ),
    (27, lambda: train([datum((1, -1, 2))]), BadRequestError, ["token id -1 at position 1"]),
    (
        27,
        lambda: train([datum(targets=(2, -100, 3))]),
        BadRequestError,
        ["data[0].loss_fn_inputs['target_tokens']", "token id -100 at position 1", "weight or advantage of 0"],
    ),
    (27, lambda: train([datum(targets=np.array([[1, 2], [3, 4], [5, 999]]))]), BadRequestError, ["999", "[2, 1]"]),
    (27, lambda: train([datum(raw_chunk([1, 2, 2**70]))]), BadRequestError, ["tokens[2] is 11805916207"]),
    (27, lambda: train([datum(raw_chunk([2**63]))]), BadRequestError, ["tokens[0] is 9223372036854775808"]),
    (28, lambda: train([datum((), ())]), BadRequestError, ["data[0].model_input is empty"]),
    (28, lambda: train([datum([1] * 17)]), BadRequestError, ["length 17", "limit is 16"]),
    (
        29,
        lambda: train([datum(), datum(weights=[1.0, float("inf"), NAN])]),
        BadRequestError,
        ["NonFiniteInTensor", "data[1].loss_fn_inputs['weights'] is inf at position 1", "2 such values"],
    ),
    (29, lambda: train([rl(advantages=wide(NAN))], "ppo"), BadRequestError, ["['advantages'] is nan at position 1"]),
    (29, lambda: train([rl(logprobs=wide(-np.inf))], "cispo"), BadRequestError, ["['logprobs'] is -inf"]),
    (29, lambda: train([rl(clip_low_threshold=wide(NAN))], "ppo"), BadRequestError, ["['clip_low_threshold']"]),
    (
        30,
        lambda: train([datum(targets=np.ones(3))]),
        BadTypeError,
        ["['target_tokens'] has dtype float32", "token ids must be int64"],
    ),
    (30, lambda: train([datum(raw_chunk([1.0, 2.0, 3.0]))]), BadTypeError, ["chunks[0].tokens has dtype float64"]),
    (30, lambda: train([datum(raw_chunk(["1", "2"]))]), BadTypeError, ["tokens has dtype <U1"]),
    (30, lambda: train([datum(raw_chunk([[1], [1, 2]]))]), BadTypeError, ["tokens is not a flat list"]),
    (30, lambda: train([datum(raw_chunk([True, False]))]), BadTypeError, ["dtype bool"]),
    (30, lambda: train([datum(raw_chunk([None]))]), BadTypeError, ["dtype object"]),
    (30, lambda: train([datum(weights=np.full(3, 2**40))]), BadTypeError, ["['weights'] has dtype int64", "float32"]),
    (
        30,
        lambda: train([datum(weights=unchecked(dtype="float64"))]),
        BadTypeError,
        ["dtype 'float64'", "int64 or float32"],
    ),
    (30, lambda: train([datum(weights=unchecked(_numpy=np.ones(3, bool)))]), BadTypeError, ["holds bool"]),
    (31, lambda: train([datum(weights=unchecked(shape=[7]))]), BadRequestError, ["shape [7] but 1 values"]),
    (31, lambda: train([datum(weights=unchecked(shape=[-1]))]), BadRequestError, ["shape [-1]", "0 or more"]),
    (
        31,
        lambda: train([datum(weights=csr([1.0], [0, 1], [0], [1, 10**12]))]),
        BadRequestError,
        ["1000000000000 values when dense", "limit is 67108864"],
    ),
    (31, lambda: train([datum(weights=csr([1.0], [0, 1], [0], None))]), BadRequestError, ["shape is None"]),
    (31, lambda: train([datum(weights=csr([1.0], [0, 1], None, [1, 2]))]), BadRequestError, ["given together"]),
    (
        31,
        lambda: train([datum(weights=csr([1.0], [0, 1], [0], [3, 2]))]),
        BadRequestError,
        ["2 entries; 3 rows need 4"],
    ),
    (
        31,
        lambda: train([datum(weights=csr([1.0], [0, 1, 1], [], [2, 2]))]),
        BadRequestError,
        ["0 entries for 1 values"],
    ),
    (31, lambda: train([datum(weights=csr([1.0], [0, 0], [0], [1, 2]))]), BadRequestError, ["run from 0 to 1"]),
    (
        31,
        lambda: train([datum(weights=csr([1.0], [0, 1, 0, 1], [0], [3, 2]))]),
        BadRequestError,
        ["must not decrease", "entry 1"],
    ),
    (
        31,
        lambda: train([datum(weights=csr([1.0], [0, 1], [2], [1, 2]))]),
        BadRequestError,
        ["sparse_col_indices[0] is 2", "0 to 1"],
    ),
    (31, lambda: train([datum(weights=csr([1.0], [0, 1], [-1], [1, 2]))]), BadRequestError, ["indices[0] is -1"]),
    (
        31,
        lambda: train([datum(weights=csr([1.0, 2.0], [0, 2], [1, 1], [1, 2]))]),
        BadRequestError,
        ["must increase within a row", "entry 1"],
    ),
    (31, lambda: train([datum(weights=csr([1.0], ["a"], [0], [1, 2]))]), BadRequestError, ["flat list of integers"]),
    (31, lambda: train([datum(weights=csr([1.0], [[0], [0, 1]], [0], [1, 2]))]), BadRequestError, ["flat list"]),
    (33, lambda: train([datum(mixed(IMAGE))]), UnsupportedError, ["data[0].model_input.chunks[1]", "'image'"]),
    (33, lambda: train([datum(mixed(DMEL))]), UnsupportedError, ["chunks[1]", "'dmel'"]),
    (33, lambda: train([datum(mixed(POINTER))]), UnsupportedError, ["chunks[1]", "server does not fetch URLs"]),
    (33, lambda: custom([datum(mixed(IMAGE))]), UnsupportedError, ["chunks[1]"]),
    (34, lambda: train([datum()] * (data.MAX_DATUMS + 1)), BadRequestError, ["65537 datums", "65536", "add up"]),
    (47, lambda: custom([datum(), datum(targets=np.ones(3))]), BadTypeError, ["data[1]", "target_tokens"]),
    (49, lambda: adam(learning_rate=-1.0), BadRequestError, ["AdamParams.learning_rate is -1.0", "[0, inf)"]),
    (49, lambda: adam(learning_rate=NAN), BadRequestError, ["learning_rate is nan", "finite"]),
    (49, lambda: adam(learning_rate=float("inf")), BadRequestError, ["learning_rate is inf"]),
    (49, lambda: adam(learning_rate="1e-4"), BadTypeError, ["learning_rate is '1e-4' (str)"]),
    (49, lambda: adam(learning_rate=True), BadTypeError, ["learning_rate is True (bool)"]),
    (49, lambda: adam(beta1=1.0), BadRequestError, ["AdamParams.beta1 is 1.0", "[0, 1)"]),
    (49, lambda: adam(beta2=-0.1), BadRequestError, ["AdamParams.beta2 is -0.1"]),
    (49, lambda: adam(eps=0.0), BadRequestError, ["AdamParams.eps is 0.0", "(0, inf)"]),
    (49, lambda: adam(weight_decay=-1e-9), BadRequestError, ["AdamParams.weight_decay"]),
    (49, lambda: adam(grad_clip_norm=-1.0), BadRequestError, ["AdamParams.grad_clip_norm", "0 turns clipping off"]),
    (49, lambda: checks.adam_settings(None, None), TypeError, ["Expected AdamParams or OptimParamsBase"]),
    (49, lambda: checks.adam_settings({}, None), TypeError, ["Expected AdamParams or OptimParamsBase"]),
    (
        49,
        lambda: checks.adam_settings(types.AdamParams(), types.AdamParams()),
        ValueError,
        ["Specify optim_params or legacy adam_params, not both"],
    ),
    (
        49,
        lambda: checks.adam_settings(types.DimuonParams(learning_rate=0.1), None),
        UnsupportedError,
        ["DimuonParams", "Give AdamParams"],
    ),
    *(
        (52, lambda name=name: checks.checkpoint_name(name), BadRequestError, ["name is", "[A-Za-z0-9]"])
        for name in ("", ".", "..", "a/b", "/etc", "a\0b", "a\n", "x" * 300, "🙂", ".hidden", "-x", "a b")
    ),
    (52, lambda: checks.checkpoint_name(None), BadTypeError, ["name is None"]),
    *(
        (54, lambda ttl=ttl: checks.ttl(ttl), BadRequestError, [f"ttl_seconds is {ttl}", "from 3600 to 315360000"])
        for ttl in (0, -5, 3599, 10**12, 1.5)
    ),
    *(
        (55, lambda path=path: CheckpointKey.parse(path), BadRequestError, [repr(path), "tinker://RUN/KIND/NAME"])
        for path in (
            "",
            "weights/a",
            "http://run/weights/a",
            "tinker://run/weights",
            "tinker://run/weights/a/b",
            "tinker://run/checkpoints/a",
            "tinker:///weights/a",
            "tinker://../weights/a",
            "tinker://run/weights/..",
            "tinker://run/weights/a#b",
            "tinker://run/weights/a\n",
        )
    ),
    (55, lambda: CheckpointKey.parse(None), BadTypeError, ["path is None"]),
    (
        55,
        lambda: training_path("tinker://s:train:0/sampler_weights/a", "load_state"),
        BadRequestError,
        ["load_state got", "expected tinker://RUN/weights/NAME", "create_sampling_client", "save_state"],
    ),
    (55, lambda: training_path("tinker://r/external_weights/a", "load_state"), BadRequestError, ["external_weights"]),
    (59, lambda: sample(params=params(max_tokens=0)), BadRequestError, ["SamplingParams.max_tokens is 0"]),
    (59, lambda: sample(params=params(max_tokens=-1)), BadRequestError, ["max_tokens is -1", "at least 1"]),
    (59, lambda: sample(params=params(max_tokens=1.5)), BadTypeError, ["max_tokens is 1.5"]),
    *(
        (
            59,
            lambda count=count: sample(params=params(max_tokens=count)),
            BadRequestError,
            [f"Prompt length plus max_tokens exceeds the model's context window: 3 + {count} > 16"],
        )
        for count in (14, 10**9)
    ),
    (59, lambda: sample(text(*range(16))), BadRequestError, ["context window: 16 + 1 > 16"]),
    (60, lambda: sample(num_samples=0), BadRequestError, ["num_samples is 0", "1 to 16384"]),
    (60, lambda: sample(num_samples=-1), BadRequestError, ["num_samples is -1"]),
    (60, lambda: sample(num_samples=10**9), BadRequestError, ["num_samples is 1000000000", "16384"]),
    (60, lambda: sample(num_samples=2.0), BadTypeError, ["num_samples is 2.0"]),
    (60, lambda: sample(topk_prompt_logprobs=10**6), BadRequestError, ["topk_prompt_logprobs is 1000000", "128"]),
    (60, lambda: sample(params=params(seed=2**70)), BadRequestError, ["SamplingParams.seed is 1180591", "to 92233720"]),
    (60, lambda: sample(params=params(seed=-1)), BadRequestError, ["SamplingParams.seed is -1"]),
    (60, lambda: sample(include_prompt_logprobs=1), BadTypeError, ["include_prompt_logprobs is 1"]),
    (60, lambda: sample(topk_sample_logprobs=21), BadRequestError, ["topk_sample_logprobs is 21", "0 to 20"]),
    (60, lambda: sample(topk_sample_logprobs=-3), BadRequestError, ["topk_sample_logprobs is -3"]),
    (60, lambda: sample(prompt_alt_tokens_k=17), BadRequestError, ["prompt_alt_tokens_k is 17", "0 to 16"]),
    (60, lambda: sample(target_prompt_logprobs=np.ones(2)), BadTypeError, ["target_prompt_logprobs is ndarray"]),
    (60, lambda: targets(np.ones((2, 1), np.float32)), BadTypeError, ["target_prompt_logprobs has dtype float32"]),
    (60, lambda: targets(np.ones((3, 1), np.int64)), BadRequestError, ["shape [3, 1]", "needs [2, K]"]),
    (60, lambda: targets(np.ones(2, np.int64)), BadRequestError, ["shape [2]", "needs [2, K]"]),
    (60, lambda: targets(np.ones((2, 128), np.int64)), BadRequestError, ["128 ids per position", "1 to 127"]),
    (60, lambda: targets(np.array([[0], [VOCAB]])), BadRequestError, [f"token id {VOCAB} at position [1, 0]"]),
    (60, lambda: targets(np.array([[0], [-2]])), BadRequestError, ["token id -2 at position [1, 0]"]),
    (60, lambda: sample(prompt_logprobs_last_n=1), BadRequestError, ["set include_prompt_logprobs"]),
    *(
        (
            60,
            lambda n=n: sample(prompt_logprobs_last_n=n, include_prompt_logprobs=True),
            BadRequestError,
            [f"prompt_logprobs_last_n is {n}", "from 1 to 2"],
        )
        for n in (0, -1, 3)
    ),
    (60, lambda: sample(params={"max_tokens": 1}), BadTypeError, ["expected SamplingParams"]),
    (61, lambda: sample(params=params(temperature=-0.1)), BadRequestError, ["temperature is -0.1", "[0, inf)"]),
    (61, lambda: sample(params=params(temperature=NAN)), BadRequestError, ["temperature is nan"]),
    (61, lambda: sample(params=params(top_p=0.0)), BadRequestError, ["top_p is 0.0", "(0, 1]"]),
    (61, lambda: sample(params=params(top_p=1.5)), BadRequestError, ["top_p is 1.5", "(0, 1]"]),
    (61, lambda: sample(params=params(top_k=0)), BadRequestError, ["top_k is 0", "-1 to turn it off"]),
    (61, lambda: sample(params=params(top_k=-2)), BadRequestError, ["top_k is -2"]),
    (62, lambda: sample(params=params(stop="")), BadRequestError, ["stop[0] has 0 characters", "1 to 4096"]),
    (62, lambda: sample(params=params(stop=["a", ""])), BadRequestError, ["stop[1] has 0 characters"]),
    (62, lambda: sample(params=params(stop=["a"] * 10_000)), BadRequestError, ["10000 entries", "limit is 64"]),
    (62, lambda: sample(params=params(stop="x" * 2**20)), BadRequestError, ["1048576 characters", "4096"]),
    (62, lambda: sample(params=params(stop=[1, "a"])), BadTypeError, ["stop[0] is 1 (int)", "all as token ids"]),
    (62, lambda: sample(params=params(stop=[1, 100])), BadRequestError, ["stop[1] is 100", "from 0 to 99"]),
    (62, lambda: sample(params=params(stop={"a"})), BadTypeError, ["SamplingParams.stop is {'a'}"]),
    (63, lambda: sample(text()), BadRequestError, ["prompt is empty"]),
    (63, lambda: sample(types.ModelInput.empty()), BadRequestError, ["prompt is empty"]),
    (63, lambda: sample(text(1, 2, 100)), BadRequestError, ["prompt has token id 100 at position 2"]),
    (63, lambda: sample(text(*[1] * 17)), BadRequestError, ["prompt has length 17", "limit is 16"]),
    (63, lambda: sample(mixed(IMAGE)), UnsupportedError, ["prompt.chunks[1]", "'image'"]),
    (63, lambda: sample([1, 2]), BadTypeError, ["prompt is list", "ModelInput.from_ints"]),
    (
        64,
        lambda: sampler_path("tinker://s:train:0/weights/a", "create_sampling_client"),
        BadRequestError,
        ["create_sampling_client got", "save_weights_for_sampler"],
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "parts"), [row[1:] for row in BAD], ids=[f"row{row[0]}-{i}" for i, row in enumerate(BAD)]
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(BadRequestError) as caught:
        call()
    assert isinstance(caught.value, error) and isinstance(caught.value, ValueError)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_settings_come_back_whole() -> None:
    spec = lora(rank=np.int64(512), seed=2**32 - 1, train_mlp=False)
    assert (spec.rank, spec.seed, spec.train_mlp, spec.train_attn) == (512, 2**32 - 1, False, True)
    assert type(spec.rank) is int
    drawn = lora(seed=None).seed
    assert 0 <= drawn < 2**31 and drawn != lora(seed=None).seed
    settings = checks.adam_settings(None, types.AdamParams(learning_rate=0, grad_clip_norm=1))
    assert (settings.learning_rate, settings.beta2, settings.eps, settings.grad_clip_norm) == (0.0, 0.95, 1e-12, 1.0)
    assert checks.user_metadata(None) == {} and checks.user_metadata({"a": "b"}) == {"a": "b"}
    assert checks.ttl(None) is None and checks.ttl(3600) == 3600
    assert checks.checkpoint_name("step-1.final_2") == "step-1.final_2"
    checks.refuse_optimizer(None)
    checks.refuse_optimizer(types.AdamOptimizerConfig())


def test_training_data_become_plain_arrays() -> None:
    weights = np.array([1.0, 0.5, -2.0], dtype=np.float32)
    split = types.ModelInput(chunks=[TEXT, types.EncodedTextChunk(tokens=[]), types.EncodedTextChunk(tokens=(3,))])
    sequences, loss = train([datum(split, weights=weights), datum()])
    first, second = sequences
    assert first.tokens_T.tolist() == [1, 2, 3] and first.targets.tolist() == [2, 3, 4]
    assert first.tokens_T.dtype == first.targets.dtype == np.int32
    assert first.inputs["weights"].dtype == np.float32
    weights[:] = 9
    assert first.inputs["weights"].tolist() == [1.0, 0.5, -2.0], "the caller's later changes do not reach the request"
    assert second.inputs["weights"].tolist() == [1.0, 1.0, 1.0], "weights default to one"
    assert (loss.name, dict(loss.config)) == ("cross_entropy", {})
    integers = train([datum(weights=np.array([0, 1, 1]))])[0][0].inputs["weights"]
    assert integers.dtype == np.float32 and integers.tolist() == [0, 1, 1]


def test_loss_settings_are_filled_in() -> None:
    bounds = [0.5, 0.6, 0.7]
    sequences, loss = train([rl(clip_low_threshold=bounds), rl()], "ppo", {"clip_low_threshold": 0.9})
    assert dict(loss.config) == {"clip_low_threshold": 0.9, "clip_high_threshold": 1.2}
    assert np.allclose(sequences[0].inputs["clip_low_threshold"], bounds)
    assert "clip_low_threshold" not in sequences[1].inputs, "packing fills it in from the settings"
    assert all("clip_high_threshold" not in sequence.inputs for sequence in sequences)
    assert all(set(sequence.inputs) == {"logprobs", "advantages"} for sequence in train([rl()], "cispo")[0])


def test_sparse_targets_are_densified_with_zero() -> None:
    targets = np.array([[0, 5], [0, 0], [7, 0]])
    sparse = types.TensorData(
        data=[5, 7], dtype="int64", shape=[3, 2], sparse_crow_indices=[0, 1, 1, 2], sparse_col_indices=[1, 0]
    )
    weights = np.array([[0, 0.5], [1, 2], [0.25, 0]], np.float32)
    (one,), _ = train([datum(targets=sparse, weights=weights)])
    assert one.targets.tolist() == targets.tolist()
    sparse_weights = csr([0.5, 0.25], [0, 1, 1, 2], [1, 0], [3, 2])
    (two,), _ = train([datum(targets=targets, weights=sparse_weights)])
    assert two.inputs["weights"].tolist() == [[0, 0.5], [0, 0], [0.25, 0]]
    (empty,), _ = train([datum(targets=targets, weights=csr([], [0, 0, 0, 0], [], [3, 2]))])
    assert not empty.inputs["weights"].any()


@pytest.mark.torch
def test_sparse_tensors_equal_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    dense = rng.integers(1, VOCAB, (CONTEXT, 40)) * (rng.random((CONTEXT, 40)) < 0.05)
    weights = (dense > 0).astype(np.float32)
    item = datum([1] * CONTEXT, torch.from_numpy(dense), weights=torch.from_numpy(weights))
    assert item.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    (sequence,), _ = train([item])
    assert (sequence.targets == dense).all() and (sequence.inputs["weights"] == weights).all()


def test_zero_weights_are_fine_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train([datum(weights=[0.0, 0.0, 0.0])] * 2)
        train([datum(weights=[0.0, 0.0, 0.0]), datum()])
    assert [record.getMessage() for record in caplog.records] == [
        "every weight of the 2 datums is zero: loss and gradient are zero"
    ]


def test_custom_data_leave_other_inputs_to_the_user() -> None:
    (sequence,) = custom([datum(reward=np.array([NAN]), weights=[1.0])])
    assert sequence.targets.tolist() == [2, 3, 4] and dict(sequence.inputs) == {}


def test_long_batches_are_checked_fast() -> None:
    tokens = list(range(50)) * 80
    batch = [datum(tokens, np.array(tokens), weights=np.ones(4000, np.float32)) for _ in range(250)]
    start = time.perf_counter()
    checks.training_data(batch, "cross_entropy", None, vocab_size=VOCAB, max_context=4096)
    assert time.perf_counter() - start < 2.0, "a million tokens take about 0.1 s"


def test_generation_request() -> None:
    request = sample(
        num_samples=np.int64(2),
        params=types.SamplingParams(max_tokens=13, seed=5, temperature=0, top_k=100, top_p=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=128,
        prompt_logprobs_last_n=2,
    )
    assert request.tokens_T.tolist() == [1, 2, 3] and request.tokens_T.dtype == np.int32
    assert (request.num_samples, request.max_tokens, request.seed, request.temperature) == (2, 13, 5, 0.0)
    assert request.top_k == -1, "all of the vocabulary is no limit"
    assert (request.stop_ids, request.find_stop) == ((7, 9), None)
    assert request.prompt_logprobs and request.topk_prompt == 128
    assert sample().max_tokens == CONTEXT - 3, "None takes the rest of the context"
    assert sample().seed != sample().seed


def test_stop_kinds() -> None:
    def stops(stop: object) -> tuple[tuple[int, ...], bool]:
        request = sample(params=params(stop=stop))
        return request.stop_ids, request.find_stop is not None

    assert stops(None) == ((7, 9), False)
    assert stops([]) == ((), False), "an empty list turns off every stop, EOS included"
    assert stops([5, 6, 5]) == ((5, 6), False)
    assert stops("ab") == stops(["ab", "c"]) == ((7, 9), True), "EOS still ends a row"


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_paths_round_trip(kind: str) -> None:
    written = f"tinker://0b1c-2d:train:3/{kind}/step-0100"
    path = CheckpointKey.parse(written)
    assert (path.run_id, path.kind, path.name) == ("0b1c-2d:train:3", kind, "step-0100")
    assert str(path) == written
    sdk = types.ParsedCheckpointTinkerPath.from_tinker_path(written)
    assert (sdk.training_run_id, sdk.checkpoint_id) == (path.run_id, f"{path.kind}/{path.name}")


def test_right_kinds_pass() -> None:
    assert training_path("tinker://r/weights/a", "load_state").name == "a"
    assert sampler_path("tinker://r/sampler_weights/a", "create_sampling_client").name == "a"


def test_unknown_chunk_is_named() -> None:
    prompt = types.ModelInput.model_construct(chunks=[TEXT, SimpleNamespace(type="video")])
    with pytest.raises(BadTypeError, match=r"prompt\.chunks\[1\] is SimpleNamespace"):
        sample(prompt)
