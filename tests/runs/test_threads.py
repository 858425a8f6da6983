"""Do the package's threads take work, pass on what it raises, and end when they should?"""

from __future__ import annotations

import ast
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from jax_client import process, threads
from jax_client.runs.lifecycle.futures import link
from jax_client.threads import Workers, start_thread

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("jax_client", "models", "losses") for path in sorted((ROOT / folder).rglob("*.py"))]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names(pool: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"{pool}-")]


def test_jobs_run_on_few_threads_and_their_errors_are_the_futures() -> None:
    with Workers("few", 2) as pool:
        barrier = threading.Barrier(2)
        assert [future.result(30) for future in [pool.submit(barrier.wait, 30) for _ in range(2)]] != [0, 0]
        assert sorted(names("few")) == ["few-0", "few-1"]
        assert pool.submit(divmod, 7, 2).result(30) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(30)
        assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
        assert pool.submit(pool.runs_this_thread).result(30) and not pool.runs_this_thread()
    assert names("few") == []
    with pytest.raises(RuntimeError, match="the threads few have ended"):
        pool.submit(int)


def test_a_thread_starts_only_when_none_is_idle() -> None:
    with Workers("lazy", 8, ready=1) as pool:
        for _ in range(5):
            pool.submit(int).result(30)
            wait_for(lambda: pool._jobs.idle)
        assert names("lazy") == ["lazy-0"]


def test_a_map_that_fails_cancels_what_has_not_begun() -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("first")
        time.sleep(0.05)

    with Workers("mapped", 1) as pool, pytest.raises(ValueError, match="first"):
        pool.map(work, range(50))
    assert len(begun) < 50


def test_closing_runs_or_cancels_what_waits() -> None:
    gate = threading.Event()
    for cancel in (False, True):
        pool, gate = Workers("closed", 1), threading.Event()
        pool.submit(gate.wait, 30)
        waiting = pool.submit(int)
        pool.close(wait=False, cancel=cancel)
        gate.set()
        assert waiting.cancelled() if cancel else waiting.result(30) == 0
        wait_for(lambda: not names("closed"))


def test_a_forgotten_pool_ends_after_its_jobs_and_keeps_no_arrays() -> None:
    class Value:
        pass

    value = Value()
    seen = weakref.ref(value)
    pool = Workers("forgotten", 2)
    future = pool.submit(lambda held: time.sleep(0.1), value)
    del value, pool
    gc.collect()
    assert future.result(30) is None
    wait_for(lambda: not names("forgotten"))
    del future
    gc.collect()
    assert seen() is None


def test_what_a_job_held_that_failed_is_freed_with_its_future() -> None:
    """Without looking for cycles, which Python does rarely: it may have been a request's body, or half of a model."""

    class Value:
        pass

    seen: list[weakref.ref[Value]] = []

    def job() -> None:
        value = Value()
        seen.append(weakref.ref(value))
        raise ValueError("of the job")

    gc.collect()
    gc.disable()
    try:
        with Workers("failing", 1) as pool:
            future, followed = pool.submit(job), Future[None]()
            link(future, followed, lambda value: value)
            assert isinstance(followed.exception(30), ValueError)
            del future, followed
            wait_for(lambda: seen[0]() is None)
    finally:
        gc.enable()


def test_where_python_starts_no_thread_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers("made earlier", 4, ready=1) as made:

        def refuses(name: str, function: Callable[[], object]) -> threading.Thread:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threads, "start_thread", refuses)
        assert made.submit(threading.current_thread).result(30) is not threading.current_thread()
        with Workers("made late", 4) as late:
            assert late.submit(threading.current_thread).result(0) is threading.current_thread()
            assert late.map(abs, [-1, 2]) == [1, 2]


def test_a_thread_that_cannot_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with pytest.raises(RuntimeError, match=r"at interpreter shutdown\)\. Python 3\.12\.0 to 3\.12\.2 start none"):
        start_thread("jax_client-test", int)
    assert "jax_client-test" not in process.report()["threads"]


def test_after_a_fork_a_pool_is_empty_and_serves() -> None:
    with Workers("forked", 2, ready=2) as pool:
        pool.submit(int).result(30)
        # What a fork leaves: the pool's state without its threads.
        own = pool._jobs.threads, pool._jobs.queue
        pool._restart()
        assert pool.submit(threading.current_thread).result(30).name == "forked-0"
        for _ in own[0]:
            own[1].put(None)


def test_threads_hooks_and_callbacks_are_made_in_one_place() -> None:
    homes = {"process.py", "threads.py", "interpreter_end.py"}
    kinds = {"Thread", "ThreadPoolExecutor", "ProcessPoolExecutor", "Timer", "register_at_fork", "_register_atexit"}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        calls = {node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                 for node in ast.walk(tree) if isinstance(node, ast.Call)}  # fmt: skip
        if path.name not in homes:
            assert not kinds & calls, f"{path} makes {kinds & calls}; see jax_client/threads.py and process.py"
            assert "atexit" not in imported, f"{path} imports atexit; register an exit step with jax_client/process.py"
        assert "_register_atexit" not in used
