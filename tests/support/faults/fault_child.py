"""What do the processes that test_faults.py kills and disturbs do? One imports everything and forks the others.

It runs with fault_library preloaded. Each line of its input is a JSON list of jobs, which run at the same time, each in
a process of its own; the answer is their exit statuses, once all have ended. What a job has to say goes to its log,
between the calls that the library writes there: a line once written survives a kill.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import time
import traceback
from collections.abc import Callable
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

from jax_client.checkpoint.disk import files
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError, RequestFailedError
from support.checkpoints import assert_same, key, make_state, save
from support.faults.fault_history import read_all, take


class Calls(IntFlag):
    """Kinds of calls that the library counts."""

    WRITES = 1
    SYNCS = 2
    CREATES = 4
    RENAMES = 8
    TRUNCATES = 16
    REMOVES = 32
    ALL = 63
    # Apart from these, which are looked at only where they are named.
    LOCKS = 64


class Action(IntEnum):
    """What happens at the N-th call."""

    NOTHING = 0
    KILL_BEFORE = 1
    KILL_TORN = 2
    KILL_AFTER = 3
    REFUSE = 4
    SHORTEN = 5


class Child:
    """What a job's process has: its arguments, its log, and the library."""

    def __init__(self, library: ctypes.CDLL, job: dict[str, Any]) -> None:
        self.state_dir = Path(job["state_dir"])
        self.job = job
        self._library = library
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._log = os.open(job["log"], flags, 0o600)
        # Orbax logs each failure at length.
        os.dup2(os.open(job["log"] + ".stderr", flags, 0o600), 2)

    def say(self, **fields: Any) -> None:
        os.write(self._log, f"said\t{json.dumps(fields)}\t\t0\n".encode())

    def arm(
        self,
        action: int = Action.NOTHING,
        at: int = 0,
        *,
        calls: int = Calls.ALL,
        repeat: bool = False,
        error: int = 0,
        serial: bool = False,
        sync: bool = True,
        log: bool = True,
    ) -> None:
        root = os.fsencode(self.state_dir)
        self._library.fault_arm(
            root, self._log if log else -1, int(calls), int(action), ctypes.c_long(at), repeat, error, serial, sync
        )

    def disarm(self) -> int:
        """Return how many calls were disturbed."""
        return self._library.fault_disarm()


def history(child: Child) -> None:
    """Take steps, saying when each is done."""
    for name in child.job.get("without", ()):
        setattr(files, name, lambda *_: None)
    store = CheckpointStore(child.state_dir)
    child.arm(**child.job["plan"])
    for number, step in enumerate(child.job["steps"]):
        take(store, step)
        child.say(done=number)
    child.disarm()


def refusals(child: Child) -> None:
    """Take steps on a disk that refuses a call, or all from there on, and then on one that works, over and over."""
    store = CheckpointStore(child.state_dir)
    for step in child.job["steps"]:
        take(store, step)
    for fault in child.job["faults"]:
        for step in fault["before"]:
            take(store, step)
        answer: dict[str, Any] = {}
        child.arm(**fault["plan"], log=False)
        try:
            answer["returned"] = take(store, fault["step"])
        except RequestFailedError as error:
            answer |= {"error": str(error), "category": error.category}
        answer["hits"] = child.disarm()
        answer |= {"found": read_all(store), "runs": store.runs()}
        for step in fault["after"]:
            take(store, step)
        child.say(**answer, found_after=read_all(store), runs_after=store.runs())


def writer(child: Child) -> None:
    """Save into a run of its own and over the checkpoint that all writers share."""
    store = CheckpointStore(child.state_dir)
    for seed in child.job["seeds"]:
        began = time.monotonic_ns()
        save(store, "shared", seed, overwrite=True)
        child.say(seed=seed, began=began, ended=time.monotonic_ns())
        save(store, f"own-{seed}", seed, run_id=child.job["own_run"])
    Path(child.job["done"]).touch()


def coming_and_going(child: Child) -> None:
    """Save a checkpoint and delete it, over and over, and leave it in the end."""
    store = CheckpointStore(child.state_dir)
    for seed in child.job["seeds"]:
        save(store, "shared", seed)
        # For as long as a reader needs, more or less.
        time.sleep(0.005 * (seed % 10))
        store.delete(key("shared"))
    save(store, "shared", child.job["seeds"][-1])
    Path(child.job["done"]).touch()


