"""What does a history of calls of the store leave, and what may it leave when it is cut off anywhere?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.errors import NotFoundError
from jax_client.values import AdapterState, CheckpointKey
from support.checkpoints import RUN, assert_same, key, make_state, save

# The run that checkpoints are copied to.
COPIES = "copies:train:0"
HISTORY: list[list[Any]] = [
    ["put_run", 1],
    ["save", "weights", "a", 1],
    ["list"],
    ["save", "weights", "a", 2],
    ["publish", "weights", "a"],
    ["save", "weights", "a", 3],
    ["copy", "weights", "a"],
    ["save", "sampler_weights", "b", 4],
    ["put_run", 2],
    ["delete", "weights", "a"],
    ["list"],
    ["save", "weights", "a", 5],
    ["save", "sampler_weights", "b", 6],
]


def spread(count: int, number: int) -> list[int]:
    """Return `number` of 1..count, first and last included, or all."""
    return sorted({int(at) for at in np.linspace(1, count, min(number, count)).round()})


def state_of(kind: str, seed: int) -> AdapterState:
    """Return what is saved in a history: few arrays, so that every call can be disturbed; moments only now and then."""

    def few(group: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
        return group and {name: group[name] for name in ("q.A", "o.B")}

    state = make_state(seed, optimizer=kind == "weights" and seed % 3 == 0)
    return replace(state, weights=few(state.weights) or {}, mu=few(state.mu), nu=few(state.nu))


def take(store: CheckpointStore, step: Sequence[Any]) -> Any:
    """Take a step of a history: one call of the store."""
    match step:
        case ["save", kind, name, seed]:
            save(store, name, seed, kind=kind, state=state_of(kind, seed), overwrite=store.exists(key(name, kind)))
        case ["delete", kind, name]:
            store.delete(key(name, kind))
        case ["copy", kind, name]:
            store.copy(key(name, kind), to_run=COPIES)
        case ["drop_copy", kind, name]:
            if store.exists(key(name, kind, COPIES)):
                store.delete(key(name, kind, COPIES))
        case ["publish", kind, name]:
            store.set_public(key(name, kind), True)
        case ["put_run", seed]:
            store.put_run(RUN, {"seed": seed})
        case ["list"]:
            return sorted(record.name for record in store.list()), store.runs()


def read_all(store: CheckpointStore) -> list[Any]:
    """Return run, kind, name, seed and visibility of every checkpoint, whose arrays have to be those of its seed."""
    found = []
    for record in store.list():
        state, again = store.load(record.key)
        seed = state.step - 3
        assert_same(state, state_of(record.kind, seed))
        assert again == record
        assert record.metadata == {"seed": seed}
        found.append([*astuple(record.key), seed, record.public])
    return found


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was acknowledged."""

    seed: int
    public: bool = False


Checkpoints = dict[CheckpointKey, Saved]


def outcome(steps: Sequence[Sequence[Any]]) -> tuple[Checkpoints, int | None]:
    """Return the checkpoints and what is kept of the run after some steps."""
    checkpoints: Checkpoints = {}
    kept = None
    for step in steps:
        match step:
            case ["save", kind, name, seed]:
                before = checkpoints.get(key(name, kind))
                checkpoints[key(name, kind)] = Saved(seed, before is not None and before.public)
            case ["copy", kind, name]:
                checkpoints[key(name, kind, COPIES)] = Saved(checkpoints[key(name, kind)].seed)
            case ["publish", kind, name]:
                checkpoints[key(name, kind)] = replace(checkpoints[key(name, kind)], public=True)
            case ["delete", kind, name]:
                del checkpoints[key(name, kind)]
            case ["drop_copy", kind, name]:
                checkpoints.pop(key(name, kind, COPIES), None)
            case ["put_run", seed]:
                kept = seed
    return checkpoints, kept


def found_in(store: CheckpointStore) -> Checkpoints:
    """Load and verify every checkpoint that the history makes; each has to be one that was saved, bit for bit."""
    found = {}
    for place in {place for done in range(len(HISTORY)) for place in outcome(HISTORY[: done + 1])[0]}:
        if not store.exists(place):
            with pytest.raises(NotFoundError):
                store.load(place)
            continue
        state, record = store.load(place)
        seed = state.step - 3
        assert_same(state, state_of(record.kind, seed))
        assert record == store.verify(place) and record.metadata == {"seed": seed}
        found[place] = Saved(seed, record.public)
    return found


def assert_kept(state_dir: Path, done: int) -> None:
    """The first `done` steps of the history were acknowledged, and perhaps one more was begun: all that holds."""
    store = CheckpointStore(state_dir)
    before, after = outcome(HISTORY[:done]), outcome(HISTORY[: done + 1])
    found = found_in(store)
    assert found in (before[0], after[0])
    for _ in range(2):  # Read from the files, then from the catalogue.
        listed = {record.key: record for record in store.list()}
        assert {place: Saved(record.metadata["seed"], record.public) for place, record in listed.items()} == found
        assert [metadata["seed"] for _, metadata in store.runs()] in [
            [] if kept is None else [kept] for kept in (before[1], after[1])
        ]
    # Leftovers keep no name, and are gone once something is saved.
    for step in HISTORY[done : done + 1]:
        match step:
            case ["save", kind, name, _]:
                take(store, ["save", kind, name, 9])
                assert found_in(store) == outcome([*HISTORY[:done], ["save", kind, name, 9]])[0]
            case ["copy", *_] if found == before[0]:
                take(store, step)
                assert found_in(store) == after[0]
            case _:
                take(store, ["save", "sampler_weights", "b", 9])
        assert_swept(state_dir)


def assert_swept(state_dir: Path) -> None:
    assert list(state_dir.rglob(".tmp-*")) == []
    for place in state_dir.glob("runs/*/*weights/*"):
        (version,) = place.iterdir()
        content = json.loads((version / "manifest.json").read_bytes())
        files = {path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()}
        assert files - {"manifest.json", "label.json"} == content["files"].keys()
