"""Does a program end as Python would end it, with nothing lost, nothing more printed, and no thread left?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jax_client import process
from jax_client.process import Step
from jax_client.threads import start_thread
from support import exits


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exits")
    return exits.write_model(folder / "model"), folder / "cache"


def check(names: tuple[str, ...], places: tuple[Path, Path], tmp_path: Path) -> None:
    folders = {name: tmp_path / str(number) for number, name in enumerate(names)}
    # Two at a time: each begins with seconds of imports.
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(names, pool.map(lambda name: exits.run(name, folders[name], *places), names), strict=True))
    faults = {name: exits.faults(name, folders[name], outcome) for name, outcome in outcomes.items()}
    assert {name: found for name, found in faults.items() if found} == {}


def test_a_program_ends_as_without_the_package_and_its_steps_are_saved(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    check(exits.FEW, places, tmp_path)


@pytest.mark.full
def test_every_way_to_end(places: tuple[Path, Path], tmp_path: Path) -> None:
    check(tuple(name for name in exits.MODES if name not in exits.FEW), places, tmp_path)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry of its own, and the calls that its parts note."""
    for name, value in (("_parts", {}), ("_threads", set()), ("_done", set()), ("_ending", False), ("_deadline", None)):
        monkeypatch.setattr(process, name, value)
    yield []


def test_exit_steps_run_in_the_written_order_whatever_one_of_them_raises(
    parts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError("disk")

    process.register("first", "", at_exit={step: lambda step=step: parts.append(step.value) for step in reversed(Step)})
    process.register("second", "", at_exit={Step.RUNS: fails})
    process.register("third", "", at_exit={Step.RUNS: lambda: parts.append("third")})
    process._run_exit_steps()
    assert parts == ["intake", "requests", "runs", "third", "sampling", "engines", "memory"]
    assert "second: the exit step 'runs' failed" in caplog.text


def test_a_second_interrupt_ends_the_waiting(parts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    process.register("saving", "", at_exit={Step.RUNS: interrupted, Step.ENGINES: lambda: parts.append("engines")})
    process._run_exit_steps()
    assert parts == ["engines"] and "interrupted again" in caplog.text
    assert process._deadline is not None


def test_the_table_at_the_top_of_process_lists_the_steps_in_their_order() -> None:
    rows = [line.split("`")[1] for line in (process.__doc__ or "").splitlines() if line.startswith("| `")]
    assert rows == [step.name for step in Step]


def test_memory_stays_while_a_thread_is_left(parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "JOIN_SECONDS", 0.1)
    monkeypatch.setattr(process.interpreter_end, "abandon_threads", lambda: parts.append("abandoned"))
    goes, ends = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: goes.set() or ends.wait(), daemon=True)
    thread.start()
    goes.wait()
    process.track(thread)
    process.register("engine", "", at_exit={Step.MEMORY: lambda: parts.append("memory")})
    process._run_exit_steps()
    ends.set()
    thread.join()
    assert parts == ["abandoned"]


def test_what_a_thread_makes_while_the_program_ends_is_ended_too(parts: list[str]) -> None:
    class Engine:
        def __init__(self) -> None:
            self._told = threading.Event()
            steps = {Step.REQUESTS: lambda _: parts.append("requests"), Step.ENGINES: lambda engine: engine._told.set()}
            process.register("engine", "", owner=self, at_exit=steps | {Step.MEMORY: lambda _: parts.append("memory")})
            start_thread("jax_client-late", self._told.wait)

    made: list[Engine] = []
    ending = threading.Event()
    process.register("watcher", "", at_exit={Step.ENGINES: ending.set})
    start_thread("jax_client-load", lambda: ending.wait() and made.append(Engine()))
    process._run_exit_steps()
    assert made and parts == ["requests", "memory"] and process.report()["threads"] == []


def test_a_part_ends_with_its_owner(parts: list[str]) -> None:
    class Owner:
        def note(self) -> None:
            parts.append("called")

    kept, gone = Owner(), Owner()
    for owner in (kept, gone):
        process.register("owner", "something", owner=owner, at_exit={Step.RUNS: Owner.note})
    assert process.report()["parts"] == ["owner: something"] * 2
    del gone, owner
    process._run_exit_steps()
    assert parts == ["called"] and process.report()["parts"] == ["owner: something"]
    process.unregister(kept)
    assert process.report()["parts"] == []


def test_after_a_fork_each_rule_is_called_in_order_and_owners_are_forgotten(
    parts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Owner:
        def note(self) -> None:
            parts.append("owner")

    def fails() -> None:
        raise OSError("disk")

    owner = Owner()
    process.register("module", "", after_fork=lambda: parts.append("module"))
    process.register("broken", "", after_fork=fails)
    process.register("owner", "", owner=owner, after_fork=Owner.note)
    process._after_fork()
    assert parts == ["module", "owner"] and "broken: the fork rule failed" in caplog.text
    process._run_exit_steps()
    assert [part.name for part in process._parts.values()] == ["module", "broken"]