def reader(child: Child) -> None:
    """Read the shared checkpoint, and the listing that has it, until every writer is done."""
    store = CheckpointStore(child.state_dir)
    while True:
        last = all(Path(done).exists() for done in child.job["done"])
        began = time.monotonic_ns()
        try:
            state, record = store.load(key("shared"))
        except NotFoundError:
            assert child.job["goes"]
            continue
        ended = time.monotonic_ns()
        seed = state.step - 3
        assert_same(state, make_state(seed))
        assert record.metadata == {"seed": seed}
        assert child.job["goes"] or "shared" in [record.name for record in store.list()]
        child.say(seed=seed, began=began, ended=ended)
        if last:
            return


def without_rights(child: Child) -> None:
    """Read what is there and try to save, as a user who may not write, even where root runs the tests."""
    # Root without capabilities is bound by the permissions of files.
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
    store = CheckpointStore(child.state_dir)
    listed = [[record.name, record.metadata] for record in store.list()]
    loaded = [store.load(key(name))[0].step for name, _ in listed]
    try:
        save(store, "another")
        refused = ""
    except RequestFailedError as error:
        refused = str(error)
    child.say(listed=listed, runs=store.runs(), loaded=loaded, refused=refused)


def served(child: Child) -> None:
    """Serve a client while the disk refuses everything, once it works again, and after a restart."""
    # Imported here: a fork needs the parent to have no threads.
    import warnings

    import tinker

    import jax_client
    from jax_client.server.state.request_log import RequestLog
    from jax_client.server.state.server import Server
    from support import fake_engine
    from support.server.serving import KEY, Running

    warnings.simplefilter("ignore", FutureWarning)  # the SDK's, of ways that programs use
    models, config = fake_engine.FakeModels(), jax_client.EngineConfig(state_dir=child.state_dir)
    running = Running(Server(config, log=RequestLog(child.state_dir), base_models=models))
    service = tinker.ServiceClient(base_url=running.url, api_key=KEY)
    client = service.create_lora_training_client(fake_engine.MODEL, 4).result(60)
    fake_engine.step(client)
    good = client.save_state("good").result(60).path

    def tried(call: Callable[[], Any]) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def attempts(name: str) -> dict[str, str]:
        sampled = lambda of: of.sample(fake_engine.PROMPT, 1, fake_engine.PARAMS).result(60)  # noqa: E731
        return {
            "train": tried(lambda: fake_engine.step(client)),
            "sample": tried(lambda: sampled(client.save_weights_and_get_sampling_client())),
            "sample the base model": tried(
                lambda: sampled(service.create_sampling_client(base_model=fake_engine.MODEL))
            ),
            "another session": tried(lambda: tinker.ServiceClient(base_url=running.url, api_key=KEY)),
            "list": tried(lambda: service.create_rest_client().list_checkpoints(client.model_id).result(60)),
            "save": tried(lambda: client.save_state(name).result(60)),
            "load": tried(lambda: client.load_state_with_optimizer(good).result(60)),
            "another run": tried(lambda: service.create_lora_training_client(fake_engine.MODEL, 4).result(60)),
        }

    child.arm(Action.REFUSE, 1, repeat=True, error=child.job["error"], calls=child.job["calls"], log=False)
    failing = attempts("bad")
    hits = child.disarm()
    working = attempts("after")
    running.stop()
    running = Running(Server(config, log=RequestLog(child.state_dir), base_models=models), running.port)
    restarted = tried(lambda: fake_engine.step(client))
    running.stop()
    names = sorted(record.name for record in CheckpointStore(child.state_dir).list())
    child.say(failing=failing, working=working, restarted=restarted, hits=hits, names=names)


PROGRAMS: dict[str, Callable[[Child], None]] = {
    program.__name__: program
    for program in (history, refusals, writer, coming_and_going, reader, without_rights, served)
}


def start(library: ctypes.CDLL, job: dict[str, Any]) -> int:
    """Fork a process for a job; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        child = Child(library, job)
        try:
            PROGRAMS[job["program"]](child)
            status = 0
        except BaseException:
            child.disarm()
            child.say(failed=traceback.format_exc())
    finally:
        os._exit(status)


def main() -> None:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    import orbax.checkpoint  # noqa: F401

    # A thread would not be there in the children, and a lock that it holds would be held for ever.
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"{len(threads)} threads run after the imports; a fork needs there to be one")
    print("ready", flush=True)
    for line in sys.stdin:
        pids = [start(library, job) for job in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
