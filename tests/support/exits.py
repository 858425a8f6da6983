"""How does a program end that uses the package: with which exit code, output, saved steps and threads?

Each mode is a program, what it must print, its exit code, and the steps that must be on disk afterwards. The tests run
a few modes; `scripts/probes/exit_matrix.py` runs all of them, many times, on several versions of Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from jax_client.checkpoint.store import CheckpointStore
from support.weight_files import HF_CONFIG, hf_tensors, write_hf

# Every program begins so. The first callback that is registered runs last: it tells which threads are left.
PRELUDE = """
import atexit, sys, threading, time
def left():
    names = [thread.name for thread in threading.enumerate() if "jax_client" in thread.name]
    if names:
        print("threads left:", names, file=sys.stderr)
atexit.register(left)
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
sys.modules["torch"] = None  # the SDK imports it where it is there, which takes seconds
import jax_client
from jax_client import types as T
MODEL, STATE, CACHE, CLOCK = sys.argv[1:5]
settings = dict(dtype="float32", state_dir=STATE, compilation_cache_dir=CACHE, precompile=False)
service = jax_client.ServiceClient(config=jax_client.EngineConfig(**settings))
DATA = [T.Datum(
    model_input=T.ModelInput.from_ints([1, 2, 3, 4]),
    loss_fn_inputs={"target_tokens": [2, 3, 4, 5], "weights": [1.0, 1.0, 1.0, 1.0]},
)]
PROMPT = T.ModelInput.from_ints([1, 2, 3])
SHORT, LONG = (T.SamplingParams(max_tokens=n, stop=[]) for n in (4, 100))
def trainer(service=service):
    return service.create_lora_training_client(base_model=MODEL, rank=4).result()
def step(client):
    client.forward_backward(DATA, "cross_entropy")
    client.optim_step(T.AdamParams(learning_rate=1e-3)).result()
def sampler(service=service):
    return service.create_sampling_client(base_model=MODEL).result()
def many(client):
    return [client.sample(PROMPT, 8, LONG) for _ in range(64)]
def until(condition):
    while not condition():
        time.sleep(0.01)
def sampling():
    until(lambda: service.describe()["sampling"]["sampled_tokens"] > 200)
def ends_now():
    with open(CLOCK, "w") as file:
        file.write(str(time.time()))
def signal_later(number, ready):
    def send():
        ready()
        ends_now()
        os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()
"""
SAVED = r"jax_client saved step %d of run [-0-9a-f]+:train:\d+, which nobody had saved\. To go on from it:\n  .*\n"
TRACEBACK = r"Traceback \(most recent call last\):\n(  .*\n)+"
INTERRUPT = TRACEBACK + r"KeyboardInterrupt\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One way to end.

    Attributes:
        program: what follows the prelude; it calls `ends_now()` where a plain program would end.
        code: the exit code, negative for the signal that killed it.
        out, err: all that the program prints, as regular expressions.
        saved: the checkpoints on disk afterwards: how many of each name and step; None for any.
        how: the program is a "file" of its own, an argument of "-c", or the file of a "pytest" run.
    """

    program: str
    code: int = 0
    out: str = ""
    err: str = ""
    saved: dict[tuple[str, int], int] | None = field(default_factory=dict)
    how: str = "-c"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended; `seconds` passed from the end of its own code to the end of its process."""

    code: int
    out: str
    err: str
    seconds: float | None


AUTOSAVE_2 = {("autosave-0", 2): 1}
MODES = {
    "normal end, unsaved steps": Mode(
        program="client = trainer(); step(client); step(client); ends_now()", err=SAVED % 2, saved=AUTOSAVE_2
    ),
    "forgotten sampling client": Mode(
        program="def main():\n    sampler().sample(PROMPT, 1, SHORT).result()\nmain(); ends_now()"
    ),
    "samples running": Mode(program="client = sampler(); futures = many(client); sampling(); ends_now()"),
    "sys.exit": Mode(
        program="client = trainer(); step(client); step(client); ends_now(); sys.exit(3)",
        code=3, err=SAVED % 2, saved=AUTOSAVE_2,
    ),
    "exception": Mode(
        program="client = trainer(); step(client); step(client); ends_now(); raise ValueError('the own one')",
        code=1, err=TRACEBACK + "ValueError: the own one\n" + SAVED % 2, saved=AUTOSAVE_2,
    ),
    "Ctrl-C while sampling": Mode(
        program="""
client = sampler(); signal_later(signal.SIGINT, sampling)
while True: [future.result() for future in many(client)]
""",
        code=-2, err=INTERRUPT,
    ),
    "Ctrl-C while training": Mode(
        program="""
