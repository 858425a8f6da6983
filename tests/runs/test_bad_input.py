"""Does a bad call say what was wrong, and leave the run, the disk and the next step exactly as they were?

Every row makes one bad call through the public API on a real engine. Afterwards the adapter, the accumulated gradient,
the step, the checkpoints, the memory and the compiled programs must be what they were, and a valid step must give the
bit-identical result of a run without the bad call. The numbers are the rows of the bad-input matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tinker

import jax_client
from jax_client import types
from jax_client.checkpoint import manifest
from jax_client.checkpoint.disk import sealed
from jax_client.engine.core import memory
from jax_client.engine.engine import STEP_RATES, STEP_SUMS
from jax_client.engine.train import packing
from jax_client.errors import JaxClientError
from jax_client.runs.results import run_metrics
from jax_client.values import CheckpointKey
from support.golden_cases import CASES, base_values, sequences
from support.weight_files import hf_tensors, write_hf

MODEL = CASES["llama_tied"]
VOCAB, CONTEXT, RANK = 64, 128, 4
ADAM = types.AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)
NAN, INF = float("nan"), float("inf")
NOTHING = {"train_mlp": False, "train_attn": False, "train_unembed": False}
REFUSED, FAILED = tinker.BadRequestError, tinker.RequestFailedError


def datum(tokens: Any = (1, 2, 3), targets: Any = (2, 3, 4), **inputs: Any) -> types.Datum:
    prompt = tokens if isinstance(tokens, types.ModelInput) else types.ModelInput.from_ints(list(tokens))
    given: dict[str, Any] = {} if targets is None else {"target_tokens": targets}
    if isinstance(targets, tuple):
        given["target_tokens"] = list(targets)
    return types.Datum(model_input=prompt, loss_fn_inputs=given | inputs)


def rl(**changes: Any) -> types.Datum:
    inputs = {"logprobs": [-1.0, -2.0, -3.0], "advantages": [1.0, 0.0, -1.0]} | changes
    return datum(**{key: value for key, value in inputs.items() if value is not None})


def raw(tokens: object) -> types.ModelInput:
    """A prompt that never saw the SDK's own checks."""
    return types.ModelInput.model_construct(chunks=[types.EncodedTextChunk.model_construct(tokens=tokens)])


def tensor(**fields: Any) -> types.TensorData:
    """A tensor that never saw the SDK's own checks."""
    made = types.TensorData(data=[1.0], dtype="float32")
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def sparse(crow: object, col: object, shape: list[int]) -> types.TensorData:
    return tensor(_numpy=np.ones(1, np.float32), sparse_crow_indices=crow, sparse_col_indices=col, shape=shape)


def chunk(kind: Any) -> types.ModelInput:
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 2]), kind])


IMAGE = chunk(types.ImageChunk(data=b"png", format="png", expected_tokens=1))
POINTER = chunk(types.ImageAssetPointerChunk(format="png", location="file:///etc/passwd", expected_tokens=1))


LACKING = rl(advantages=None)
SHORT = datum(targets=(1, 2), weights=[1.0])
HUGE = datum(weights=[1.0, INF, NAN])


def batch(scale: float | None = None) -> list[types.Datum]:
    """The canary's data; with every weight `scale` if that is given."""
    weights = lambda s: s["weights"] if scale is None else np.full_like(s["weights"], scale)  # noqa: E731
    return [datum(s["tokens"].tolist(), s["targets"], weights=weights(s)) for s in sequences(MODEL)]


DATA = batch()


