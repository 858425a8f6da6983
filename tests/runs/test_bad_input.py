"""Does a bad call raise at once and say what was wrong, and leave the run, the disk and the next step as they were?

Every row makes one bad call through the public API on a real engine. The numbers are the rows of the bad-input matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tinker

import jax_client
from jax_client import types
from support import bad_calls
from support.bad_calls import (
    DATA,
    HUGE,
    IMAGE,
    INF,
    LACKING,
    NAN,
    NOTHING,
    POINTER,
    REFUSED,
    SHORT,
    VOCAB,
    Bench,
    Row,
    check,
    chunk,
    datum,
    numbered,
    raw,
    rl,
    settings,
    sparse,
    tensor,
)

bench, shared = bad_calls.bench, bad_calls.shared

CREATION: list[Row] = [
    (1, lambda b: b.lora(""), REFUSED, ["base_model is required", "get_server_capabilities"]),
    (1, lambda b: b.lora(None), REFUSED, ["base_model is required"]),
    *((3, lambda b, r=r: b.lora(rank=r), REFUSED, [f"rank is {r}", "from 1 to 512"]) for r in (0, -1, 10**9)),
    *((3, lambda b, r=r: b.lora(rank=r), TypeError, [f"rank is {r!r}", "from 1 to 512"]) for r in (2.5, "8", True)),
    (4, lambda b: b.lora(**NOTHING), REFUSED, ["At least one of train_mlp, train_attn, or train_unembed must be True"]),
    *((6, lambda b, s=s: b.lora(seed=s), REFUSED, [f"seed is {s}", "from 0 to 4294967295"]) for s in (-1, 2**64)),
    (6, lambda b: b.lora(seed=1.5), TypeError, ["seed is 1.5 (float)"]),
    (6, lambda b: b.lora(user_metadata={"a": 1}), TypeError, ["user_metadata['a'] is 1 (int)"]),
    (6, lambda b: b.lora(user_metadata={"a": "x" * 2**20}), REFUSED, ["1048577 bytes", "limit is 65536"]),
    (6, lambda b: jax_client.ServiceClient({"a": "x" * 2**20}), REFUSED, ["1048577 bytes", "limit is 65536"]),
    (8, lambda b: settings(b.home, mesh={"heads": 2}), ValueError, ["'heads'", "data, fsdp, sequence, expert, tensor"]),
    (8, lambda b: settings(b.home, mesh={"tensor": 0}), ValueError, ["mesh['tensor'] is 0", "at least 1"]),
    (
        8,
        lambda b: settings(b.home, mesh={"sequence": 2}),
        ValueError,
        ["mesh['sequence'] is 2", "data, fsdp, expert and tensor"],
    ),
]
TRAINING: list[Row] = [
    (20, lambda b: b.train([]), REFUSED, ["No data provided"]),
    (20, lambda b: b.client.forward([], "cross_entropy"), REFUSED, ["No data provided"]),
    (21, lambda b: b.train({}), TypeError, ["data is dict, expected a list of Datum"]),
    (21, lambda b: b.train(d for d in DATA), TypeError, ["data is generator", "list(...)"]),
    (21, lambda b: b.train([*DATA, {}]), TypeError, ["data[3] is dict, expected Datum"]),
    (22, lambda b: b.train(DATA, "crossentropy"), REFUSED, ["did you mean 'cross_entropy'", "ppo"]),
    (22, lambda b: b.train(DATA, None), TypeError, ["loss_fn is None", "cross_entropy"]),
    (22, lambda b: b.train(DATA, len), TypeError, ["use forward_backward_custom"]),
    (23, lambda b: b.train([rl()], "dro", {"bta": 1}), REFUSED, ["'bta'", "did you mean 'beta'", "allowed for 'dro'"]),
    (23, lambda b: b.train([rl()], "dro", {"beta": NAN}), REFUSED, ["loss_fn_config['beta'] is nan"]),
    (23, lambda b: b.train([rl()], "dro", {"beta": "1"}), TypeError, ["loss_fn_config['beta'] is '1' (str)"]),
    (24, lambda b: b.train([rl(), LACKING], "ppo"), REFUSED, ["data[1]", "no 'advantages'", "present: target_tokens"]),
    (25, lambda b: b.train([datum(mask=np.ones(3))]), REFUSED, ["data[0]", "'mask'", "target_tokens, weights"]),
    (26, lambda b: b.train([*DATA, SHORT]), REFUSED, ["data[3] has 3 tokens", "target_tokens [2]", "weights [1]"]),
    (27, lambda b: b.train([datum(), datum((1, -1, 2))]), REFUSED, ["data[1]", "token id -1 at position 1", "size 64"]),
    (27, lambda b: b.train([datum((1, 2, VOCAB))]), REFUSED, ["token id 64 at position 2", "0 to 63", "size 64"]),
    (27, lambda b: b.train([datum(targets=(2, VOCAB, 3))]), REFUSED, ["['target_tokens']", "token id 64"]),
    (28, lambda b: b.train([datum((), ())]), REFUSED, ["data[0].model_input is empty"]),
    (28, lambda b: b.train([datum([1] * 129, (1,) * 129)]), REFUSED, ["length 129", "limit is 128"]),
    (29, lambda b: b.train([*DATA, HUGE]), REFUSED, ["NonFiniteInTensor", "data[3]", "['weights'] is inf at position"]),
    (29, lambda b: b.train([rl(advantages=[NAN, 1.0, 1.0])], "ppo"), REFUSED, ["NonFinite", "['advantages'] is nan"]),
    (29, lambda b: b.train([rl(logprobs=[-INF, 1.0, 1.0])], "dro"), REFUSED, ["NonFinite", "['logprobs'] is -inf"]),
    (30, lambda b: b.train([datum(targets=np.ones(3))]), TypeError, ["['target_tokens'] has dtype float32", "int64"]),
    (30, lambda b: b.train([datum(raw([1.0, 2.0, 3.0]))]), TypeError, ["tokens has dtype float64"]),
    (30, lambda b: b.train([datum(raw([True, False, True]))]), TypeError, ["tokens has dtype bool"]),
    (30, lambda b: b.train([datum(raw(["1", "2", "3"]))]), TypeError, ["tokens has dtype <U1"]),
    (30, lambda b: b.train([datum(raw([None]))]), TypeError, ["tokens has dtype object"]),
    (30, lambda b: b.train([datum(raw([[1], [1, 2]]))]), TypeError, ["tokens is not a flat list"]),
    (30, lambda b: b.train([datum(raw([1, 2, 2**70]))]), REFUSED, ["tokens[2] is 11805916207"]),
    (30, lambda b: b.train([datum(weights=tensor(dtype="float64"))]), TypeError, ["dtype 'float64'", "float32"]),
    (31, lambda b: b.train([datum(weights=tensor(shape=[7]))]), REFUSED, ["shape [7] but 1 values"]),
    (31, lambda b: b.train([datum(weights=sparse([0, 1], [0], [1, 10**12]))]), REFUSED, ["1000000000000 values"]),
    (31, lambda b: b.train([datum(weights=sparse([0, 1, 0, 1], [0], [3, 2]))]), REFUSED, ["must not decrease"]),
    (31, lambda b: b.train([datum(weights=sparse([0, 1], [2], [1, 2]))]), REFUSED, ["sparse_col_indices[0] is 2"]),
    (33, lambda b: b.train([datum(), datum(IMAGE)]), REFUSED, ["data[1].model_input.chunks[1]", "'image'"]),
    (33, lambda b: b.train([datum(POINTER)]), REFUSED, ["chunks[1]", "server does not fetch URLs"]),
    (33, lambda b: b.train([datum(chunk(types.DmelChunk(dmel=b"x")))]), REFUSED, ["chunks[1]", "'dmel'"]),
    (34, lambda b: b.train([DATA[0]] * 10**6), REFUSED, ["1000000 datums", "65536", "gradients add up"]),
]
STATE: list[Row] = [
    *((49, lambda b, v=v: b.step(learning_rate=v), REFUSED, [f"learning_rate is {v}"]) for v in (-1.0, NAN, INF)),
    (49, lambda b: b.step(learning_rate="1"), TypeError, ["AdamParams.learning_rate is '1' (str)"]),
    (49, lambda b: b.step(beta1=1.0), REFUSED, ["AdamParams.beta1 is 1.0", "[0, 0.9999999]"]),
    (49, lambda b: b.step(beta2=-0.1), REFUSED, ["AdamParams.beta2 is -0.1", "[0, 0.9999999]"]),
    (49, lambda b: b.step(eps=0.0), REFUSED, ["AdamParams.eps is 0.0", "[1.2e-38, 3.4e+38]"]),
    (49, lambda b: b.step(weight_decay=-1.0), REFUSED, ["AdamParams.weight_decay is -1.0", "[0, 3.4e+38]"]),
    (49, lambda b: b.step(grad_clip_norm=-1.0), REFUSED, ["AdamParams.grad_clip_norm is -1.0", "0 turns clipping off"]),
    (49, lambda b: b.client.optim_step({}), TypeError, ["Expected AdamParams or OptimParamsBase"]),
    *(
        (52, lambda b, method=method, name=name: getattr(b.client, method)(name), REFUSED, ["name is", "[A-Za-z0-9]"])
        for method in ("save_state", "save_weights_for_sampler")
        for name in ("", "..", "a/b", "/etc/x", "a\0b", "x" * 300, "🙂", ".hidden")
    ),
    (52, lambda b: b.client.save_state(None), TypeError, ["name is None"]),
    *((54, lambda b, t=t: b.client.save_state("n", t), REFUSED, [f"ttl_seconds is {t}"]) for t in (0, -5, 10**12, 1.5)),
    *(
        (55, lambda b, path=path: b.client.load_state(path), REFUSED, [repr(path), "tinker://RUN/KIND/NAME"])
        for path in ("", "taken", "http://run/weights/a", "tinker://run/weights", "tinker://../weights/a")
    ),
    (55, lambda b: b.client.load_state(7), TypeError, ["path is 7 (int)"]),
    (55, lambda b: b.load("sampler"), REFUSED, ["got tinker://", "expected tinker://RUN/weights/NAME", "save_state"]),
    (55, lambda b: b.service.create_training_client_from_state("x"), REFUSED, ["got path 'x'"]),
    (55, lambda b: b.load("no-weights"), tinker.NotFoundError, ["no checkpoint weights/none", "it has", "taken"]),
    (56, lambda b: b.load("small"), REFUSED, ["checkpoint: rank=2, ", "train_mlp=False", "client:     rank=4, "]),
    (56, lambda b: b.load("foreign"), REFUSED, ["other'", "model'", "nothing was loaded"]),
    (58, lambda b: b.load("weights-only"), REFUSED, ["Adam's moments are missing", "Use load_state"]),
    (58, lambda b: b.load("newer"), REFUSED, ["format 2", "reads up to 1", "Upgrade"]),
]
LIMIT = "Prompt length plus max_tokens exceeds the model's context window: "
SAMPLING: list[Row] = [
    *((59, lambda b, m=m: b.sample(max_tokens=m), REFUSED, [f"max_tokens is {m}", "at least 1"]) for m in (0, -1)),
    *((59, lambda b, m=m: b.sample(max_tokens=m), REFUSED, [f"{LIMIT}3 + {m} > 128"]) for m in (126, 10**9)),
    (59, lambda b: b.sample(types.ModelInput.from_ints([1] * 128), max_tokens=None), REFUSED, [f"{LIMIT}128 + 1"]),
    *((60, lambda b, n=n: b.sample(None, n), REFUSED, [f"num_samples is {n}", "16384"]) for n in (0, -1, 10**9)),
    (60, lambda b: b.sample(topk_prompt_logprobs=10**6), REFUSED, ["topk_prompt_logprobs is 1000000", "128"]),
    (60, lambda b: b.sample(seed=2**70), REFUSED, ["SamplingParams.seed is 1180591"]),
    (61, lambda b: b.sample(temperature=-0.1), REFUSED, ["temperature is -0.1", "[0, 3.4e+38]"]),
    (61, lambda b: b.sample(temperature=NAN), REFUSED, ["temperature is nan"]),
    *((61, lambda b, p=p: b.sample(top_p=p), REFUSED, [f"top_p is {p}", "(0, 1]"]) for p in (0.0, 1.5)),
    *((61, lambda b, k=k: b.sample(top_k=k), REFUSED, [f"top_k is {k}", "-1"]) for k in (0, -2)),
    (62, lambda b: b.sample(stop=""), REFUSED, ["stop[0] has 0 characters", "1 to 4096"]),
    (62, lambda b: b.sample(stop=["a"] * 10_000), REFUSED, ["10000 entries", "limit is 64"]),
    (62, lambda b: b.sample(stop="x" * 2**20), REFUSED, ["1048576 characters", "4096"]),
    (62, lambda b: b.sample(stop=[1, "a"]), TypeError, ["stop[0] is 1 (int)", "all as token ids"]),
    (63, lambda b: b.sample(types.ModelInput.empty()), REFUSED, ["prompt is empty"]),
    (63, lambda b: b.sample(types.ModelInput.from_ints([1, 2, VOCAB])), REFUSED, ["token id 64 at position 2"]),
    (63, lambda b: b.sampler.compute_logprobs(types.ModelInput.from_ints([-1])), REFUSED, ["token id -1 at position"]),
    (63, lambda b: b.sample(IMAGE), REFUSED, ["prompt.chunks[1]", "'image'"]),
    (64, lambda b: b.sampling(None), REFUSED, ["Either model_path or base_model"]),
    (64, lambda b: b.sampling("sampler", b.model), REFUSED, ["both model_path", "give one of them"]),
    (64, lambda b: b.sampling("taken"), REFUSED, ["save_weights_for_sampler"]),
]


@numbered(CREATION + TRAINING + STATE + SAMPLING)
def test_a_bad_call_raises_at_the_call(
    bench: Bench, call: Callable[[Bench], Any], kind: type[BaseException], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        call(bench)
    check(caught.value, kind, parts)
    if kind is not tinker.NotFoundError:
        assert isinstance(caught.value, ValueError)
