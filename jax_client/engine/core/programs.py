"""Which programs have been compiled, for which shapes, why, and how long did each take?

A `Program` compiles its function once per signature and appends a record of each compile to its engine's log. Compiles
on several threads run side by side; those in the background wait for as long as a request waits for another one. A task
of the dispatch thread has what it needs compiled elsewhere (`begin`), and yields the future of that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypedDict, TypeVar, cast

import jax

from jax_client import process
from jax_client.errors import RequestFailedError
from jax_client.host.memory import give_back
from jax_client.threads import Workers

logger = logging.getLogger(__name__)

# What compiles in the background waits at least this long: the request that made it likely has a first use itself.
PAUSE_S = 0.5

P = ParamSpec("P")
R = TypeVar("R")


class OtherHosts(Protocol):
    """Has the other hosts of a mesh do what this one does with an engine's programs."""

    def call(self, program: str, run: Callable[..., R], args: tuple[object, ...], static: Mapping[str, object]) -> R:
        """Run a compiled program on all hosts; return what it returns here."""
        ...

    def compile(self, program: str, args: tuple[object, ...], static: Mapping[str, object]) -> Callable[[], None]:
        """Begin to compile a program on the others; return a function that waits for that, and raises if it fails."""
        ...


Cause = Literal["first use", "warmup", "background"]
# Which requests run a program.
Kind = Literal["sample", "train"]


class Compiling(TypedDict):
    """A compile that runs now, for which kind of requests, why, and for how many seconds it has."""

    program: str
    shapes: str
    kind: Kind
    cause: Cause
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileRecord:
    """One compile.

    Attributes:
        program, shapes: what was compiled, and the shapes that were new to it.
        seconds: of tracing and compiling, wall time.
        cause: "first use" made a request wait; "warmup" was asked for; "background" ran beside other work.
        cached: whether the program came from the compilation cache, so that nothing was compiled.
        bytes: temporaries and outputs that a run allocates on each device, as the compiler counts them.
        ended_at: when it was there, unix seconds.
    """

    program: str
    shapes: str
    seconds: float
    cause: Cause
    cached: bool
    bytes: int
    ended_at: float


@dataclass(kw_only=True, slots=True, eq=False)
class _Compile:
    log: list[CompileRecord]
    program: str
    shapes: str
    kind: Kind
    cause: Cause
    began: float


@dataclass(slots=True, eq=False)
class _Entry:
    """A program of one signature: compiled, or being compiled; `cause` is "first use" once a request waits for it."""

    cause: Cause
    future: Future[jax.stages.Compiled] = field(default_factory=Future)
    running: _Compile | None = None


# Those that run now, of all engines: they share the host's cores.
_running: set[_Compile] = set()
_changed = threading.Condition()  # guards `_running` and what is said there, and `_Entry.cause`


