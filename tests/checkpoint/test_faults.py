"""Is an acknowledged checkpoint ever lost or silently wrong, whatever happens to the process or to the disk?

Real processes save real orbax arrays; fault_library disturbs their calls, fault_child is what they run, fault_disk says
what a power failure would leave, fault_history what has to be there. A few points of each test are visited, all of them
with --faults.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.checkpoint import manifest
from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import RequestFailedError
from jax_client.values import CheckpointKey
from support.checkpoints import RUN, assert_same, files_of, key, make_state, save
from support.faults import fault_child
from support.faults.fault_child import Action, Calls
from support.faults.fault_disk import Disk, Event, read_log
from support.faults.fault_history import (
    COPIES,
    HISTORY,
    Checkpoints,
    Saved,
    assert_kept,
    assert_swept,
    outcome,
    spread,
    state_of,
)

# A killed process loses nothing that it told the system, so that syncing would only cost time.
KILLED = {"sync": False}
# The order of the log is the order of the calls.
IN_ORDER = {"sync": False, "serial": True}


class Children:
    """A process that forks the processes of jobs; see fault_child."""

    def __init__(self, library: Path) -> None:
        environment = {
            "LD_PRELOAD": str(library),
            "OPENBLAS_NUM_THREADS": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", fault_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        assert self._out.readline() == "ready\n"

    def run(self, *jobs: dict[str, Any]) -> list[int]:
        """Run jobs at the same time, each in its own process; return their exit statuses."""
        self._in.write(json.dumps(jobs) + "\n")
        self._in.flush()
        return json.loads(self._out.readline())

    def close(self) -> None:
        self._in.close()
        self._process.wait(30)
        self._out.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the calls of a process are intercepted on Linux only")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler (cc, gcc, clang) for the library that intercepts calls")
    path = tmp_path_factory.mktemp("library") / "fault_library.so"
    source = Path(fault_child.__file__).with_name("fault_library.c")
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(path), str(source), "-ldl", "-lpthread"], check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def pair(library: Path) -> Iterator[list[Children]]:
    """Two of them, for as many processors."""
    both = [Children(library), Children(library)]
    yield both
    for children in both:
        children.close()


@pytest.fixture
def children(pair: list[Children]) -> Children:
    return pair[0]


def job(program: str, state_dir: Path, **arguments: Any) -> dict[str, Any]:
    """The log lies beside the state directory, which is there: what happens outside of it is not counted."""
    state_dir.mkdir(exist_ok=True)
    return {"program": program, "state_dir": str(state_dir), "log": f"{state_dir}.log", **arguments}


def events_of(state_dir: Path) -> list[Event]:
    return read_log(Path(f"{state_dir}.log"))


def said(state_dir: Path) -> list[dict[str, Any]]:
    return [event.said for event in events_of(state_dir) if event.name == "said"]


def everywhere(pair: list[Children], points: Sequence[Any], work: Callable[[Children, Any], int]) -> int:
    """Do the work of each point, two at a time; return the sum of what it counted."""

    def share(number: int) -> int:
        return sum(work(pair[number], point) for point in points[number :: len(pair)])

    with ThreadPoolExecutor(len(pair)) as pool:
        shares = [pool.submit(share, number) for number in range(len(pair))]
        return sum(done.result() for done in shares)


def take_history(children: Children, state_dir: Path, steps: Sequence[Any] = HISTORY, **arguments: Any) -> list[Event]:
    """Take the steps in a child, undisturbed; return its log."""
    assert children.run(job("history", state_dir, steps=steps, **{"plan": IN_ORDER} | arguments)) == [0]
    return events_of(state_dir)


def calls_in(events: Sequence[Event]) -> int:
    return sum(event.name != "said" for event in events)


def kill(children: Children, state_dir: Path, plan: dict[str, Any]) -> list[Event] | None:
    """Take the history in a child that dies at a point; return its log, None if it came to the end before."""
    (status,) = children.run(job("history", state_dir, steps=HISTORY, plan=plan))
    assert status in (0, -signal.SIGKILL), said(state_dir)
    return events_of(state_dir) if status else None


def survives(
    children: Children, state_dir: Path, plan: dict[str, Any], then: Callable[[list[Event]], None] = lambda _: None
) -> bool:
    """Take the history in a child that dies at a point, do more to what it left, and see that all of it holds.

    Returns:
        Whether the child died: False if it came to the end before.
    """
    events = kill(children, state_dir, plan)
    if events is not None:
        then(events)
        assert_kept(state_dir, acknowledged(events))
    shutil.rmtree(state_dir, ignore_errors=True)
    return events is not None


def acknowledged(events: Sequence[Event]) -> int:
    return sum(event.name == "said" for event in events)


def test_a_kill_at_any_call_loses_nothing_acknowledged(
    pair: list[Children], tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    # With threads that take turns as they like, the number of calls is not always the same.
    last = calls_in(take_history(pair[0], tmp_path / "count", plan=KILLED))
    actions = (Action.KILL_BEFORE, Action.KILL_TORN) if whole else (Action.KILL_TORN,)
    points = [(at, action) for at in spread(last, last if whole else 25) for action in actions]

    def work(children: Children, point: tuple[int, Action]) -> bool:
        at, action = point
        return survives(children, tmp_path / f"{at}-{action.name}", KILLED | {"action": action, "at": at})

    kills = everywhere(pair, points, work)
    assert kills > 0.8 * len(points)
    tally["kills"] += kills


def test_a_power_failure_loses_nothing_acknowledged(
    pair: list[Children], tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    last = calls_in(take_history(pair[0], tmp_path / "count"))
    points = [(at, "all") for at in spread(last, last if whole else 16)]
    points += [(at, "some") for at in spread(last, last // 4 if whole else 4)]

    def work(children: Children, point: tuple[int, str]) -> bool:
        at, loss = point
        order = None if loss == "all" else np.random.default_rng(at)
        plan = IN_ORDER | {"action": Action.KILL_AFTER, "at": at}
        return survives(children, tmp_path / f"{at}-{loss}", plan, lambda events: Disk(events).cut_power(order))

    cuts = everywhere(pair, points, work)
    assert cuts > 0.8 * len(points)
    tally["power failures, simulated"] += cuts


def test_a_power_failure_after_a_kill_loses_nothing_acknowledged(
    pair: list[Children], tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    """One process is killed, another one saves into what it left, and then the power fails."""
    steps = [["save", "weights", "a", 1]]
    last = calls_in(take_history(pair[0], tmp_path / "count", steps))

    def work(children: Children, at: int) -> bool:
        state_dir = tmp_path / str(at)
        plan = IN_ORDER | {"action": Action.KILL_AFTER, "at": at}
        (status,) = children.run(job("history", state_dir, steps=steps, plan=plan))
        Disk(take_history(children, state_dir, steps)).cut_power()
        store = CheckpointStore(state_dir)
        assert_same(store.load(key("a"))[0], state_of("weights", 1))
        return status != 0

    tally["power failures after a kill and a save, simulated"] += everywhere(
        pair, spread(last, last if whole else 8), work
    )


@pytest.mark.parametrize("without", ["fsync", "fsync_tree"])
def test_a_save_that_does_not_sync_is_found_out(children: Children, tmp_path: Path, without: str) -> None:
    """The harness notices what it is there to notice."""
    events = take_history(children, tmp_path / "state", HISTORY[:2], without=[without])
    with pytest.raises(AssertionError):
        assert_order(events)
    Disk(events).cut_power()
    with pytest.raises((AssertionError, RequestFailedError)):
        assert_kept(tmp_path / "state", 2)


def assert_order(events: Sequence[Event]) -> int:
    """Check every commit and acknowledgement in a log; return how many commits there were."""
    disk, commits, committed = Disk(), 0, ""
    newest: dict[str, str] = {}
    for event in events:
        parent, number = os.path.split(event.target)
        if event.name == "rename" and number.isdigit():
            # Files and directories, those that orbax's threads wrote included, are safe before they get their name.
            assert [what for what in disk.unsafe(event.path) if what != f"the name {event.path}"] == []
            disk.feed(event)
            commits, committed = commits + 1, event.target
            newest[parent] = committed
            continue
        disk.feed(event)
        if event.name in ("rename", "unlink", "unlinkat", "rmdir") and os.path.basename(event.path).isdigit():
            newer = newest.get(os.path.dirname(event.path))
            assert event.path != newer
            assert newer is None or list(disk.unsafe(newer)) == [], "an older version goes when the newer one is safe"
        if event.name == "said" and committed:
            assert list(disk.unsafe(committed)) == [], "what is acknowledged is safe"
            committed = ""
    return commits


def test_everything_is_synced_before_it_is_acknowledged(
    children: Children, tmp_path: Path, tally: Counter[str]
) -> None:
    events = take_history(children, tmp_path / "state", plan={"serial": True})
    commits = assert_order(events)
    assert commits == sum(step[0] in ("save", "copy") for step in HISTORY)
    # The C++ writers are seen at work, or the log would prove nothing.
    for path in files_of(tmp_path / "state", "a"):
        assert any(event.name.startswith("write") for event in events if path.suffix == "" or path.name in event.path)
    tally["commits whose order was read off the calls"] += commits


# Each with what comes before it and what comes after, on a disk that works.
REFUSED: list[tuple[list[Any], list[Any], list[Any]]] = [
    ([], ["save", "weights", "old", 3], [["save", "weights", "old", 2]]),
    ([], ["save", "weights", "new", 3], [["save", "weights", "new", 4], ["delete", "weights", "new"]]),
    ([], ["put_run", 2], [["put_run", 1]]),
    ([], ["publish", "weights", "old"], [["delete", "weights", "old"], ["save", "weights", "old", 2]]),
    ([], ["delete", "weights", "old"], [["save", "weights", "old", 2]]),
    ([], ["copy", "weights", "old"], [["drop_copy", "weights", "old"]]),
    ([["save", "weights", "old", 2]], ["list"], []),
]
BASE = [["put_run", 1], ["save", "weights", "kept", 1], ["save", "weights", "old", 2]]


def faults_of(step: list[Any], events: Sequence[Event], whole: bool) -> Iterator[dict[str, Any]]:
    """Yield plans that disturb the calls of a step, of which `events` is the log.

    A save by orbax's threads makes now 100, now 140 calls: some plans disturb nothing.
    """
    removals = sum(event.name.startswith(("unlink", "rmdir")) for event in events)
    writes = sum("write" in event.name for event in events)
    # A full disk still lets go of files.
    room = Calls.ALL & ~Calls.REMOVES
    kinds = [
        (errno.ENOSPC, room, len(events) - removals),
        (errno.EDQUOT, room, len(events) - removals),
        (errno.EIO, Calls.ALL, len(events)),
    ]
    few = 4 if step[0] == "save" else 2
    for number, (error, calls, count) in enumerate(kinds):
        for at in spread(count, count if whole else few):
            for repeat in (False, True) if whole and error != errno.EDQUOT else ((at + number) % 2 == 0,):
                yield {"action": Action.REFUSE, "at": at, "repeat": repeat, "error": error, "calls": calls}
    for at in spread(writes, writes if whole else 2):
        for repeat in (False, True) if whole else (at == 1,):
            yield {"action": Action.SHORTEN, "at": at, "repeat": repeat, "calls": Calls.WRITES}


def test_a_disk_that_refuses_calls_is_reported(
    pair: list[Children], tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    faults = []
    for before, step, after in REFUSED:
        events = take_history(pair[0], tmp_path / str(len(faults)), [*BASE, *before, step], plan=KILLED)
        ends = [i for i, event in enumerate(events) if event.name == "said"]
        for plan in faults_of(step, events[ends[-2] + 1 : ends[-1]], whole):
            faults.append({"before": before, "step": step, "after": after, "plan": plan})
    shares = [faults[number::2] for number in range(2)]
    answered: list[list[dict[str, Any]]] = [[], []]

    def work(children: Children, number: int) -> int:
        state_dir = tmp_path / f"share-{number}"
        (status,) = children.run(job("refusals", state_dir, steps=BASE, faults=shares[number]))
        answered[number] = said(state_dir)
        assert status == 0, answered[number][-1]
        for fault, answer in zip(shares[number], answered[number], strict=True):
            assert_answered(fault, answer)
        # A process that could not even remove what it left does so no more, but the next one does.
        save(CheckpointStore(state_dir), "next")
        assert_swept(state_dir)
        return sum(answer["hits"] > 0 for answer in answered[number])

    hits = everywhere(pair, [0, 1], work)
    assert hits > 0.5 * len(faults)
    tally["calls of the store with refused or short system calls"] += hits
    tally["of them reported as failed"] += sum("error" in answer for share in answered for answer in share)


def assert_answered(fault: dict[str, Any], answer: dict[str, Any]) -> None:
    def found(part: str) -> tuple[Checkpoints, int | None]:
        suffix = part.removeprefix("found")
        ((_, metadata),) = answer[f"runs{suffix}"]
        return {CheckpointKey(*place): Saved(seed, public) for *place, seed, public in answer[part]}, metadata["seed"]

    before = [*BASE, *fault["before"]]
    done = [*before, fault["step"]]
    if "error" in answer:
        assert found("found") in (outcome(before), outcome(done)), (fault, answer)
        assert answer["category"] == "server", answer
        if fault["step"][0] == "save":
            assert re.search(r"needs about \d+ bytes .* \d+ are free", answer["error"]), answer
    else:
        assert found("found") == outcome(done), (fault, answer)
    assert found("found_after") == outcome([*done, *fault["after"]]), (fault, answer)
    if fault["plan"]["action"] == Action.SHORTEN:
        assert "error" not in answer, "the rest of a short write is written"
    if fault["step"] == ["list"]:
        assert answer["returned"] == [["kept", "old"], [[RUN, {"seed": 1}]]]


@pytest.mark.parametrize("catalogue", [True, False])
def test_a_directory_that_is_read_only_can_be_read(children: Children, tmp_path: Path, catalogue: bool) -> None:
    state_dir = tmp_path / "state"
    store = CheckpointStore(state_dir)
    store.put_run(RUN, {"seed": 1})
    save(store, "a", 1)
    save(store, "b", 2)
    store.list()
    if not catalogue:
        (state_dir / "catalogue.sqlite").unlink(missing_ok=True)
    modes = {path: path.stat().st_mode for path in [state_dir, *state_dir.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        assert children.run(job("without_rights", state_dir)) == [0], said(state_dir)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    (answer,) = said(state_dir)
    assert answer["listed"] == [["a", {"seed": 1}], ["b", {"seed": 2}]]
    assert answer["runs"] == [[RUN, {"seed": 1}]]
    assert answer["loaded"] == [4, 5]
    assert "was not saved: " in answer["refused"] and "Permission denied" in answer["refused"]


def test_leftovers_of_ten_crashes_are_swept(children: Children, tmp_path: Path, tally: Counter[str]) -> None:
    events = take_history(children, tmp_path / "count", HISTORY[:4], plan=KILLED)
    saves = [i for i, event in enumerate(events) if event.name == "rename" and ".tmp-" in event.path]
    state_dir = tmp_path / "state"
    crashes = 0
    for at in range(max(saves) - 3, 0, -4):
        place = tmp_path / str(at)
        if crashes == 10 or kill(children, place, KILLED | {"action": Action.KILL_TORN, "at": at}) is None:
            continue
        leftovers = [path for path in place.rglob(".tmp-*") if ".tmp-" not in str(path.parent)]
        if not leftovers:
            continue
        if not crashes:
            shutil.copytree(place, state_dir)
            done = acknowledged(events_of(place))
        for path in leftovers:
            target = state_dir / path.relative_to(place)
            if target.parent.is_dir() and not target.exists():
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
        crashes += 1
    assert crashes == 10
    assert len(list(state_dir.rglob(".tmp-*"))) >= 10
    assert_kept(state_dir, done)
    assert_swept(state_dir)
    tally["crashes whose leftovers were put together and swept"] += crashes


def test_two_processes_save_at_the_same_time(
    children: Children, tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    number = 150 if whole else 8
    store = CheckpointStore(tmp_path / "state")
    save(store, "shared", 1)
    seeds = [list(range(1000 * i, 1000 * i + number)) for i in (1, 2)]
    done = [str(tmp_path / f"done-{i}") for i in (1, 2)]
    jobs = [
        job("writer", tmp_path / "state", seeds=seeds[i], done=done[i], own_run=f"own-{i}")
        | {"log": str(tmp_path / f"writer-{i}.log")}
        for i in range(2)
    ]
    jobs.append(job("reader", tmp_path / "state", done=done, goes=False) | {"log": str(tmp_path / "reader.log")})
    assert children.run(*jobs) == [0, 0, 0], [read_log(Path(job["log"]))[-1].said for job in jobs]
    writes = [event.said for i in range(2) for event in read_log(tmp_path / f"writer-{i}.log")]
    reads = [event.said for event in read_log(tmp_path / "reader.log")]
    writes.append({"seed": 1, "began": 0, "ended": 0})
    written = {write["seed"]: write for write in writes}
    reads.append({"seed": found_in_shared(store), "began": 2**63, "ended": 2**63})
    for read in reads:
        mine = written[read["seed"]]
        assert mine["began"] <= read["ended"]
        newer = [w for w in writes if mine["ended"] < w["began"] and w["ended"] < read["began"]]
        assert newer == [], "a version that was acknowledged before is not forgotten"
    for i in range(2):
        for seed in seeds[i]:
            assert_same(store.load(key(f"own-{seed}", run_id=f"own-{i}"))[0], make_state(seed))
        assert len(store.list(f"own-{i}")) == number
    assert_swept(tmp_path / "state")
    tally["saves by two processes at the same time"] += 4 * number
    tally["loads by a third one meanwhile"] += len(reads)


def test_a_reader_of_what_comes_and_goes_sees_it_whole(
    children: Children, tmp_path: Path, tally: Counter[str], whole: bool
) -> None:
    store = CheckpointStore(tmp_path / "state")
    save(store, "kept", 1)
    done = str(tmp_path / "done")
    jobs = [job("coming_and_going", tmp_path / "state", seeds=list(range(200 if whole else 10)), done=done)]
    jobs.append(job("reader", tmp_path / "state", done=[done], goes=True) | {"log": str(tmp_path / "reader.log")})
    assert children.run(*jobs) == [0, 0], [read_log(Path(job["log"]))[-1].said for job in jobs]
    tally["loads of a checkpoint that another process deletes and saves again"] += len(
        read_log(tmp_path / "reader.log")
    )


@pytest.fixture
def replaced(tmp_path: Path) -> Callable[[], None]:
    """A store with a checkpoint "a" of seed 1; the call deletes it, and saves another one of that name."""
    store = CheckpointStore(tmp_path / "state")
    save(store, "a", 1)

    def replace() -> None:
        store.delete(key("a"))
        save(store, "a", 2)

    return replace


def test_a_load_meets_a_deletion_and_a_save(
    replaced: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = manifest.verify

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(manifest, "verify", verify)
        replaced()
        verify(*arguments)

    monkeypatch.setattr(manifest, "verify", late)
    assert_same(CheckpointStore(tmp_path / "state").load(key("a"))[0], make_state(2))


def test_a_copy_meets_a_deletion_and_a_save(
    replaced: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, links = os.link, []

    def late(*arguments: Any) -> None:
        links.append(arguments)
        if len(links) == 5:
            replaced()
        link(*arguments)

    monkeypatch.setattr(os, "link", late)
    store = CheckpointStore(tmp_path / "state")
    # An error is as good as a whole copy.
    with contextlib.suppress(RequestFailedError):
        store.copy(key("a"), to_run=COPIES)
    assert len(links) >= 5
    if store.exists(key("a", run_id=COPIES)):
        state = store.load(key("a", run_id=COPIES))[0]
        assert_same(state, make_state(state.step - 3))


def found_in_shared(store: CheckpointStore) -> int:
    state, record = store.load(key("shared"))
    assert_same(state, make_state(state.step - 3))
    assert record.metadata == {"seed": state.step - 3}
    return state.step - 3
