"""Is a resumed run the run that was never stopped? After a kill, with every optimizer setting, on other meshes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.engine.core.adapters import Adapter
from jax_client.engine.core.requests import AdamSettings
from jax_client.engine.engine import Engine
from jax_client.values import CheckpointKey
from support.children import STRICT
from support.golden_cases import ADAM, CASES, base_values
from support.golden_engine import CROSS_ENTROPY, SPEC, data, open_engine
from support.meshes.devices import with_devices
from support.weight_files import write_hf

CHILD = """
import hashlib, os, signal, sys
sys.modules["torch"] = None  # the SDK would import it, for seconds
import jax_client
from jax_client import types
from support.golden_cases import CASES, sequences

model, state_dir, first, last, path, killed = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
config = jax_client.EngineConfig(
    dtype="float32", state_dir=state_dir, compilation_cache_dir="", precompile=False, autosave_minutes=None
)
with jax_client.ServiceClient(config=config) as service:
    if path:
        client = service.create_training_client_from_state_with_optimizer(path).result()
    else:
        client = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(s["tokens"].tolist()),
            loss_fn_inputs={"target_tokens": s["targets"].tolist(), "weights": s["weights"].tolist()},
        )
        for s in sequences(CASES["llama_tied"])
    ]

    def train(step):
        batch = [data[step % 3], data[(step + 1) % 3]]
        loss = client.forward_backward(batch, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2, weight_decay=0.1)).result()
        return loss.result().metrics["loss:sum"]

    losses = [train(step).hex() for step in range(first, last)]
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    digest = hashlib.sha256(b"".join(o["logprobs"].to_numpy().tobytes() for o in outputs)).hexdigest()
    print(digest, client.save_state(f"at-{last}").result().path, *losses, flush=True)
    if killed:  # with steps that nobody saved
        train(last)
        client.forward_backward(data, "cross_entropy")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(*args: object, killed: bool = False) -> tuple[str, str, list[str]]:
    """Run steps in a process of its own; return the hash of the final logprobs, the saved path, and the losses."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [*STRICT, "-c", CHILD, *map(str, args), "killed" if killed else ""]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr[-3000:]
    digest, path, *losses = done.stdout.splitlines()[-1].split()
    return digest, path, losses


def test_resume_is_bit_exact_after_a_kill(tmp_path: Path) -> None:
    config = CASES["llama_tied"]
    model = write_hf(tmp_path / "model", config, base_values(config))
    straight, _, losses = run(model, tmp_path / "straight", 0, 20, "")
    half, path, first = run(model, tmp_path / "state", 0, 10, "", killed=True)
    resumed, _, second = run(model, tmp_path / "state", 10, 20, path)
    assert resumed == straight != half
    assert first + second == losses


# Each setting away from its default, then all of them, and what an optimizer without memory would do.
SETTINGS: dict[str, dict[str, float]] = {
    "default": {},
    "learning rate": {"learning_rate": 0.05},
    "betas": {"beta1": 0.8, "beta2": 0.999},
    "no memory": {"beta1": 0.0, "beta2": 0.0},
    "eps": {"eps": 1e-3},
    "no decay": {"weight_decay": 0.0},
    "no clipping": {"grad_clip_norm": 0.0},
    "hard clipping": {"grad_clip_norm": 1e-3},
    "all": {"learning_rate": 0.02, "beta1": 0.7, "beta2": 0.9, "eps": 1e-4, "weight_decay": 0.3, "grad_clip_norm": 0.5},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened = open_engine(tmp_path_factory.mktemp("model") / "m", CASES["llama_tied"])
    yield opened
    opened.close()


def take_steps(engine: Engine, adapter: Adapter, settings: AdamSettings, count: int) -> None:
    lane = engine.open_lane()
    for _ in range(count):
        engine.train_batch(lane, adapter, data(CASES["llama_tied"]), CROSS_ENTROPY)
        engine.optim_step(lane, adapter, settings).result()


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_optimizer_setting_resumes_exactly(engine: Engine, changes: dict[str, float], tmp_path: Path) -> None:
    settings = AdamSettings(**ADAM | {"learning_rate": 1e-2} | changes)
    lane, store = engine.open_lane(), CheckpointStore(tmp_path)
    adapter = engine.open_adapter(lane, SPEC).result()
    take_steps(engine, adapter, settings, 3)
    # Gradients that were not stepped with are not part of a checkpoint: the loop computes that batch again.
    engine.train_batch(lane, adapter, data(CASES["llama_tied"]), CROSS_ENTROPY).result()
    state = engine.snapshot(lane, adapter, optimizer=True).result().fetch()
    store.save(key=CheckpointKey("run", "weights", "a"), state=state, metadata={})
    engine.optim_step(lane, adapter, settings).result()
    take_steps(engine, adapter, settings, 2)

    resumed = engine.open_adapter(lane, store.load(CheckpointKey("run", "weights", "a"))[0]).result()
    assert resumed.grads is None and resumed.step == 3
    take_steps(engine, resumed, settings, 3)
    ours, theirs = (engine.snapshot(lane, a, optimizer=True).result().fetch() for a in (resumed, adapter))
    assert ours.step == theirs.step == 6
    for group in ("weights", "mu", "nu"):
        for name, array in getattr(theirs, group).items():
            assert getattr(ours, group)[name].tobytes() == array.tobytes(), (group, name)
    for each in (adapter, resumed):
        engine.release(each)


ON_A_MESH = """
import json, sys
from pathlib import Path
import numpy as np
from support.golden_cases import ADAM, CASES
from support.golden_engine import CROSS_ENTROPY, SPEC, data, open_engine
from jax_client.checkpoint.store import CheckpointStore
from jax_client.engine.core.requests import AdamSettings
from jax_client.values import CheckpointKey

