"""Which programs have been compiled, for which shapes, why, and how long did each take?

A `Program` compiles its function once per signature and appends a record of each compile to its engine's log.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, ParamSpec, TypedDict, TypeVar, cast

import jax
from jax.experimental.compilation_cache import compilation_cache

from jax_client import process
from jax_client.errors import RequestFailedError
from jax_client.host.places import expand, needs_home

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Cause = Literal["first use", "warmup", "background"]
_CACHE_SETTINGS = "EngineConfig.compilation_cache_dir (or XDG_CACHE_HOME)"


class Compiling(TypedDict):
    """A compile that runs now, and for how many seconds it has."""

    program: str
    shapes: str
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Compile:
    log: list[CompileRecord]
    program: str
    shapes: str
    began: float


# Those that run now, of all engines.
_running: set[_Compile] = set()


class Program(Generic[P, R]):
    """A function compiled ahead of time once per signature, with a record of each compile.

    Call it with arrays only; what is static is closed over or given as keywords, which are part of the signature.

    Args:
        out_shardings_of: `f(*args) -> shardings` of the outputs, so that what one call returns can be an argument of
            the next without another compile; None leaves them to the compiler.
        describe: `f(*args) -> text`, the shapes that the record and the log show.
        donate: positions of the arguments whose memory the outputs take over. They are gone even if a run fails.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[P, R],
        log: list[CompileRecord],
        out_shardings_of: Callable[..., object] | None = None,
        describe: Callable[..., str] | None = None,
        donate: tuple[int, ...] = (),
    ):
        self.name = name
        self._fn = fn
        self._out_shardings_of = out_shardings_of
        self._describe = describe
        self._donate = donate
        self._log = log
        self._lock = threading.Lock()
        self._compiled: dict[object, Future[jax.stages.Compiled]] = {}

    def __call__(self, *args: P.args, **static: P.kwargs) -> R:
        """Run the program; compile it first if the arrays' shapes, types or places, or `static`, are new."""
        return self._get(args, static, "first use")(*args)

    def prepare(self, cause: Cause, *args: P.args, **static: P.kwargs) -> R:
        """Compile for arguments given as arrays or as `jax.ShapeDtypeStruct`s with shardings, without running.

        Returns:
            In place of the outputs `jax.ShapeDtypeStruct`s with shardings, to prepare the next program with.
        """
        compiled = self._get(args, static, cause)
        shapes = jax.eval_shape(partial(self._fn, **static), *args)
        struct = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return cast(R, jax.tree.map(struct, shapes, compiled.output_shardings))

    def lower(self, *args: P.args, **static: P.kwargs) -> jax.stages.Lowered:
        """Return the program as XLA gets it, for arguments as those of `prepare`."""
        return self._lowered(args, static)

    def _lowered(self, args: tuple[object, ...], static: dict[str, object]) -> jax.stages.Lowered:
        fn = partial(self._fn, **static)
        fn.__name__ = self.name  # type: ignore[attr-defined]  (profiles and dumps show it)
        jit = partial(jax.jit, fn, donate_argnums=self._donate)
        jitted = jit() if self._out_shardings_of is None else jit(out_shardings=self._out_shardings_of(*args))
        return jitted.lower(*args)

    def _get(self, args: tuple[object, ...], static: dict[str, object], cause: Cause) -> jax.stages.Compiled:
        leaves, treedef = jax.tree.flatten(args)
        key = (treedef, tuple((a.shape, a.dtype, a.sharding) for a in leaves), tuple(sorted(static.items())))
        with self._lock:
            future = self._compiled.get(key)
            mine = future is None
            if future is None:
                future = self._compiled[key] = Future()
        if mine:
            try:
                future.set_result(self._compile(args, static, cause))
            except BaseException as error:
                with self._lock:
                    del self._compiled[key]  # the next call may have the memory that this one lacked
                future.set_exception(error)
        return future.result()

    def _compile(self, args: tuple[object, ...], static: dict[str, object], cause: Cause) -> jax.stages.Compiled:
        if process.ending():
            raise RequestFailedError(f"{self.name} is not compiled any more: the program is ending.")
        start, hits = time.perf_counter(), _cache_hits()
        shapes = [] if self._describe is None else [self._describe(*args)]
        text = ", ".join(shapes + [f"{name}={value}" for name, value in static.items()])
        logger.info("compiling %s (%s): %s", self.name, text, cause)
        running = _Compile(log=self._log, program=self.name, shapes=text, began=time.monotonic())
        _running.add(running)
        try:
            with process.not_waited_for():
                compiled = self._lowered(args, static).compile()
        finally:
            _running.discard(running)
            _return_freed_memory()
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


def _return_freed_memory() -> None:
    """Return freed memory from the C library to the system: compiles leave hundreds of MiB."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def waited_for_s(log: list[CompileRecord]) -> float:
    """Return the seconds that requests have waited for compiles; two at the same time count once."""
    waited = ended = 0.0
    times = [(record.ended_at - record.seconds, record.ended_at) for record in log if record.cause == "first use"]
    for start, end in sorted(times):
        waited += max(0.0, end - max(start, ended))
        ended = max(ended, end)
    return waited


def compiling(log: list[CompileRecord]) -> list[Compiling]:
    """Return the compiles of an engine that run now."""
    now = time.monotonic()
    return [
        {"program": each.program, "shapes": each.shapes, "seconds": round(now - each.began, 3)}
        for each in sorted(_running.copy(), key=lambda each: each.began)
        if each.log is log
    ]


def enable_compilation_cache(directory: str | os.PathLike[str] | None) -> None:
    """Keep compiled programs in `directory` between processes; it is made readable for its owner only.

    Write access to the directory is the right to run code in this process, hence the mode. Where the directory is
    another user's, cannot be written or is None, a warning says so once, and jax's own setting stays as it is.
    """
    if directory is None:
        why = needs_home("compiled programs", _CACHE_SETTINGS)
        _warn_once(f"{why} Until then every start compiles.")
        return
    path = expand(directory, "EngineConfig.compilation_cache_dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _warn_once(
            f"compiled programs cannot be kept in {path} ({error}): every start compiles. Set {_CACHE_SETTINGS} to a "
            "directory that belongs to this user."
        )
        return
    if jax.config.jax_compilation_cache_dir != str(path):  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # jax would keep the directory that it used first
    # Everything: a second start should compile nothing at all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


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
