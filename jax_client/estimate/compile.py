"""What does XLA's compiler say of the estimated programs? A child process compiles them, for devices that are not here.

Its environment keeps jax from looking for devices, and libtpu from asking the machine which TPU it has.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from jax_client.engine.sample import loop
from jax_client.errors import RequestFailedError
from jax_client.estimate import compiler
from jax_client.estimate.plan import Estimate
from jax_client.estimate.topologies import topology_of

PROGRAMS = ("forward", "backward", "optim_step", "decode", "prefill")
# By the platform of a topology: the package that has the compiler, and how it is installed.
COMPILERS = {
    "tpu": ("libtpu", "pip install 'jax_client[aot]' (libtpu, 200 MB; it runs on any x86 Linux)"),
    "cuda": ("jax_plugins.xla_cuda13", "pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin, in jaxlib's version"),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What libtpu would else ask the machine for, loudly.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def compile_programs(found: Estimate, programs: tuple[str, ...] = PROGRAMS) -> Iterator[dict[str, Any]]:
    """Yield each program's account as it is compiled: what `compiler` prints, and the `estimated` temporaries.

    Raises:
        UnsupportedError: no compiler knows the machine.
        RequestFailedError: the compiler is not installed, or its process died.
    """
    topology = topology_of(found.question.machine)
    package, install = COMPILERS[topology["platform"]]
    if not _is_there(package):
        raise RequestFailedError(f"--compile needs {package}, which is not installed. Run: {install}.", category="user")
    estimated = temporaries(found)
    text = json.dumps(question(found, topology, programs))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", compiler.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | ENVIRONMENT,
            text=True,
        )
        try:
            yield from _accounts(child, text, estimated)
        finally:
            child.kill()
            code = child.wait()
            if child.stdout is not None:
                child.stdout.close()
        if code:
            log.seek(0)
            said = log.read().strip().splitlines()[-1:] or [f"exit code {code}"]
            raise RequestFailedError(f"--compile: the compiler's process failed: {said[0]}.", category="server")


def _accounts(child: subprocess.Popen[str], text: str, estimated: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield what the child prints, until it has ended."""
    if child.stdin is None or child.stdout is None:
        return
    child.stdin.write(text)
    child.stdin.close()
    for line in child.stdout:
        if line.startswith(compiler.MARK):
            account = json.loads(line.removeprefix(compiler.MARK))
            yield account | {"estimated": estimated.get(account["program"])}
    child.wait()


def temporaries(found: Estimate) -> dict[str, int]:
    """Return the bytes that the programs have beside their arguments and results, by program, as estimated."""
    q, layout = found.question, found.layout
    estimated = {}
    if (training := found.training) is not None:
        tokens = training.largest.rows * training.largest.length // layout.limits.ways
        passes = layout.passes
        if q.machine.chip.platform == "gpu":  # cuDNN's attention is not compiled without its library
            passes = replace(passes, attention="blockwise")
        estimated |= passes.temporaries(training.remat, tokens, q.spec)
    if found.sampling is not None:
        estimated["decode"] = found.sampling.temporaries
    return estimated


def question(found: Estimate, topology: dict[str, Any], programs: tuple[str, ...]) -> dict[str, Any]:
    """Return what `compiler` is asked."""
    q, training, sampling = found.question, found.training, found.sampling
    if training is None or sampling is None:
        raise RequestFailedError("--compile: the weights do not fit, so there is nothing to compile.", category="user")
    return {
        "topology": topology,
        "mesh": {axis: size for axis, size in found.layout.mesh.shape.items() if size > 1},
        "model": asdict(q.model),
        "dtype": q.dtype,
        "adapter": asdict(q.spec),
        "programs": programs,
        "rows": training.largest.rows,
        "length": training.largest.length,
        "remat": training.remat,
        "whole": sampling.whole > 0,
        "sample": (
            sampling.slots,
            loop.sizes_on(q.machine.chip.platform).tiles[-1],
            found.layout.pages + 2,
            found.layout.cache.states,
        ),
    }


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False