mesh, model, state, load, save = json.loads(sys.argv[1]), *sys.argv[2:]
config, store = CASES["qwen2_untied"], CheckpointStore(Path(state))
engine = open_engine(Path(model), config, mesh=mesh)
lane = engine.open_lane()
score = lambda: engine.score_batch(lane, adapter, data(config), CROSS_ENTROPY).result()
logprobs = lambda: np.concatenate(score().logprobs).tolist()
if load:
    adapter = engine.open_adapter(lane, store.load(CheckpointKey("run", "weights", load))[0]).result()
else:
    adapter = engine.open_adapter(lane, SPEC).result()
loaded = logprobs()
for _ in range(3):
    engine.train_batch(lane, adapter, data(config), CROSS_ENTROPY)
    engine.optim_step(lane, adapter, AdamSettings(**(ADAM | {"learning_rate": 1e-2}))).result()
state = engine.snapshot(lane, adapter, optimizer=True).result().fetch()
store.save(key=CheckpointKey("run", "weights", save), state=state, metadata={})
print(json.dumps([loaded, logprobs()]))
engine.close()
"""


def on_a_mesh(mesh: dict[str, int], *args: object) -> tuple[np.ndarray, np.ndarray]:
    """Load, train and save in a process of its own; return the logprobs as loaded and as saved."""
    count = int(np.prod(list(mesh.values())))
    env = with_devices(count)
    command = [*STRICT, "-c", ON_A_MESH, json.dumps(mesh), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, saved = json.loads(done.stdout.splitlines()[-1])
    return np.array(loaded), np.array(saved)


WIDE, ONE, BOTH = {"fsdp": 8}, {"data": 1}, {"tensor": 2, "fsdp": 4}


@pytest.mark.parametrize("meshes", [(WIDE, BOTH), pytest.param((WIDE, ONE, BOTH), marks=pytest.mark.full)], ids=len)
def test_a_run_goes_on_on_another_mesh(meshes: tuple[dict[str, int], ...], tmp_path: Path) -> None:
    runs = [
        on_a_mesh(mesh, tmp_path / f"model-{i}", tmp_path / "state", f"of-{i - 1}" if i else "", f"of-{i}")
        for i, mesh in enumerate(meshes)
    ]
    for (_, saved), (loaded, _) in itertools.pairwise(runs):
        np.testing.assert_allclose(loaded, saved, atol=1e-5)
    fresh, trained = runs[0]
    assert np.abs(trained - fresh).max() > 1e-2, "there was something to lose"
