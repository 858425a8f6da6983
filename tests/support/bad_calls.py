"""What do the tests of bad calls run on, and what may such a call not change?

`Bench` is one service with one run at a known state. After a bad call the adapter, the accumulated gradient, the step,
the checkpoints, the memory and the compiled programs must be what they were, and a valid step must give the
bit-identical result of a run without the bad call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
from jax_client.engine.engine import STEP_RATES, STEP_SUMS
from jax_client.errors import JaxClientError
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
        memory = {
            key: value for key, value in self.engine.monitor.describe()["memory_bytes"].items() if key != "available"
        }
        compiled, keys = len(self.engine.monitor.describe()["compiled"]), set(self.service._session.loss_keys)
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
    # As an earlier version saved them.
    broken = {name: array.copy() for name, array in saved.weights.items()}
    broken["q.A"].flat[3] = NAN
    broken_states = {
        "nan": replace(saved, weights=broken),
        "nan-sampler": replace(saved, weights=broken, mu=None, nu=None),
    }
    for name, kind in (("nan", "weights"), ("nan-sampler", "sampler_weights")):
        key = CheckpointKey(run, kind, name)
        store.save(key=key, state=broken_states[name], metadata=record.metadata)
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
