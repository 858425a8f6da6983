"""Is every bad call refused at once, with a message that says what was wrong and what to do?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tinker import types

from jax_client.errors import BadRequestError, BadTypeError, UnsupportedError
from jax_client.runs import checks
from jax_client.runs.checks import data
from jax_client.runs.paths import sampler_path, training_path
from jax_client.values import CheckpointKey
from support.calls import (
    DMEL,
    IMAGE,
    NAN,
    POINTER,
    VOCAB,
    adam,
    csr,
    custom,
    datum,
    lora,
    mixed,
    params,
    raw_chunk,
    rl,
    sample,
    targets,
    text,
    train,
    unchecked,
    wide,
    wide_gspo,
)

# Row of the bad-input matrix, call, error class, and what the message must contain.
BAD: list[tuple[int, Callable[[], object], type[Exception], list[str]]] = [
    (1, lambda: lora(""), BadRequestError, ["base_model is required", "get_server_capabilities"]),
    (1, lambda: lora(None), BadRequestError, ["base_model is required"]),
    (3, lambda: lora(rank=0), BadRequestError, ["rank is 0", "from 1 to 512"]),
    (3, lambda: lora(rank=-1), BadRequestError, ["rank is -1", "from 1 to 512"]),
    (3, lambda: lora(rank=2.5), BadTypeError, ["rank is 2.5 (float)", "from 1 to 512"]),
    (3, lambda: lora(rank="8"), BadTypeError, ["rank is '8' (str)"]),
    (3, lambda: lora(rank=True), BadTypeError, ["rank is True (bool)"]),
    (3, lambda: lora(rank=10**9), BadRequestError, ["rank is 1000000000", "from 1 to 512", "lora_rank="]),
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
    (22, lambda: train([wide_gspo()], "gspo"), UnsupportedError, ["2 targets per position", "'gspo'", "[N]"]),
    (
        22,
        lambda: train([datum()], "stable_reinforce"),
        UnsupportedError,
        ["'stable_reinforce'", "loss_fn=importance_sampling", "--map-loss"],
    ),
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
    (49, lambda: adam(learning_rate=-1.0), BadRequestError, ["AdamParams.learning_rate is -1.0", "[0, 3.4e+38]"]),
    (49, lambda: adam(learning_rate=1e39), BadRequestError, ["AdamParams.learning_rate is 1e+39", "[0, 3.4e+38]"]),
    (49, lambda: adam(learning_rate=NAN), BadRequestError, ["learning_rate is nan", "finite"]),
    (49, lambda: adam(learning_rate=float("inf")), BadRequestError, ["learning_rate is inf"]),
    (49, lambda: adam(learning_rate="1e-4"), BadTypeError, ["learning_rate is '1e-4' (str)"]),
    (49, lambda: adam(learning_rate=True), BadTypeError, ["learning_rate is True (bool)"]),
    (49, lambda: adam(beta1=1.0), BadRequestError, ["AdamParams.beta1 is 1.0", "[0, 0.9999999]"]),
    (49, lambda: adam(beta2=1 - 1e-9), BadRequestError, ["AdamParams.beta2 is 0.999999999", "[0, 0.9999999]"]),
    (49, lambda: adam(beta2=-0.1), BadRequestError, ["AdamParams.beta2 is -0.1"]),
    (49, lambda: adam(eps=0.0), BadRequestError, ["AdamParams.eps is 0.0", "[1.2e-38, 3.4e+38]"]),
    (49, lambda: adam(eps=1e-40), BadRequestError, ["AdamParams.eps is 1e-40"]),
    (49, lambda: adam(eps=1e39), BadRequestError, ["AdamParams.eps is 1e+39"]),
    (49, lambda: adam(weight_decay=1e39), BadRequestError, ["AdamParams.weight_decay is 1e+39"]),
    (49, lambda: adam(grad_clip_norm=1e39), BadRequestError, ["AdamParams.grad_clip_norm is 1e+39"]),
    (49, lambda: adam(grad_clip_norm=1e-45), BadRequestError, ["grad_clip_norm is 1e-45", "0 turns clipping off"]),
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
    (59, lambda: sample(params=params(max_tokens=0)), BadRequestError, ["max_tokens is 0", "compute_logprobs"]),
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
    (61, lambda: sample(params=params(temperature=-0.1)), BadRequestError, ["temperature is -0.1", "[0, 3.4e+38]"]),
    (61, lambda: sample(params=params(temperature=1e39)), BadRequestError, ["temperature is 1e+39", "[0, 3.4e+38]"]),
    (61, lambda: sample(params=params(temperature=NAN)), BadRequestError, ["temperature is nan"]),
    (61, lambda: sample(params=params(top_p=0.0)), BadRequestError, ["top_p is 0.0", "(0, 1]", "temperature=0"]),
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
    (63, lambda: sample(text(*[1] * 17)), BadRequestError, ["prompt has length 17", "limit is 16", "max_length="]),
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