@dataclass(slots=True)
class Bench:
    """One service with one run at a known state, and the checkpoints that the bad calls need."""

    service: Any
    client: Any
    home: Path
    model: str
    other_model: str
    neighbour: Any = None
    sampler: Any = None
    paths: dict[str, str] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    expected: dict[bool, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def engine(self) -> Any:
        return self.client._run._engine

    @property
    def adapter(self) -> Any:
        return self.client._run._adapter

    def reset(self, *, gradients: bool) -> None:
        """Go back to the known state; the arrays are immutable, so these are references."""
        for name, value in self.start.items():
            setattr(self.adapter, name, value if name != "grads" or gradients else None)

    def weights(self) -> str:
        """Hash the adapter: weights, moments, accumulated gradient and counters."""
        adapter, digest = self.adapter, hashlib.sha256()
        for leaf in jax.tree.leaves((adapter.weights, adapter.mu, adapter.nu, adapter.grads)):
            digest.update(np.asarray(leaf).tobytes())
        return f"{digest.hexdigest()} {adapter.grads is None} {adapter.step} {adapter.skipped_in_a_row}"

    def everything(self) -> tuple[Any, ...]:
        """Return the adapter's hash, what is on disk and listed, the memory by kind, and the number of compiles."""
        found = (self.home / "state").rglob("*")
        # The catalogue only remembers what the other files say, and a listing may make it; metrics come when they may.
        own = ("catalogue.sqlite", "metrics.sqlite")
        files = {str(path): path.stat().st_size for path in found if not path.name.startswith(own)}
        listed = self.service.create_rest_client().list_checkpoints(self.client.model_id).result().checkpoints
        memory = {key: value for key, value in self.engine.describe()["memory_bytes"].items() if key != "available"}
        compiled, keys = len(self.engine.describe()["compiled"]), set(self.service._session.loss_keys)
        return self.weights(), files, listed, memory, compiled, keys

    def canary(self) -> tuple[Any, ...]:
        """Take a valid step and return all that came of it."""
        training, step = self.client.forward_backward(DATA, "cross_entropy"), self.client.optim_step(ADAM)
        output = training.result(30)
        logprobs = [output["logprobs"].to_numpy().tobytes() for output in output.loss_fn_outputs]
        # Of this very moment.
        rates = {f"{name}:mean" for name in STEP_RATES} | {f"{name}:sum" for name in STEP_SUMS.values()}
        metrics = {key: value for key, value in step.result(30).metrics.items() if key not in rates}
        return logprobs, output.metrics, metrics, self.weights()

    def sample(self, prompt: Any = None, num_samples: Any = 1, **changes: Any) -> Any:
        known = {name: changes.pop(name) for name in list(changes) if name in types.SamplingParams.model_fields}
        params = types.SamplingParams.model_construct(**{**dict(types.SamplingParams(max_tokens=1)), **known})
        prompt = types.ModelInput.from_ints([1, 2, 3]) if prompt is None else prompt
        return self.sampler.sample(prompt, num_samples, params, **changes)

    def lora(self, base_model: Any = "m", **changes: Any) -> Any:
        return self.service.create_lora_training_client(base_model, **changes)

    def train(self, data: Any, loss_fn: Any = "cross_entropy", config: Any = None) -> Any:
        return self.client.forward_backward(data, loss_fn, config)

    def step(self, **changes: Any) -> Any:
        return self.client.optim_step(types.AdamParams.model_construct(**{**dict(types.AdamParams()), **changes}))

    def load(self, name: str) -> Any:
        return self.client.load_state_with_optimizer(self.paths[name])

    def sampling(self, name: str | None, base_model: str | None = None) -> Any:
        return self.service.create_sampling_client(None if name is None else self.paths[name], base_model)

    def custom(self, loss: Any, data: Any = None) -> Any:
        return self.client.forward_backward_custom(DATA if data is None else data, loss)


def settings(home: Path, **changes: Any) -> jax_client.EngineConfig:
    return jax_client.EngineConfig(
        **{"dtype": "float32", "state_dir": home / "state", "compilation_cache_dir": "", "precompile": False, **changes}
    )


def save_variants(bench: Bench) -> None:
    """Save the checkpoints that some rows ask for: two good ones, and others that differ in what they say."""
    run, state = bench.client.model_id, bench.client.save_state("taken").result()
    sampler = bench.client.save_weights_for_sampler("sampler").result()
    bench.paths = {"taken": state.path, "sampler": sampler.path}
    bench.paths |= {f"no-{kind}": f"tinker://{run}/{kind}/none" for kind in ("weights", "sampler_weights")}
    store = bench.service._session.store
    saved, record = store.load(CheckpointKey(run, "weights", "taken"))
    variants = {
        "small": {"spec": {**record.metadata["spec"], "rank": 2, "train_mlp": False}},
        "foreign": {"base_model": bench.other_model, "base_fingerprint": "another"},
        "weights-only": {"optimizer": False},
        "newer": {},
    }
    for name, changes in variants.items():
        key = CheckpointKey(run, "weights", name)
        store.save(key=key, state=saved, metadata={**record.metadata, **changes})
        bench.paths[name] = str(key)
    (written,) = (bench.home / "state").rglob("newer/*/manifest.json")
    content = sealed.unseal(written.read_bytes(), "newer")
    written.write_bytes(sealed.seal({**content, "format": manifest.FORMAT_VERSION + 1}, "newer"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home = tmp_path_factory.mktemp("bad_input")
    model = str(write_hf(home / "model", MODEL, base_values(MODEL)))
    other = str(write_hf(home / "other", MODEL, hf_tensors(MODEL, seed=1)))
    with jax_client.ServiceClient(config=settings(home)) as service:
        client = service.create_lora_training_client(model, rank=RANK, seed=7).result()
        bench = Bench(service=service, client=client, home=home, model=model, other_model=other)
        bench.neighbour = service.create_lora_training_client(model, rank=RANK, seed=8).result()
        bench.neighbour.forward_backward(DATA, "cross_entropy").result()
        bench.canary()
        save_variants(bench)
        bench.sampler = client.save_weights_and_get_sampling_client().result()
        client.forward_backward(DATA, "cross_entropy").result()
        names = ("weights", "mu", "nu", "grads", "step", "skipped_in_a_row")
        bench.start = {name: getattr(bench.adapter, name) for name in names}
        for gradients in (True, False):
            bench.reset(gradients=gradients)
            bench.expected[gradients] = bench.canary()
        yield bench


@pytest.fixture(params=[True], ids=["accumulated"])
def bench(shared: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The service at its known state; after the test nothing may have changed, and the canary must give its step."""
    gradients = request.param
    shared.reset(gradients=gradients)
    before = shared.everything()
    yield shared
    assert shared.everything() == before
    assert shared.canary() == shared.expected[gradients]


nothing_accumulated = pytest.mark.parametrize("bench", [False], indirect=True, ids=["empty"])
Row = tuple[int, Callable[[Bench], Any], type[BaseException], list[str]]


def check(error: BaseException, kind: type[BaseException], parts: list[str]) -> None:
    assert isinstance(error, kind)
    # A plain ValueError is asked of EngineConfig alone, which does not know the SDK.
    if isinstance(error, JaxClientError) and kind is not ValueError:
        assert isinstance(error, tinker.TinkerError), "an `except` clause written for the SDK catches it"
    for part in parts:
        assert part in str(error)
    assert len(str(error)) < 4000


def numbered(rows: list[Row]) -> Any:
    marks = [[pytest.mark.torch] if 38 <= row[0] <= 47 else [] for row in rows]
    cases = [pytest.param(*row[1:], id=f"row{row[0]}-{i}", marks=marks[i]) for i, row in enumerate(rows)]
    return pytest.mark.parametrize(("call", "kind", "parts"), cases)


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
    (8, lambda b: settings(b.home, mesh={"expert": 2}), ValueError, ["mesh['expert'] is 2", "data, fsdp and tensor"]),
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
    (49, lambda b: b.step(beta1=1.0), REFUSED, ["AdamParams.beta1 is 1.0", "[0, 1)"]),
    (49, lambda b: b.step(beta2=-0.1), REFUSED, ["AdamParams.beta2 is -0.1", "[0, 1)"]),
    (49, lambda b: b.step(eps=0.0), REFUSED, ["AdamParams.eps is 0.0", "(0, inf)"]),
    (49, lambda b: b.step(weight_decay=-1.0), REFUSED, ["AdamParams.weight_decay is -1.0", "[0, inf)"]),
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
    (61, lambda b: b.sample(temperature=-0.1), REFUSED, ["temperature is -0.1", "[0, inf)"]),
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


TOO_MANY = {"fsdp": jax.device_count() + 1}
LATER: list[Row] = [
    (2, lambda b: b.lora("qwen3-8b"), tinker.NotFoundError, ["Did you mean 'Qwen/Qwen3-8B'?", "Known models: "]),
    (2, lambda b: b.lora("qwen/qwen3-8b"), tinker.NotFoundError, ["Did you mean 'Qwen/Qwen3-8B'?"]),
    (
        8,
        lambda b: jax_client.ServiceClient(config=settings(b.home, mesh=TOO_MANY)).create_lora_training_client(b.model),
        REFUSED,
        [f"needs {TOO_MANY['fsdp']} devices, but {jax.device_count()} are there", "mesh='auto'"],
    ),
    (53, lambda b: b.client.save_state("taken"), FAILED, ["from step 1, saved 20", "pass overwrite=True"]),
    (53, lambda b: b.client.save_weights_for_sampler("sampler"), FAILED, ["exists already"]),
    (
        56,
        lambda b: b.service.create_training_client_from_state(b.paths["taken"], b.other_model),
        REFUSED,
        ["other'", "model'", "nothing was loaded"],
    ),
    (
        58,
        lambda b: b.service.create_training_client_from_state_with_optimizer(b.paths["weights-only"]),
        REFUSED,
        ["Adam's moments are missing", "create_training_client_from_state"],
    ),
    (64, lambda b: b.sampling("no-sampler_weights"), tinker.NotFoundError, ["no checkpoint", "it has sampler"]),
]


def total(logprobs: list[Any]) -> Any:
    return -sum(p.sum() for p in logprobs)


def raising(error: BaseException) -> Callable[..., Any]:
    def loss(data: Any, logprobs: Any) -> Any:
        raise error

    return loss


def answering(answer: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    return lambda data, logprobs: answer(logprobs)


CUSTOM: list[Row] = [
    (39, lambda b: b.custom(answering(lambda p: None)), TypeError, ["must return (loss, metrics); got NoneType"]),
    (39, lambda b: b.custom(answering(lambda p: 1.0)), TypeError, ["must return (loss, metrics); got float"]),
    (39, lambda b: b.custom(answering(lambda p: (total(p), {}, 1))), TypeError, ["got tuple of 3"]),
    (39, lambda b: b.custom(answering(lambda p: (total(p).detach().numpy(), {}))), TypeError, ["got ndarray"]),
    (40, lambda b: b.custom(answering(lambda p: (p[0], {}))), REFUSED, ["must be one real number", "shape (9,)"]),
    (40, lambda b: b.custom(answering(lambda p: (total(p).to("meta"), {}))), REFUSED, ["device meta"]),
    (40, lambda b: b.custom(answering(lambda p: (total(p) * 1j, {}))), REFUSED, ["complex"]),
    (41, lambda b: b.custom(answering(lambda p: (total(p).detach(), {}))), REFUSED, ["does not depend on logprobs"]),
    (42, lambda b: b.custom(answering(lambda p: (total(p[:1]), {}))), REFUSED, ["logprobs of datum 1 ", "Leave these"]),
    (43, lambda b: b.custom(answering(lambda p: (total(p) * NAN, {}))), FAILED, ["your loss is nan"]),
    (
        43,
        lambda b: b.custom(answering(lambda p: (total(p) + (p[1][4:6] * 0).sqrt().sum(), {}))),
        FAILED,
        ["gradient of your loss", "nan at datum 1, position 4"],
    ),
    (44, lambda b: b.custom(answering(lambda p: (total(p), [1.0]))), TypeError, ["dict as metrics; got list"]),
    (44, lambda b: b.custom(answering(lambda p: (total(p), {"a": p[0].detach()}))), TypeError, ["'a'", "shape (9,)"]),
    (46, lambda b: b.custom(lambda data, p: b.client.optim_step(ADAM)), RuntimeError, ["re-entrant call"]),
    (46, lambda b: b.custom(lambda data, p: b.client.save_state("new")), RuntimeError, ["re-entrant call"]),
]


@numbered(LATER + CUSTOM)
def test_a_bad_call_fails_its_future(
    bench: Bench, call: Callable[[Bench], Any], kind: type[BaseException], parts: list[str]
) -> None:
    future = call(bench)
    with pytest.raises(kind) as caught:
        future.result(30)
    check(caught.value, kind, parts)
    if isinstance(caught.value, FAILED):
        assert caught.value.category == "user"


@pytest.mark.torch
@pytest.mark.parametrize("error", [KeyError("mine"), ZeroDivisionError("mine"), KeyboardInterrupt("mine")])
def test_an_exception_of_the_loss_function_comes_back_as_it_is(bench: Bench, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        bench.custom(raising(error)).result(30)
    assert caught.value is error
    assert any(entry.name == "loss" for entry in caught.traceback), "the user's line is in the traceback"
    assert "inside your loss function; no gradients were accumulated" in error.__notes__


def test_a_loss_function_needs_torch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match=re.escape("pip install 'jax_client[torch]'")):
            bench.custom(answering(lambda p: (total(p), {})))


@pytest.mark.torch
@pytest.mark.parametrize("custom", [[], [{}], "cross_entropy"], ids=["empty", "no-datum", "no-function"])
def test_bad_arguments_beside_a_loss_function(bench: Bench, custom: Any) -> None:
    loss, data = (custom, None) if isinstance(custom, str) else (answering(lambda p: (total(p), {})), custom)
    with pytest.raises(tinker.BadRequestError, match=r"No data provided|data\[0\] is dict|loss_fn is str"):
        bench.custom(loss, data)


@pytest.mark.torch
def test_a_loss_function_gets_copies_and_may_report_any_number(shared: Bench) -> None:
    import torch

    def plain(data: Any, logprobs: Any) -> Any:
        return total(logprobs), {}

    def unruly(data: Any, logprobs: Any) -> Any:
        loss = total(logprobs)
        logprobs[0].detach().zero_()
        data[0].loss_fn_inputs["weights"].to_numpy()[:] = 9
        data[1].loss_fn_inputs.clear()
        logprobs.clear()
        assert shared.neighbour.forward_backward(DATA, "cross_entropy").result(30), "other clients go on"
        return loss, {"0-d": torch.tensor(2.0), "nan": NAN, "int": 3}

    given = [{key: value.to_numpy().copy() for key, value in d.loss_fn_inputs.items()} for d in DATA]
    outcomes = []
    for loss in (plain, unruly):
        shared.reset(gradients=False)
        output = shared.custom(loss).result(30)
        outcomes.append(([o["logprobs"].to_numpy().tobytes() for o in output.loss_fn_outputs], shared.weights()))
    assert outcomes[0] == outcomes[1]
    assert (output.metrics["0-d"], output.metrics["int"]) == (2.0, 3.0) and math.isnan(output.metrics["nan"])
    shared.client.optim_step(ADAM).result(30)
    assert run_metrics.shared.flush(30)
    (recorded,) = [run.newest for run in run_metrics.live() if run.run_id == shared.client.model_id]
    assert recorded["nonfinite/nan"] == 1.0 and "nan" not in recorded, "what is recorded is finite"
    for d, inputs in zip(DATA, given, strict=True):
        assert d.loss_fn_inputs.keys() == inputs.keys()
        assert all((d.loss_fn_inputs[key].to_numpy() == value).all() for key, value in inputs.items())


@nothing_accumulated
def test_a_step_without_gradients(bench: Bench) -> None:
    with pytest.raises(FAILED, match="no gradients since step 1") as caught:
        bench.client.optim_step(ADAM).result(30)
    assert caught.value.category == "user"


def test_zero_weights_add_nothing(shared: Bench, caplog: pytest.LogCaptureFixture) -> None:
    shared.reset(gradients=True)
    output = shared.train(batch(0.0)).result(30)
    assert output.metrics["loss:sum"] == output.metrics["tokens:sum"] == 0.0
    messages = [record.getMessage() for record in caplog.records if "weight" in record.getMessage()]
    assert messages == ["every weight of the 3 datums is zero: loss and gradient are zero"]
    assert shared.canary() == shared.expected[True]


@nothing_accumulated
def test_a_gradient_that_is_not_finite_is_skipped(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    before = bench.weights()
    for skipped in range(1, 11):
        training = bench.train(batch(3e38)).result(30)
        assert training.metrics["nonfinite/loss:sum"] == 1.0
        json.dumps(training.metrics, allow_nan=False)
        step = bench.client.optim_step(ADAM)
        if skipped < 10:
            metrics = step.result(30).metrics
            assert metrics == {"skipped_nonfinite:sum": 1.0, "learning_rate:mean": ADAM.learning_rate}
            assert bench.adapter.skipped_in_a_row == skipped
    with pytest.raises(FAILED, match=r"10 steps in a row .* weights are those of step 1") as caught:
        step.result(30)
    assert caught.value.category == "user"
    assert sum("step 2 was skipped" in record.getMessage() for record in caplog.records) == 10
    bench.adapter.skipped_in_a_row = 0
    assert bench.weights() == before


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nA long dump")


def test_a_client_or_a_call_that_does_not_fit_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is allocated, with what is needed, what is free, and what to change."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda *_: 10_000)
        for call, levers in (
            (lambda: bench.lora(bench.model, rank=64), ["rank 64", "Lower the rank", "dtype='bfloat16'", "mesh"]),
            (
                lambda: bench.train(DATA),
                ["micro-batch of 1 x 256 tokens", "max_tokens_per_micro_batch", "remat='full'"],
            ),
        ):
            with pytest.raises(FAILED, match=r"needs .*MiB.*, but 0\.0 MiB are free") as caught:
                call().result(30)
            assert caught.value.category == "user" and all(lever in str(caught.value) for lever in levers)


@pytest.mark.parametrize("program", ["forward", "backward", "optim_step"])
def test_out_of_memory_in_a_step(bench: Bench, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine.trainer.programs, program, out_of_memory)
        call = bench.step if program == "optim_step" else lambda: bench.train(DATA)
        with pytest.raises(FAILED, match=r"ran out of memory.*state is intact") as caught:
            call().result(30)
    assert caught.value.category == "server"
    assert "Out of memory allocating 123 bytes. " in str(caught.value) and "dump" not in str(caught.value)
    if program != "optim_step":
        assert "in a micro-batch of 1 x 256 tokens" in str(caught.value)
        assert "cannot hold a sequence of 21 tokens: send shorter ones, or set remat='full'" in str(caught.value)


def test_out_of_memory_names_a_batch_that_is_smaller(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [datum([1] * 100, (1,) * 100)] * 8
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine.trainer, "limits", packing.Limits(ways=1, tokens=2048))
        patch.setattr(bench.engine.trainer.programs, "forward", out_of_memory)
        with pytest.raises(FAILED, match="in a micro-batch of 1 x 512 tokens") as caught:
            bench.train(long).result(30)
        patch.setattr(bench.engine.sampler._programs, "prefill", out_of_memory)
        with pytest.raises(FAILED, match="fewer samples") as sampling:
            bench.sample().result(30)
    assert caught.value.category == sampling.value.category == "server"
    assert "state is intact" in str(sampling.value)
    found = re.search(r"max_tokens_per_micro_batch to (\d+),", str(caught.value))
    assert found is not None and int(found[1]) == 256
    plans = packing.plan_call([100] * 8, packing.Limits(ways=1, tokens=256))
    assert {(plan.rows, plan.length) for plan in plans} == {(1, 256)}