client = trainer(); step(client); step(client)
counts = {"steps": 2}
signal_later(signal.SIGINT, lambda: until(lambda: counts["steps"] > 20))
while True:
    step(client); counts["steps"] += 1
""",
        code=-2, err=INTERRUPT + SAVED.replace("%d", r"\d+"), saved=None,
    ),
    "SIGTERM, requests running": Mode(
        program="""
client = trainer(); step(client); step(client)
futures = many(sampler()); sampling(); ends_now()
os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
""",
        code=-15, err=SAVED % 2, saved=AUTOSAVE_2,
    ),
    "a thread outlives main": Mode(
        program="""
client = trainer(); step(client)
def go_on():
    threading.main_thread().join()
    until(lambda: not threading.main_thread().is_alive())
    step(client); step(client)
    client.save_weights_and_get_sampling_client().sample(PROMPT, 2, SHORT).result()
    client.save_state("late").result()
    path = client.save_weights_for_sampler("late").result().path
    service.create_sampling_client(path).result().sample(PROMPT, 2, SHORT).result()
    step(client)
    print("trained", flush=True); ends_now()
threading.Thread(target=go_on).start()
""",
        out="trained\n", err=SAVED % 4,
        saved={("late", 3): 2, ("autosave-0", 4): 1},
    ),
    "a pool outlives main": Mode(
        program="""
from concurrent.futures import ThreadPoolExecutor
client = trainer()
def go_on():
    time.sleep(0.5)
    step(client); step(client); ends_now()
pool = ThreadPoolExecutor(1)
pool.submit(go_on)
""",
        err=SAVED % 2, saved=AUTOSAVE_2,
    ),
    "cancelled asyncio tasks": Mode(
        program="""
import asyncio
client = sampler()
async def main():
    tasks = [asyncio.create_task(client.sample_async(PROMPT, 8, LONG)) for _ in range(64)]
    await asyncio.to_thread(sampling)
    for task in tasks: task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
asyncio.run(main()); ends_now()
""",
    ),
    "background compile": Mode(
        program="""
own = {"precompile": True, "compilation_cache_dir": ""}
service = jax_client.ServiceClient(config=jax_client.EngineConfig(**settings | own))
client = trainer(service)
until(lambda: client._run._engine.monitor.health()["compiling"])
ends_now()
""",
    ),
    "compile of a request": Mode(
        program="""
service = jax_client.ServiceClient(config=jax_client.EngineConfig(**settings | {"compilation_cache_dir": ""}))
client = trainer(service)
future = client.forward_backward(DATA, "cross_entropy")
until(lambda: client._run._engine.monitor.health()["compiling"])
ends_now(); sys.exit(4)
""",
        code=4,
    ),
    "two services": Mode(
        program="""
second = jax_client.ServiceClient(config=jax_client.EngineConfig(**settings | {"dtype": "bfloat16"}))
clients = [trainer(service), trainer(second)]
for client in clients: step(client); step(client)
ends_now()
""",
        err=f"({SAVED % 2}){{2}}", saved={("autosave-0", 2): 2},
    ),
    "fork": Mode(
        program="""
import warnings; warnings.simplefilter("ignore")
client = trainer(); step(client)
child = os.fork()
if child == 0:
    try:
        step(client)
    except Exception as error:
        print("of which this one is a fork" in str(error), flush=True)
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
step(client); ends_now()
""",
        out="True\n5\n", err=SAVED % 2, saved=AUTOSAVE_2,
    ),
    "multiprocessing fork": Mode(
        program="""
import multiprocessing, warnings; warnings.simplefilter("ignore")
client = trainer(); step(client)
context = multiprocessing.get_context("fork")
children = [context.Process(target=time.sleep, args=(0.05,)), context.Process(target=sys.exit, args=(6,))]
for child in children: child.start()
for child in children: child.join()
print([child.exitcode for child in children], flush=True)
step(client); ends_now()
""",
        out=r"\[0, 6\]\n", err=SAVED % 2, saved=AUTOSAVE_2,
    ),
    "20 clients made and dropped": Mode(
        program="""
import ctypes, gc, statistics
from jax_client import process
ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX: C's allocator keeps what each thread has freed in a heap of its own
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def one():
    step(trainer())
    sampler().sample(PROMPT, 1, SHORT).result()
seen = []
for _ in range(20):
    service = jax_client.ServiceClient(config=jax_client.EngineConfig(**settings | {"autosave_minutes": None}))
    trainer.__defaults__ = sampler.__defaults__ = (service,)
    one(); service.close("success").result(); gc.collect()
    seen.append((len(process.report()["threads"]), resident()))
