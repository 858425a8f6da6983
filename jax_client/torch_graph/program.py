"""How is an uploaded loss run? On the host's CPU, by programs that are compiled before the loss is called.

A loss is a handful of elementwise operations on one sequence's logprobs, which come from the host and return to it. It
takes longer to compile than to run, and longest for an accelerator. A CPU also has torch's int64 and, for a loss that
asks for it, float64. Where jax has no CPU backend, the program runs on jax's default device.

`GraphProgram.prepare` has the programs compiled on the threads of `compile_queue`: one for each padded length, or one
for each length where padding would change the loss. `Programs.evaluate` then only runs them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_client import process
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.host.memory import give_back
from jax_client.sharding import Device
from jax_client.torch_graph.graph import Graph
from jax_client.torch_graph.traced import bounds, compile_queue, padding
from jax_client.torch_graph.traced.compile_queue import CompileQueue, Job
from jax_client.torch_graph.traced.padding import Padded, Pattern, Shapes

# Of the programs kept in the process, of all losses together: what is needed again after so many others is compiled
# again. An equation takes about 14 KB of the process's memory.
MOST_EQUATIONS = 64_000
# Kept of each loss: how the shapes of its inputs depend on the length.
MOST_PATTERNS = 64
# Of the programs that run at the same time, temporaries and outputs together.
BYTES_AT_ONCE = 2**30
# The length for which a loss is traced when it is created.
TRACED_LENGTH = 64
# These programs run once or a few times: time spent on making them faster is lost. Without fusion they take time in
# proportion to their equations; with it, a chain of 300 softmaxes took 225 s and 12 GB, in place of 8 s.
_CPU_OPTIONS: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_disable_hlo_passes": "fusion,constant_folding",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Program:
    """A compiled loss with its gradient, of arrays of some shapes.

    Attributes:
        shapes: of the arrays.
        lengths: names of the lengths that are inputs, none where the shapes are exact.
        bytes: temporaries and outputs.
        equations: as `bounds` counts them.
    """

    shapes: Shapes
    lengths: tuple[str, ...]
    compiled: jax.stages.Compiled
    bytes: int
    equations: int

    def launch(self, arrays: Sequence[np.ndarray]) -> Any:
        """Return ((loss, metrics), padded gradient), which are still being computed."""
        if not self.lengths:
            return self.compiled(*arrays)
        _, lengths = padding.pattern_of(shapes_of(arrays))
        real = tuple(np.int64(lengths[name]) for name in self.lengths)
        return self.compiled(
            real, *(_fill(array, shape) for array, (shape, _) in zip(arrays, self.shapes, strict=True))
        )


def _fill(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    filled = np.zeros(shape, array.dtype)
    filled[tuple(map(slice, array.shape))] = array
    return filled


class Programs:
    """The compiled programs of a loss for the shapes of one batch.

    Args:
        programs: by the shapes of a datum's arrays.
    """

    def __init__(self, programs: dict[Shapes, _Program]) -> None:
        self._programs = programs

    def evaluate(self, datums: Sequence[Sequence[np.ndarray]]) -> list[tuple[float, np.ndarray, dict[str, float]]]:
        """Return of each datum the loss, its gradient by the logprobs, and the metrics.

        Args:
            datums: of each `logprobs`, float32, then the other inputs, of shapes that were prepared.
        """
        results, launched, size = [], [], 0
        with _host():
            for arrays in datums:
                program = self._programs[shapes_of(arrays)]
                # As many as fit are launched before the first is waited for.
                if launched and size + program.bytes > BYTES_AT_ONCE:
                    results += jax.device_get(launched)
                    launched, size = [], 0
                launched.append(program.launch(arrays))
                size += program.bytes
            results += jax.device_get(launched)
        return [
            (
                float(loss),
                np.asarray(gradient[tuple(map(slice, arrays[0].shape))], np.float32),
                {name: float(value) for name, value in metrics.items()},
            )
            for arrays, ((loss, metrics), gradient) in zip(datums, results, strict=True)
        ]


class _Cache:
    """The compiled programs of all losses, the most recently used ones. Thread-safe."""

    def __init__(self) -> None:
        self._programs: OrderedDict[tuple[GraphProgram, Hashable], _Program] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, owner: GraphProgram, key: Hashable) -> _Program | None:
        with self._lock:
            found = self._programs.get((owner, key))
            if found is not None:
                self._programs.move_to_end((owner, key))
            return found

    def put(self, owner: GraphProgram, key: Hashable, program: _Program) -> None:
        with self._lock:
            self._programs[owner, key] = program
            total = sum(each.equations for each in self._programs.values())
            while total > MOST_EQUATIONS and len(self._programs) > 1:
                total -= self._programs.popitem(last=False)[1].equations

    def forget(self, owner: GraphProgram) -> None:
        with self._lock:
            for key in [key for key in self._programs if key[0] is owner]:
                del self._programs[key]


_cache = _Cache()


class GraphProgram:
    """The loss and its gradient by the logprobs, of one datum at a time. Thread-safe; no method waits.

    Args:
        graph: the loss.
        owner: whose turns its compiles take.
        queue: where it is compiled; None is that of the process.
    """

    def __init__(self, graph: Graph, owner: Hashable = None, queue: CompileQueue | None = None) -> None:
        self.graph = graph
        self._owner = owner
        self._queue = queue or compile_queue.shared
        self._patterns: OrderedDict[Pattern, Padded | None] = OrderedDict()
        self._jobs: dict[Hashable, Job] = {}
        self._answers: set[_Answer] = set()
        self._closed = False
        self._refused: bounds.LimitError | None = None
        self._lock = threading.Lock()

    def trace(self) -> Future[None]:
        """Trace the loss for inputs as they most likely are, so that one that is too large is refused early.

        The future fails with a BadRequestError, which names the limit. A loss that cannot be traced for these inputs is
        traced for those of its first batch.
        """
        return self._answer(lambda wait, done: wait([self._guess_job()], lambda _: done(None)))

    def prepare(self, shapes: Iterable[Shapes]) -> Future[Programs]:
        """Compile what a batch needs; cancelling the future ends what nothing else waits for.

        Args:
            shapes: of each datum's arrays, `logprobs` first.

        Returns:
            A future, which fails with a BadRequestError if the loss cannot be computed for them or is too large; the
            message names the node or the limit.
        """
        distinct = list(dict.fromkeys(shapes))
        patterns = {each: padding.pattern_of(each) for each in distinct}

        def start(wait: _Wait, done: Callable[[Programs], None]) -> None:
            if self._refused is not None:
                raise bounds.LimitError(str(self._refused))
            new = list(dict.fromkeys(pattern for pattern, _ in patterns.values()))
            wait([self._pattern_job(pattern) for pattern in new], lambda found: compile_(dict(zip(new, found, strict=True)), wait, done))  # noqa: E501 # fmt: skip

        def compile_(traced: dict[Pattern, Padded | None], wait: _Wait, done: Callable[[Programs], None]) -> None:
            jobs = [self._program_job(each, traced[patterns[each][0]], patterns[each][1]) for each in distinct]
            wait(jobs, lambda found: done(Programs(dict(zip(distinct, found, strict=True)))))

        return self._answer(start)

    def progress(self) -> str | None:
        """Return what a request with this loss waits for, None where it is for no tracing or compiling."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if not job.future.done()]
        if not jobs:
            return None
        begun = next((job for job in jobs if job.began is not None), None)
        if begun is None:
            # Not how many: they may be other owners'.
            return f"loss {self.graph.name} waits for other losses to be compiled"
        return f"{begun.stage} loss {begun.loss} ({begun.shapes})"

    def close(self) -> None:
        """Refuse new work, and end what is under way; programs are forgotten."""
        with self._lock:
            self._closed = True
            answers = list(self._answers)
        for answer in answers:  # at once, also where XLA goes on; the jobs then end, as no one waits for them
            answer.attempt(self._refuse)
        _cache.forget(self)

    def _refuse(self) -> None:
        raise RequestFailedError(
            f"loss {self.graph.name} is not compiled any more: its session was closed, or the server stops. No "
            "gradients were accumulated.",
            category="user",
        )

    def _answer(self, start: Callable[[_Wait, Callable[[Any], None]], None]) -> Future[Any]:
        answer = _Answer(self._release)
        with self._lock:
            self._answers.add(answer)
        answer.future.add_done_callback(lambda _: self._answers.discard(answer))
        answer.attempt(lambda: start(answer.wait, answer.done))
        return answer.future

    def _guess_job(self) -> Job:
        return self._job("guess", f"{TRACED_LENGTH} tokens", "tracing", self._guess)

    def _guess(self, job: Job) -> None:
        ranks = [entry.rank for entry in self.graph.inputs]
        for dtype in ("float32", "int64"):
            shapes = tuple(((TRACED_LENGTH, 2)[:rank], "float32" if i == 0 else dtype) for i, rank in enumerate(ranks))
            try:
                pattern, _ = padding.pattern_of(shapes)
                if self._trace_pattern(pattern, job) is None:
                    self._traced(shapes, job)
                return
            except bounds.LimitError as error:
                self._refused = error
                raise
            except BadRequestError:
                continue

    def _pattern_job(self, pattern: Pattern) -> Job:
        with self._lock:
            known = pattern in self._patterns
            found = self._patterns.get(pattern)
        if known:
            return _finished(found)
        return self._job(pattern, "sequences of any length", "tracing", partial(self._trace_pattern, pattern))

    def _trace_pattern(self, pattern: Pattern, job: Job) -> Padded | None:
        with _host():
            found = padding.trace(self.graph.function(job.check), pattern, self.graph.name)
        with self._lock:
            self._patterns[pattern] = found
            while len(self._patterns) > MOST_PATTERNS:
                self._patterns.popitem(last=False)
        return found

    def _program_job(self, shapes: Shapes, traced: Padded | None, lengths: dict[str, int]) -> Job:
        if traced is not None and min(lengths.values()) >= traced.shortest:
            traced.check(lengths, self.graph.name)
            padded = {name: padding.padded_length(length) for name, length in lengths.items()}
            if traced.fits(padded):
                key: Hashable = traced.pattern, tuple(sorted(padded.items()))
                text = f"up to {max(padded.values()):,} tokens"
                return self._known(key) or self._job(
                    key,
                    text,
                    "compiling",
                    partial(self._compile, key, lambda _: traced.traced(padded), tuple(sorted(padded))),
                )
        text = f"{shapes[0][0][0]:,} tokens"
        make = partial(self._traced, shapes)
        return self._known(shapes) or self._job(shapes, text, "compiling", partial(self._compile, shapes, make, ()))

    def _known(self, key: Hashable) -> Job | None:
        found = _cache.get(self, key)
        return None if found is None else _finished(found)

    def _traced(self, shapes: Shapes, job: Job) -> jax.stages.Traced:
        """Trace the loss with its gradient for exact shapes. Raises BadRequestError as the graph does."""
        with _host():
            specs = [jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for shape, dtype in shapes]
            function = self.graph.function(job.check)
            bounds.check(jax.make_jaxpr(function)(*specs).jaxpr, self.graph.name)
            traced = jax.jit(jax.value_and_grad(function, has_aux=True)).trace(*specs)
            bounds.check(traced.jaxpr.jaxpr, self.graph.name)
            return traced

    def _compile(
        self, key: Hashable, make: Callable[[Job], jax.stages.Traced], lengths: tuple[str, ...], job: Job
    ) -> _Program:
        with _host() as device:
            traced = make(job)
            equations = bounds.check(traced.jaxpr.jaxpr, self.graph.name, padded=bool(lengths))
            job.check()
            options = _CPU_OPTIONS if device.platform == "cpu" else {}
            with process.not_waited_for():
                compiled = traced.lower().compile(compiler_options=options)
            give_back()
        arrays = compiled.in_avals[0][1:] if lengths else compiled.in_avals[0]
        shapes = tuple((tuple(aval.shape), aval.dtype.name) for aval in arrays)
        size = compiled.memory_analysis()
        total = 0 if size is None else size.temp_size_in_bytes + size.output_size_in_bytes
        program = _Program(shapes=shapes, lengths=lengths, compiled=compiled, bytes=total, equations=equations)
        if not self._closed:
            _cache.put(self, key, program)
        return program

    def _job(self, key: Hashable, shapes: str, stage: str, work: Callable[[Job], Any]) -> Job:
        """Return the job of a key that is under way, or a new one; the caller counts as waiting for it."""
        with self._lock:
            if self._closed:
                self._refuse()
            job = self._jobs.get(key)
            new = job is None or job.future.done()
            if job is None or new:
                job = self._jobs[key] = Job(
                    owner=self._owner, loss=self.graph.name, shapes=shapes, stage=stage, work=work
                )
            job.waiting += 1
        if new:
            job.future.add_done_callback(lambda _: self._forget(key, job))
            self._queue.submit(job)
        return job

    def _forget(self, key: Hashable, job: Job) -> None:
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]

    def _release(self, jobs: Sequence[Job]) -> None:
        """Wait no longer for jobs; those that nothing else waits for end."""
        with self._lock:
            for job in jobs:
                job.waiting -= 1
            idle = [job for job in jobs if job.waiting <= 0]
            for key in [key for key, job in self._jobs.items() if job in idle]:
                del self._jobs[key]
        for job in idle:
            job.stop()


