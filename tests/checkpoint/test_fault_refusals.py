"""Is a disk that refuses or shortens calls reported, and are earlier checkpoints as they were?

The processes are those of test_faults.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.values import CheckpointKey
from support.checkpoints import RUN, save
from support.faults.fault_child import Action, Calls
from support.faults.fault_children import KILLED, Children, everywhere, job, said, take_history
from support.faults.fault_disk import Event
from support.faults.fault_history import Checkpoints, Saved, assert_swept, outcome, spread

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
