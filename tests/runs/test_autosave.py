"""Is a run that nobody saved there afterwards: after minutes, a signal, an exit, an exception, a forgotten client?"""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import jax_client
from jax_client.checkpoint import reading
from jax_client.checkpoint import store as store_module
from jax_client.checkpoint.store import CheckpointStore
from jax_client.runs.lifecycle import autosave, run_checkpointer
from jax_client.values import CheckpointKey
from support import fake_engine
from support.children import STRICT
from support.fake_engine import MODEL, step

loaded, models = fake_engine.loaded, fake_engine.models

RESUME = r'service_client\.create_training_client_from_state_with_optimizer\("(tinker://[^"]+)"\)'


def config(tmp_path: Path, minutes: float | None = 60.0) -> jax_client.EngineConfig:
    return jax_client.EngineConfig(state_dir=tmp_path, autosave_minutes=minutes)


def saved_steps(tmp_path: Path) -> dict[str, int]:
    return {record.name: record.step for record in CheckpointStore(tmp_path).list()}


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_slots_take_turns_and_only_new_steps_are_saved(models: Any, autosaving: None, tmp_path: Path) -> None:
    with jax_client.ServiceClient(config=config(tmp_path, 0.02 / 60), _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        time.sleep(0.2)
        assert saved_steps(tmp_path) == {}, "a run without a step has nothing to lose"
        for number in range(1, 4):
            step(client)
            wait_for(lambda number=number: number in saved_steps(tmp_path).values())
        assert saved_steps(tmp_path) == {"autosave-0": 3, "autosave-1": 2}
        client.save_state("mine").result()
        time.sleep(0.1)
        assert saved_steps(tmp_path) == {"autosave-0": 3, "autosave-1": 2, "mine": 3}


def test_closing_saves_and_says_how_to_go_on(
    models: Any, autosaving: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with jax_client.ServiceClient(config=config(tmp_path), _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        step(client)
        step(client)
        saved = service.create_lora_training_client(MODEL).result()
        step(saved)
        saved.save_state("by-hand").result()
    assert saved_steps(tmp_path) == {"autosave-0": 2, "by-hand": 1}
    (path,) = re.findall(RESUME, capsys.readouterr().err)
    with jax_client.ServiceClient(config=config(tmp_path), _models=models) as service:
        resumed = service.create_training_client_from_state_with_optimizer(path).result()
        assert resumed._run._adapter.step == 2
    assert capsys.readouterr().err == "", "nothing new was trained"


def test_steps_after_a_load_are_saved_although_their_number_was_saved_before(
    models: Any, autosaving: None, tmp_path: Path
) -> None:
    with jax_client.ServiceClient(config=config(tmp_path), _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        start = client.save_state("start").result().path
        step(client)
        client.save_state("one").result()
        client.load_state_with_optimizer(start).result()
        step(client)
    assert saved_steps(tmp_path) == {"start": 0, "one": 1, "autosave-0": 1}
    with jax_client.ServiceClient(config=config(tmp_path), _models=models) as service:
        service.create_lora_training_client(MODEL).result().load_state(start).result()
    assert len(saved_steps(tmp_path)) == 3, "what was only loaded is saved already"


def test_the_thread_survives_what_it_cannot_list(
    models: Any, autosaving: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    children = reading.children

    def forbidden(directory: Path) -> list[Path]:
        if "another" in directory.parts:
            raise PermissionError(13, "Permission denied", str(directory))
        return children(directory)

    monkeypatch.setattr(reading, "children", forbidden)
    (tmp_path / "runs" / "another").mkdir(parents=True)
    monkeypatch.setattr(store_module, "_ends_now", lambda *_: 1 / 0)
    with jax_client.ServiceClient(config=config(tmp_path, 0.02 / 60), _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        step(client)
        client.save_state("mine", ttl_seconds=3600).result()
        for number in range(2, 4):
            step(client)
            wait_for(lambda number=number: number in saved_steps(tmp_path).values())
    assert "the checkpoints of run another could not be listed" in caplog.text
    assert "expired checkpoints could not be looked for" in caplog.text


def test_a_forgotten_client_is_saved(models: Any, autosaving: None, tmp_path: Path) -> None:
    service = jax_client.ServiceClient(config=config(tmp_path), _models=models)
    client = service.create_lora_training_client(MODEL).result()
    run_id = client.model_id
    step(client)
    del client
    gc.collect()
    wait_for(lambda: saved_steps(tmp_path) == {"autosave-0": 1})
    wait_for(lambda: CheckpointStore(tmp_path).lock_holder(run_id) is None)
    service.close("success").result()


def test_a_busy_device_delays_no_save(models: Any, autosaving: None, tmp_path: Path) -> None:
    with jax_client.ServiceClient(config=config(tmp_path, 0.02 / 60), _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        models.opened[0].gate.clear()
        client.forward_backward(fake_engine.DATA, "cross_entropy")
        with client._run._adapter.lock:
            client._run._adapter.step += 1
        wait_for(lambda: saved_steps(tmp_path) == {"autosave-0": 1})
        models.opened[0].gate.set()


def test_never_means_never(models: Any, autosaving: None, tmp_path: Path) -> None:
    with jax_client.ServiceClient(config=config(tmp_path, None), _models=models) as service:
        step(service.create_lora_training_client(MODEL).result())
    assert saved_steps(tmp_path) == {}


def test_a_full_disk_stops_nobody(
    models: Any, autosaving: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise jax_client.errors.RequestFailedError("No space left on device")

    with jax_client.ServiceClient(config=config(tmp_path, 0.02 / 60), _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        with monkeypatch.context() as patch:
            patch.setattr(run_checkpointer.RunCheckpointer, "write", full)
            step(client)
            wait_for(lambda: "could not be saved by itself: No space left" in caplog.text)
        wait_for(lambda: saved_steps(tmp_path) == {"autosave-0": 1})


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), True, "10"])
def test_a_wrong_interval_is_refused(minutes: Any) -> None:
    with pytest.raises(ValueError, match=r"EngineConfig\.autosave_minutes is"):
        jax_client.EngineConfig(autosave_minutes=minutes)


def test_handlers_are_the_main_threads(autosaving: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    other = threading.Thread(target=autosave.handle_sigterm)
    other.start()
    other.join()
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        autosave.handle_sigterm()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


CHILD = """
import os, signal, sys, threading, time
sys.modules["torch"] = None  # the SDK would import it, for seconds
import jax_client
from jax_client import types
from support.golden_cases import CASES, sequences

model, state_dir, how = sys.argv[1:]
models = None
if how not in ("exit", "term", "fork"):  # the engine makes no difference there, but its start does
    from support.fake_engine import FakeModels
    models = FakeModels()

def earlier(number, frame):
    print("earlier handler", flush=True)
    sys.exit(7)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
if how == "chained":
    signal.signal(signal.SIGTERM, earlier)
config = jax_client.EngineConfig(dtype="float32", state_dir=state_dir, compilation_cache_dir="", precompile=False)

def train():
    service = jax_client.ServiceClient(config=config, _models=models)
    client = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    first = sequences(CASES["llama_tied"])[0]
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(first["tokens"].tolist()),
            loss_fn_inputs={"target_tokens": first["targets"].tolist(), "weights": first["weights"].tolist()},
        )
    ]
    for _ in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return service, client

def inherited(client):
    try:
        client.optim_step(types.AdamParams()).result(30)
    except Exception as error:
        sys.exit(0 if "of which this one is a fork" in str(error) else 3)

if how == "exit":
    train()  # everything is forgotten before the interpreter ends
elif how == "fork":
    import multiprocessing, warnings
    warnings.simplefilter("ignore")  # jax and Python warn of forks
    service, client = train()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=inherited, args=(client,)), context.Process(target=time.sleep, args=(0.1,))]
    begun = context.Event()
    children.append(context.Process(target=lambda: begun.set() or time.sleep(600)))
    for child in children:
        child.start()
    assert begun.wait(20)  # Python forgets a signal that comes before a fork has begun
    children[2].terminate()
    for child in children:
        child.join(20)
    print([child.exitcode for child in children], flush=True)
elif how == "raise":
    service, client = train()
    raise ValueError("the user's own")
else:
    service, client = train()
    print("trained", flush=True)
    try:
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.golden_cases import CASES, base_values
    from support.weight_files import write_hf

    path = tmp_path_factory.mktemp("model")
    return write_hf(path / "model", CASES["llama_tied"], base_values(CASES["llama_tied"]))


# The signal, the exit code (that of an interrupt differs between versions of Python), and what the child prints.
ENDS: dict[str, tuple[int | None, int | None, str]] = {
    "exit": (None, 0, ""),
    "fork": (None, 0, "[0, 0, -15]\n"),
    "raise": (None, 1, ""),
    "term": (signal.SIGTERM, -signal.SIGTERM, "trained\n"),
    "chained": (signal.SIGTERM, 7, "trained\nearlier handler\n"),
    "interrupt": (signal.SIGINT, None, "trained\ninterrupted\n"),
}


def test_however_a_process_ends_its_steps_are_saved(model: Path, tmp_path: Path) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    children = {
        how: subprocess.Popen(
            [*STRICT, "-c", textwrap.dedent(CHILD), str(model), str(tmp_path / how), how],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for how in ENDS
    }  # fmt: skip
    for how, child in children.items():
        number, code, output = ENDS[how]
        if number is not None:
            assert child.stdout is not None and child.stdout.readline() == "trained\n"
            child.send_signal(number)
            output = output.removeprefix("trained\n")
        out, err = child.communicate(timeout=300)
        assert child.returncode == code if code is not None else child.returncode, (how, err[-2000:])
        assert out == output, (how, err[-2000:])
        assert saved_steps(tmp_path / how) == {"autosave-0": 3}, (how, err[-2000:])
        (path,) = re.findall(RESUME, err)
        store = CheckpointStore(tmp_path / how)
        (record,) = store.list()
        assert path == f"tinker://{record.run_id}/weights/autosave-0"
        store.load(CheckpointKey(record.run_id, "weights", "autosave-0"))
