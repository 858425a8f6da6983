"""Which programs have been compiled, for which shapes, and how long did each take?"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileRecord:
    """One compile: the program, the shapes that were new to it, and wall seconds of tracing and compiling."""

    program: str
    shapes: str
    seconds: float


class Program:
    """A function compiled ahead of time once per signature, with a record of each compile.

    Call it with arrays only; what is static is closed over or given as keywords, which are part of the signature.

    Args:
        place: from the arguments to the shardings of the outputs, so that what one call returns can be an argument of
            the next without another compile; None leaves them to the compiler.
        label: from the arguments to the shape that the record and the log show.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        log: list[CompileRecord],
        place: Callable[..., Any] | None = None,
        label: Callable[..., str] | None = None,
    ):
        self.name = name
        self._fn = fn
        self._place = place
        self._label = label
        self._log = log
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Run the program; compile it first if the arrays' shapes, types or places, or `static`, are new."""
        leaves, treedef = jax.tree.flatten(args)
        key = (treedef, tuple((a.shape, a.dtype, a.sharding) for a in leaves), tuple(sorted(static.items())))
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(args, static)
        return compiled(*args)

    def _compile(self, args: Any, static: dict[str, Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        shapes = [] if self._label is None else [self._label(*args)]
        text = ", ".join(shapes + [f"{name}={value}" for name, value in static.items()])
        logger.info("compiling %s (%s), first time for this shape", self.name, text)
        outputs = {} if self._place is None else {"out_shardings": self._place(*args)}
        fn = partial(self._fn, **static)
        fn.__name__ = self.name  # type: ignore[attr-defined]  (profiles and dumps show it)
        compiled = jax.jit(fn, **outputs).lower(*args).compile()
        seconds = time.perf_counter() - start
        self._log.append(CompileRecord(program=self.name, shapes=text, seconds=round(seconds, 3)))
        logger.info("compiled %s (%s) in %.1f s", self.name, text, seconds)
        return compiled


def enable_compilation_cache(directory: str | os.PathLike[str]) -> None:
    """Keep compiled programs in `directory` between processes; it is made readable for its owner only.

    Whoever can write there can run code in this process, hence the mode.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def same_place(tree: Any) -> Any:
    """Return the shardings of a tree of arrays."""
    return jax.tree.map(lambda a: a.sharding, tree)
