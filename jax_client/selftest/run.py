"""Which checks does the self-test have, and how does one process run them? `main` prints each row as it is known.

`jax_client doctor --selftest` starts this module as a child, because a device can end a process or stop it for good:
the line {"begins": NAME} before each group of checks says with which one it did.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata as metadata
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_client.engine.core.attention_check import cudnn_version
from jax_client.engine.core.matmul_benchmark import faster_matmul_dtype
from jax_client.engine.engine import Engine
from jax_client.selftest import goldens, kernels, meshes, rates, toy
from jax_client.selftest.outcome import DType, Outcome, open_engine, outcome, sampled
from jax_client.selftest.reference import Gradients
from jax_client.selftest.row import Row
from jax_client.sharding import make_mesh
from jax_client.weights.read.source import ModelSource

DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


class SelfTest:
    """The checks, on all local devices.

    Args:
        directory: where toys are written; it must exist.
        devices: None takes all local ones.
    """

    def __init__(self, directory: Path, devices: list[Any] | None = None):
        self.devices = jax.local_devices() if devices is None else devices
        self._directory = directory
        self._tensors = toy.Toy().tensors()
        self._source = _written(toy.Toy(), directory / "toy")
        self._engines: dict[DType, Engine] = {}
        self._alone: dict[DType, Outcome] = {}
        self._expected: tuple[list[np.ndarray], Gradients] | None = None

    def groups(self) -> dict[str, Callable[[], Iterable[Row]]]:
        """Return the groups of checks by name, in the order in which they should run."""
        one, found = self.devices[:1], dict[str, Callable[[], Iterable[Row]]]()
        found["attention kernels"] = lambda: kernels.training_rows(make_mesh("auto", one))
        found["paged attention"] = lambda: kernels.sampling_rows(make_mesh("auto", one))
        for dtype in DTYPES:
            found[f"{dtype} on one device"] = functools.partial(self.one_device, dtype)
        if len(self.devices) == 1:
            row = Row(check="mesh", verdict="SKIP", meaning="there is one device, and a mesh needs several")
            found["mesh"] = lambda: [row]
        else:
            if self.devices[0].platform != "cpu":  # kernels that only these platforms split
                every = make_mesh("auto", self.devices)
                found["attention kernels on all devices"] = lambda: kernels.training_rows(every)
            for mesh in meshes.meshes_of(len(self.devices)):
                found[meshes.name_of(mesh)] = functools.partial(self.mesh, mesh)
        found["rates of the device"] = self.device_rates
        found["speed"] = self.speed
        return found

    def one_device(self, dtype: DType, sampling: bool = True) -> Iterator[Row]:
        """Compare an engine on one device with the reference."""
        engine = self._engine(dtype)
        found = outcome(engine, dtype)
        if self._expected is None:
            self._expected = goldens.expected(found.model, self._tensors)
        yield from goldens.training_rows(found, self._expected)
        if sampling:
            found = replace(found, samples=sampled(engine))
            yield from goldens.sampling_rows(found, self._tensors)
        self._alone[dtype] = found

    def mesh(self, axes: dict[str, int]) -> Iterator[Row]:
        """Compare all devices with one: in float32, and in bfloat16 too where that has kernels of its own."""
        for dtype in DTYPES[: 1 if self.devices[0].platform == "cpu" else 2]:
            if (one := self._alone.get(dtype)) is None:
                meaning = f"one device gave nothing in {dtype} to compare it with"
                yield Row(check=f"{meshes.name_of(axes)} in {dtype}", verdict="SKIP", meaning=meaning)
                continue
            engine = open_engine(self._source, dtype, self.devices, axes)
            try:
                found = outcome(engine, dtype)
                yield from meshes.training_rows(found, axes, one)
                yield meshes.sampling_row(replace(found, samples=sampled(engine)), axes, one)
            finally:
                engine.close()

    def device_rates(self) -> Iterator[Row]:
        """Time matmuls and copies."""
        yield from rates.matmul_rows(self.devices, rates.peak_of(self.devices[0]))
        yield rates.copy_row(self.devices[0])

    def speed(self) -> Iterator[Row]:
        """Time training and sampling on one device, in the type that an engine would choose."""
        device = self.devices[0]
        dtype: DType = "bfloat16" if faster_matmul_dtype(device).name == "bfloat16" else "float32"
        if device.platform == "cpu":  # whose programs are there
            yield rates.training_row(self._engine(dtype), toy.SPEC, toy.LENGTHS)
            yield rates.decode_row(self._engine(dtype))
            return
        engine = open_engine(_written(rates.LARGE, self._directory / "large"), dtype, self.devices[:1])
        try:
            yield rates.training_row(engine, rates.SPEC, (2048,) * 8)
            yield rates.decode_row(engine)
        finally:
            engine.close()

    def close(self) -> None:
        """Close the engines."""
        for engine in self._engines.values():
            engine.close()

    def _engine(self, dtype: DType) -> Engine:
        if dtype not in self._engines:
            self._engines[dtype] = open_engine(self._source, dtype, self.devices[:1])
        return self._engines[dtype]


def _written(model: toy.Toy, directory: Path) -> ModelSource:
    return ModelSource(name=directory.name, path=model.write(directory), kind="hf", by_path=True)


def run(groups: dict[str, Callable[[], Iterable[Row]]], begins: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of all groups; one that raises gives a row that fails, and the next begins.

    Args:
        groups: by name.
        begins: called with the name of each group before it runs.
    """
    for name, group in groups.items():
        begins(name)
        try:
            yield from group()
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            meaning = f"this part of the package does not run on these devices: {type(error).__name__}: {text[:600]}"
            yield Row(check=name, verdict="FAIL", measured="it raised", meaning=meaning)


def environment(devices: list[Any]) -> dict[str, object]:
    """Return which devices and versions these are."""
    names = ("jax_client", "jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    installed = {name: _version(name) for name in names}
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "python": platform.python_version(),
        "versions": {name: version for name, version in installed.items() if version},
        "cudnn": cudnn_version() if devices[0].platform == "gpu" else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Run the self-test; print one JSON object a line: the environment, group begins, rows, and the end."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    start = time.monotonic()

    def say(**line: object) -> None:
        print(json.dumps(line, default=str), flush=True)

    with tempfile.TemporaryDirectory(prefix="jax_client-selftest-") as directory:
        test = SelfTest(Path(directory))
        say(environment=environment(test.devices))
        for row in run(test.groups(), lambda name: say(begins=name)):
            say(row=asdict(row))
        test.close()
    say(seconds=round(time.monotonic() - start, 1))


if __name__ == "__main__":
    main()
