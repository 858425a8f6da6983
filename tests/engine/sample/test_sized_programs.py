"""Does a larger program serve while a smaller one is compiled, and is nothing compiled that no request needs?"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.core import programs
from jax_client.engine.core.programs import CompileRecord, Program, compiling
from jax_client.engine.devices.compilation_cache import enable_compilation_cache
from jax_client.engine.sample.sized import SizedPrograms
from jax_client.threads import Workers

Take = Callable[[list[int]], int]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make what chooses a decode program's rows, with the log of its compiles."""
    monkeypatch.setattr(programs, "PAUSE_S", 0.01)
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    enable_compilation_cache(tmp_path / "cache")
    log: list[CompileRecord] = []
    batches = SimpleNamespace(
        of_rows=lambda _, size, __: {"x": np.zeros(size, np.float32)},
        shapes=lambda batch: {name: jnp.asarray(array) for name, array in batch.items()},
    )
    compilers = Workers("test-compile-now", 2)
    backgrounds: list[Workers | None] = [compilers]

    def make(*, background: bool = True) -> tuple[Take, Any, list[CompileRecord]]:
        decode = Program("decode", lambda params, loras, pool, batch: batch["x"] + 1, log)
        workers = Workers("test-compile", 2) if background else None
        backgrounds.append(workers)
        weights = cast(Any, SimpleNamespace(now={}, bytes=0))
        both = SimpleNamespace(prefill=decode, decode=decode)
        sized = SizedPrograms(cast(Any, both), cast(Any, batches), weights, compilers, workers)

        def take(sizes: list[int]) -> int:
            while (size := sized.rows([], {}, sizes)) is None:
                wait(sized.awaited(), 20)
            batch = {"x": jnp.zeros(size, jnp.float32), "steps": jnp.asarray(np.int32(1))}
            decode({}, (), {}, batch)  # as the loop runs it
            return size

        return take, sized, log

    yield make
    for workers in backgrounds:
        if workers is not None:
            workers.close(wait=True)
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_largest_serves_until_the_smaller_is_there(compiled: Any) -> None:
    take, _, log = compiled()
    assert take([8, 32]) == 32 and len(log) == 1, "one compile serves"
    end = time.monotonic() + 20
    while take([8, 32]) == 32:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [record.cause for record in log] == ["first use", "background"] and take([32]) == 32
    second, _, log = compiled()
    del log[:]
    assert second([8, 32]) == 8 and [record.cached for record in log] == [True], "the cache has it"


def test_without_a_background_the_smallest_that_holds_the_batch_runs(compiled: Any) -> None:
    take, _, log = compiled(background=False)
    assert [take([8, 32]), take([32])] == [8, 32] and len(log) == 2


def test_decode_is_compiled_beside_prefill_once(compiled: Any) -> None:
    take, sized, log = compiled()
    for _ in range(3):
        sized.compile_decode_beside(None, {}, [8, 32])
    assert take([8, 32]) == 32 and take([8, 32]) == 32
    assert log[0].cause == "first use" and sum(not record.cached for record in log) <= 2


def test_a_compile_that_fails_at_once_is_tried_again(compiled: Any) -> None:
    """It may end between the two looks at it; its error must not wait for the request after that."""

    class Quick(Future[None]):
        def __init__(self) -> None:
            super().__init__()
            self.set_exception(ValueError("out of memory"))
            self.looks = 0

        def done(self) -> bool:
            self.looks += 1
            return self.looks > 1

    _, sized, _ = compiled(background=False)
    begun: list[Quick] = []
    sized._decode.begin = lambda *_: begun.append(Quick()) or begun[-1]
    for count in (1, 2):
        answers = [sized.rows([], {}, [8])]
        if answers[0] is None:
            answers.append(sized.rows([], {}, [8]))
        assert isinstance(answers[-1], ValueError) and len(begun) == count


def test_what_a_failed_compile_was_given_is_freed_with_its_error() -> None:
    """Without looking for cycles, which Python does rarely."""
    program = Program("broken", lambda x: x.no_such_attribute, [])
    array = jnp.zeros(3)
    seen = weakref.ref(array)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(AttributeError, match="no_such_attribute"):
            program(array)
        with Workers("test-compile", 1) as workers:
            failed = program.begin(workers, "first use", array).exception(20)
        assert isinstance(failed, AttributeError)
        del array, failed
        assert seen() is None
    finally:
        gc.enable()


def test_a_compile_in_the_background_yields_until_a_request_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PAUSE_S", 0.01)
    log: list[CompileRecord] = []
    order: list[str] = []

    def traced(name: str) -> Callable[[Any], Any]:
        return lambda x: (order.append(name), x + 1)[1]

    unasked, asked = Program("unasked", traced("unasked"), log), Program("asked", traced("asked"), log)

    def first(x: Any) -> Any:
        workers.submit(unasked.compile, "background", x_3)
        later = workers.submit(asked.compile, "background", x_3)
        time.sleep(0.2)
        assert not order, "both wait for this one"
        asked.compile("first use", x_3)
        assert later.result(20) is None and order == ["asked"]
        assert [each["program"] for each in compiling(log)] == ["first"]
        return x

    x_3 = jnp.zeros(3)
    with Workers("test-compile", 2) as workers:
        Program("first", first, log)(x_3)
    assert order == ["asked", "unasked"] and [each.cause for each in log] == ["first use", "first use", "background"]