class Program(Generic[P, R]):
    """A function compiled ahead of time once per signature, with a record of each compile.

    Call it with arrays only; what is static is closed over or given as keywords, which are part of the signature.

    Args:
        out_shardings_of: `f(*args) -> shardings` of the outputs, so that what one call returns can be an argument of
            the next without another compile; None leaves them to the compiler.
        describe: `f(*args) -> text`, the shapes that the record and the log show.
        donate: positions of the arguments whose memory the outputs take over. They are gone even if a run fails.
        kind: of the requests that run it.
        model: text that tells the programs of one model on one mesh from those of others, for `is_cached`.
        options: of XLA's compiler, by name.

    Attributes:
        others: the other hosts of the mesh, which run the program too; None where there are none, and on these.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[P, R],
        log: list[CompileRecord],
        out_shardings_of: Callable[..., object] | None = None,
        describe: Callable[..., str] | None = None,
        donate: tuple[int, ...] = (),
        *,
        kind: Kind = "train",
        model: str = "",
        options: Mapping[str, str | bool] = MappingProxyType({}),
    ):
        self.name = name
        self.others: OtherHosts | None = None
        self.options: dict[str, str | bool] = dict(options)
        self._fn = fn
        self._out_shardings_of = out_shardings_of
        self._describe = describe
        self._donate = donate
        self._kind: Kind = kind
        self._model = model
        self._log = log
        self._lock = threading.Lock()
        self._compiled: dict[object, _Entry] = {}

    @staticmethod
    def model_text(model: object, dtype: object, mesh: jax.sharding.Mesh, attention: object) -> str:
        """Return the text that tells the programs of a model on a mesh from those of others."""
        kernel = getattr(attention, "name", "")
        return f"{model!r} {dtype} {dict(mesh.shape)} {mesh.devices.flat[0].device_kind} {kernel}"

    def __call__(self, *args: P.args, **static: P.kwargs) -> R:
        """Run the program; compile it first if the arrays' shapes, types or places, or `static`, are new."""
        compiled = self._get(args, static, "first use")
        return compiled(*args) if self.others is None else self.others.call(self.name, compiled, args, static)

    def prepare(self, cause: Cause, *args: P.args, **static: P.kwargs) -> R:
        """Compile for arguments given as arrays or as `jax.ShapeDtypeStruct`s with shardings, without running.

        Returns:
            In place of the outputs `jax.ShapeDtypeStruct`s with shardings, to prepare the next program with.
        """
        compiled = self._get(args, static, cause)
        struct = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return cast(R, jax.tree.map(struct, self.shapes(*args, **static), compiled.output_shardings))

    def compile(self, cause: Cause, *args: P.args, **static: P.kwargs) -> None:
        """Compile for arguments as those of `prepare`, and wait for that."""
        self._get(args, static, cause)

    def begin(self, workers: Workers, cause: Cause, *args: P.args, **static: P.kwargs) -> Future[jax.stages.Compiled]:
        """Compile for arguments as those of `prepare` on a thread of `workers`, unless that was begun before.

        Returns:
            A future that is done when a call waits for nothing any more, or could not be compiled; what fails is tried
            again by the next call.
        """
        key = _signature(args, static)
        entry, new = self._entry(key, cause)
        if new:
            try:
                job = workers.submit(self._fill, key, entry, jax.tree.map(_shape, args), static)
            except BaseException as error:
                self._fail(key, entry, error)
            else:
                dropped = RequestFailedError(f"{self.name} is not compiled any more: the engine was closed.")
                job.add_done_callback(lambda job: self._fail(key, entry, dropped) if job.cancelled() else None)
        return entry.future

    def shapes(self, *args: P.args, **static: P.kwargs) -> R:
        """Return `jax.ShapeDtypeStruct`s in place of the outputs, without places; nothing is compiled."""
        return cast(R, jax.eval_shape(partial(self._fn, **static), *args))

    def is_compiled(self, *args: P.args, **static: P.kwargs) -> bool:
        """Return whether a call with such arguments, as those of `prepare`, waits for nothing."""
        with self._lock:
            entry = self._compiled.get(_signature(args, static))
        return entry is not None and entry.future.done() and entry.future.exception() is None

    def is_cached(self, *args: P.args, **static: P.kwargs) -> bool:
        """Return whether this program was compiled into the compilation cache before, so that it is there soon."""
        note = self._note(_signature(args, static))
        return note is not None and note.exists()

    def lower(self, *args: P.args, **static: P.kwargs) -> jax.stages.Lowered:
        """Return the program as XLA gets it, for arguments as those of `prepare`."""
        return self._lowered(args, static)

    def _lowered(self, args: tuple[object, ...], static: dict[str, object]) -> jax.stages.Lowered:
        fn = partial(self._fn, **static)
        fn.__name__ = self.name  # type: ignore[attr-defined]  (profiles and dumps show it)
        jit = partial(jax.jit, fn, donate_argnums=self._donate)
        jitted = jit() if self._out_shardings_of is None else jit(out_shardings=self._out_shardings_of(*args))
        with _without_frames(args):
            return jitted.lower(*args)

    def _get(self, args: tuple[object, ...], static: dict[str, object], cause: Cause) -> jax.stages.Compiled:
        key = _signature(args, static)
        entry, mine = self._entry(key, cause)
        if mine:
            self._fill(key, entry, args, static)
        try:
            return entry.future.result()
        finally:
            del entry  # else an error has this frame, this frame its future, and both the call's arrays

    def _entry(self, key: object, cause: Cause) -> tuple[_Entry, bool]:
        """Return the entry of a signature, and whether it is new, for the caller to fill."""
        with self._lock:
            entry = self._compiled.get(key)
            if entry is None:
                entry = self._compiled[key] = _Entry(cause)
                return entry, True
        if cause == "first use" and not entry.future.done():
            with _changed:
                entry.cause = cause
                if entry.running is not None:
                    entry.running.cause = cause
                _changed.notify_all()
        return entry, False

    def _fill(self, key: object, entry: _Entry, args: tuple[object, ...], static: dict[str, object]) -> None:
        try:
            _yield_to_first_use(entry)
            if process.ending():
                raise RequestFailedError(f"{self.name} is not compiled any more: the program is ending.")
            compiled = self._compile(args, static, entry)
        except BaseException as error:
            self._fail(key, entry, error)
            del entry  # as in `_get`
        else:
            entry.future.set_result(compiled)
            self._write_note(key)

    def _fail(self, key: object, entry: _Entry, error: BaseException) -> None:
        with self._lock:
            del self._compiled[key]  # the next call may have the memory that this one lacked
        entry.future.set_exception(error)

    def _note(self, key: object) -> Path | None:
        """Return the empty file that says that a program is in the compilation cache; None without one on a disk."""
        directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not directory or "://" in directory:
            return None
        text = "\n".join([jax.__version__, self._model, self.name, str(key)])
        return Path(directory) / "compiled" / hashlib.sha256(text.encode()).hexdigest()

    def _write_note(self, key: object) -> None:
        if (note := self._note(key)) is not None:
            with contextlib.suppress(OSError):  # as for the cache itself: the next start only takes longer
                note.parent.mkdir(mode=0o700, exist_ok=True)
                note.touch()

    def _compile(self, args: tuple[object, ...], static: dict[str, object], entry: _Entry) -> jax.stages.Compiled:
        start, hits = time.perf_counter(), _cache_hits()
        shapes = [] if self._describe is None else [self._describe(*args)]
        shown = [f"{name}={value}" for name, value in static.items() if isinstance(value, str | None)]
        text = ", ".join(shapes + shown)
        cause = entry.cause
        logger.info("compiling %s (%s): %s", self.name, text, cause)
        running = _Compile(
            log=self._log, program=self.name, shapes=text, kind=self._kind, cause=cause, began=time.monotonic()
        )
        with _runs(running, entry), process.not_waited_for():
            del entry  # as in `_get`
            wait = None if self.others is None else self.others.compile(self.name, args, static)
            compiled = self._lowered(args, static).compile(self.options)
            if wait is not None:
                wait()
        cached, seconds = _cache_hits() > hits, time.perf_counter() - start
        size = compiled.memory_analysis()
        record = CompileRecord(
            program=self.name,
            shapes=text,
            seconds=round(seconds, 3),
            cause=cause,
            cached=cached,
            bytes=0 if size is None else size.temp_size_in_bytes + size.output_size_in_bytes,
            ended_at=time.time(),
        )
        self._log.append(record)
        logger.info("%s %s (%s) in %.1f s", "loaded" if cached else "compiled", self.name, text, seconds)
        return compiled