threads, sizes = zip(*seen)
grown = statistics.median(sizes[15:]) - statistics.median(sizes[5:10])
print("threads", threads[19] - threads[4], "grown", grown > 15, file=sys.stdout)
ends_now()
""",
        out="threads (-?[0-9]+) grown False\n", saved={},
    ),
    "daemon thread samples": Mode(
        program="""
client = sampler()
def loop():
    while True:
        client.sample(PROMPT, 1, SHORT).result()
for _ in range(4): threading.Thread(target=loop, daemon=True).start()
sampling(); ends_now()
""",
    ),
    "save that nobody waited for": Mode(
        program="client = trainer(); step(client); future = client.save_state('last'); ends_now()",
        saved={("last", 1): 1},
    ),
    "main ends during a save": Mode(
        program="""
import random
client = trainer(); client.save_state("first").result(); step(client)
future = client.save_state("last"); time.sleep(random.uniform(0, 0.3)); ends_now()
""",
        saved={("first", 0): 1, ("last", 1): 1},
    ),
    "load that nobody waited for": Mode(
        program="client = service.create_sampling_client(base_model=MODEL); time.sleep(0.3); ends_now()"
    ),
    "closing that nobody waited for": Mode(
        program="client = trainer(); step(client); step(client); service.close('success'); ends_now()",
        err=SAVED % 2, saved=AUTOSAVE_2,
    ),
    "samplers shared with other processes": Mode(
        program="""
client = sampler(); client.sample(PROMPT, 1, SHORT).result()
import base64, json
socket = json.loads(base64.urlsafe_b64decode(client.get_sampler_handle()))["socket"]
def gone(): print(os.path.exists(os.path.dirname(socket)), flush=True)
atexit.unregister(left); atexit.register(gone); atexit.register(left)
from jax_client import process; process.run_exit_steps_before_others()
ends_now()
""",
        out="False\n",
    ),
    "script file": Mode(
        program="client = trainer(); step(client); step(client); ends_now()",
        err=SAVED % 2, saved=AUTOSAVE_2, how="file",
    ),
    "pytest": Mode(
        program="def test_training():\n    client = trainer(); step(client); step(client); ends_now()\n",
        out=r"(.|\n)*1 passed(.|\n)*", err=SAVED % 2, saved=AUTOSAVE_2, how="pytest",
    ),
}  # fmt: skip
# Those that the default tests run; `--full` runs all.
FEW = ("forgotten sampling client", "exception", "a thread outlives main", "compile of a request", "fork")


def write_model(folder: Path) -> Path:
    """Write the tiny model of all modes."""
    return write_hf(folder, HF_CONFIG, hf_tensors(HF_CONFIG))


def run(name: str, folder: Path, model: Path, cache: Path, python: str = sys.executable) -> Outcome:
    """Run a mode's program with an empty state directory `folder`/state."""
    mode = MODES[name]
    folder.mkdir(parents=True)
    clock, state = folder / "clock", folder / "state"
    arguments = [str(model), str(state), str(cache), str(clock)]
    text = PRELUDE + mode.program
    if mode.how == "-c":
        command = [python, "-c", text, *arguments]
    else:
        file = folder / ("test_it.py" if mode.how == "pytest" else "program.py")
        file.write_text(text.replace("sys.argv[1:5]", repr(arguments)))
        command = [python, *(["-m", "pytest", "-q", "-p", "no:cacheprovider"] if mode.how == "pytest" else []), file]
    # Plugins that load at the end of a session compile beside the save, which CPython 3.11 does not always survive.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "JAX_COMPILATION"))}
    done = subprocess.run(
        command,
        env=env | {"JAX_PLATFORMS": "cpu", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
    )
    ended = time.time()
    seconds = ended - float(clock.read_text()) if clock.exists() else None
    # What it waits for is told or not by how fast the machine is.
    err = re.sub(r"^jax_client: (down)?(load|compil)(ed|ing) .*\n", "", done.stderr, flags=re.MULTILINE)
    return Outcome(code=done.returncode, out=done.stdout, err=err, seconds=seconds)


def faults(name: str, folder: Path, outcome: Outcome) -> list[str]:
    """Return what of a mode's outcome is wrong."""
    mode, found = MODES[name], []
    if outcome.code != mode.code:
        found.append(f"exit code {outcome.code} instead of {mode.code}")
    for name, text, pattern in (("out", outcome.out, mode.out), ("err", outcome.err, mode.err)):
        if not re.fullmatch(pattern, text):
            found.append(f"std{name}: {text[-1500:]!r}")
    if outcome.seconds is None:
        found.append("the program did not come to its end")
    if mode.saved is not None:
        saved = Counter((record.name, record.step) for record in CheckpointStore(folder / "state").list())
        if saved != mode.saved:
            found.append(f"saved: {dict(saved)}")
    return found