_Wait = Callable[[list[Job], Callable[[list[Any]], None]], None]


@dataclass(slots=True, eq=False)
class _Answer:
    """The future of an answer that needs jobs, one set after the other; cancelling it releases them.

    Attributes:
        release: `f(jobs)` is called once the jobs are not waited for any more.
    """

    release: Callable[[Sequence[Job]], None]
    future: Future[Any] = field(default_factory=Future)

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step; what it raises is the answer."""
        try:
            step()
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                self.future.set_exception(error)

    def done(self, value: Any) -> None:
        """Answer, unless the future was cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(value)

    def wait(self, jobs: list[Job], then: Callable[[list[Any]], None]) -> None:
        """Call `then(results)` when all jobs are done."""
        left, lock = [len(jobs)], threading.Lock()

        def one(done: Future[Any]) -> None:
            failed = done.cancelled() or done.exception() is not None
            with lock:
                left[0] -= 1
                last = left[0] == 0
            if failed:
                self.attempt(done.result)
            elif last and not self.future.done():
                self.attempt(lambda: then([job.future.result() for job in jobs]))

        self.future.add_done_callback(lambda _: self.release(jobs))
        for job in jobs:
            job.future.add_done_callback(one)
        if not jobs:
            then([])


def _finished(value: Any) -> Job:
    job = Job(owner=None, loss="", shapes="", stage="", work=lambda _: value)
    job.future.set_result(value)
    return job


def shapes_of(arrays: Sequence[np.ndarray]) -> Shapes:
    """Return what decides which program runs."""
    return tuple((array.shape, array.dtype.name) for array in arrays)


@contextmanager
def _host() -> Iterator[Device]:
    """Compute on the host, with integers and floats of 64 bits, in this thread."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield device