AnyProgram = Program[..., Any]


def _without_frames(args: object) -> contextlib.AbstractContextManager[object]:
    """Within it, programs for an accelerator carry no frames of the Python stack.

    With them XLA's compiler for TPUs (libtpu 0.0.42) did not end: inlining a decode program with a kernel, it went
    round in the frames for ever. A CPU's programs keep them.
    """
    platforms = {device.platform for a in jax.tree.leaves(args) if a.sharding for device in a.sharding.device_set}
    try:
        from jax._src import config

        return contextlib.nullcontext() if "cpu" in platforms else config.traceback_in_locations_limit(0)
    except (ImportError, AttributeError):  # a newer jax has it elsewhere, and a newer compiler
        return contextlib.nullcontext()


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    """Return an argument without its memory, which would be kept until the compile ends."""
    place = array.sharding if getattr(array, "committed", True) else None
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def _signature(args: tuple[object, ...], static: dict[str, object]) -> object:
    leaves, treedef = jax.tree.flatten(args)
    return treedef, tuple((a.shape, a.dtype, a.sharding) for a in leaves), tuple(sorted(static.items()))


def _yield_to_first_use(entry: _Entry) -> None:
    """Hold a compile in the background back for as long as requests wait for others, unless one waits for this one."""
    start = time.monotonic()
    with _changed:
        while entry.cause == "background" and not process.ending():
            if not _awaited() and time.monotonic() > start + PAUSE_S:
                break
            _changed.wait(PAUSE_S)


def _awaited() -> bool:
    return any(each.cause == "first use" for each in _running)


@contextlib.contextmanager
def _runs(running: _Compile, entry: _Entry) -> Iterator[None]:
    with _changed:
        entry.running = running
        _running.add(running)
    try:
        yield
    finally:
        with _changed:
            _running.discard(running)
            _changed.notify_all()
        give_back()


def compiling(log: list[CompileRecord]) -> list[Compiling]:
    """Return the compiles of an engine that run now, those that requests wait for first."""
    now = time.monotonic()
    return [
        {
            "program": each.program,
            "shapes": each.shapes,
            "kind": each.kind,
            "cause": each.cause,
            "seconds": round(now - each.began, 3),
        }
        for each in sorted(_running.copy(), key=lambda each: (each.cause == "background", each.began))
        if each.log is log
    ]


def shardings_of(tree: object) -> Any:
    """Return the tree of the shardings of a tree of arrays."""
    return jax.tree.map(lambda a: a.sharding, tree)


# Compiles run on several threads, and jax reports a hit on the thread that compiles.
_thread = threading.local()


def _cache_hits() -> int:
    return getattr(_thread, "hits", 0)


def _count_cache_hit(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _thread.hits = _cache_hits() + 1


jax.monitoring.register_event_listener(_count_cache_hit)
