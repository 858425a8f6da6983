"""Is an acknowledged checkpoint ever lost or silently wrong, whatever happens to the process or to the disk?

Real processes save real orbax arrays; fault_library disturbs their calls, fault_child is what they run, fault_disk says
what a power failure would leave, fault_history what has to be there. A few points of each test are visited, all of them
with --faults.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import RequestFailedError
from support.checkpoints import assert_same, files_of, key
from support.faults.fault_child import Action
from support.faults.fault_children import (
    IN_ORDER,
    KILLED,
    Children,
    acknowledged,
    calls_in,
    events_of,
    everywhere,
    job,
    kill,
    survives,
    take_history,
)
from support.faults.fault_disk import Disk, Event
from support.faults.fault_history import HISTORY, assert_kept, assert_swept, spread, state_of


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
