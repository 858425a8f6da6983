"""How is an uploaded loss run? On the host's CPU, compiled once for each combination of shapes.

A loss is a handful of elementwise operations on one sequence's logprobs, which come from the host and return to it.
Each new length needs a program of its own, which takes longer to compile than to run, and longest for an accelerator. A
CPU also has torch's int64 and, for a loss that asks for it, float64. Where jax has no CPU backend, the program runs on
jax's default device.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np

from jax_client import process
from jax_client.sharding import Device
from jax_client.threads import Workers
from jax_client.torch_graph.graph import Graph

# Programs kept per loss. One that is needed again after this number of others is compiled again.
MOST_PROGRAMS = 512
WORKERS = 8
# These programs run once or a few times: time spent on making them faster is lost.
_CPU_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}

T = TypeVar("T")
Shapes = tuple[tuple[tuple[int, ...], str], ...]


class GraphProgram:
    """The loss and its gradient by the logprobs, of one datum at a time. Thread-safe.

    Args:
        graph: the loss.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._traced: OrderedDict[Shapes, jax.stages.Traced] = OrderedDict()
        self._compiled: OrderedDict[Shapes, jax.stages.Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, shapes: Shapes) -> None:
        """Evaluate the loss abstractly for these shapes and dtypes, `logprobs` first; nothing is computed.

        Raises:
            BadRequestError: the loss cannot be computed for them; the message names the node.
        """
        with self._lock:
            known = shapes in self._traced or shapes in self._compiled
        if not known:
            with _host():
                specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
                traced = jax.jit(jax.value_and_grad(self.graph.function(), has_aux=True)).trace(*specs)
            self._keep(self._traced, shapes, traced)

    def evaluate(self, datums: Sequence[Sequence[np.ndarray]]) -> list[tuple[float, np.ndarray, dict[str, float]]]:
        """Return of each datum the loss, its gradient by the logprobs, and the metrics.

        Args:
            datums: of each `logprobs`, float32, then the other inputs.

        Raises:
            BadRequestError: as `check`.
        """
        keys = [shapes_of(arrays) for arrays in datums]
        distinct = list(dict.fromkeys(keys))
        # Compiling leaves the interpreter free, so several lengths take the time of one where there are cores.
        with Workers("jax_client-loss", min(WORKERS, os.cpu_count() or 1)) as pool:
            programs = dict(zip(distinct, pool.map(self._program, distinct), strict=True))
        with _host():
            # All are launched before the first is waited for.
            results = jax.device_get([programs[key](*arrays) for key, arrays in zip(keys, datums, strict=True)])
        return [
            (float(loss), np.asarray(gradient, np.float32), {name: float(value) for name, value in metrics.items()})
            for (loss, metrics), gradient in results
        ]

    def _program(self, shapes: Shapes) -> jax.stages.Compiled:
        with self._lock:
            known = self._compiled.get(shapes)
            if known is not None:
                self._compiled.move_to_end(shapes)
                return known
        self.check(shapes)
        with self._lock:
            traced = self._traced.pop(shapes, None)
        if traced is None:  # another thread has just taken it, or it was the oldest
            return self._program(shapes)
        with _host() as device:
            options = _CPU_OPTIONS if device.platform == "cpu" else {}
            with process.not_waited_for():
                compiled = traced.lower().compile(compiler_options=options)
        self._keep(self._compiled, shapes, compiled)
        return compiled

    def _keep(self, table: OrderedDict[Shapes, T], shapes: Shapes, value: T) -> None:
        with self._lock:
            table[shapes] = value
            while len(table) > MOST_PROGRAMS:
                table.popitem(last=False)


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
