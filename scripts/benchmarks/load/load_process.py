"""What do the parts of the load test share?

They share servers in processes of their own, readings of a process, health checks, and the report of figures and bars.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load.load_wire import API, KEY, Wire


@dataclass
class Report:
    """The figures beside their bars."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, what: str, value: float, bar: float, *, at_most: bool = True, unit: str = "") -> None:
        met = value <= bar if at_most else value >= bar
        self.rows.append({"part": part, "what": what, "value": value, "bar": bar, "unit": unit, "met": met})
        sign = "<=" if at_most else ">="
        print(f"{part:10} {what:58} {value:12.3f} {unit:7} {sign} {bar:10.3f}  {'' if met else 'MISSED'}", flush=True)


@contextlib.contextmanager
def stand_in(kind: str) -> Iterator[tuple[int, int]]:
    """A server without an engine; yields port and process id."""
    command = [sys.executable, str(Path(__file__).with_name("load_wire.py")), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield int((process.stdout or sys.stdin).readline()), process.pid
    finally:
        process.communicate(timeout=60)


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[tuple[int, int, Path]]:
    """The real server, as the command line starts it; yields port, process id and state directory."""
    with tempfile.TemporaryDirectory() as home:
        serve_it = "import sys; from jax_client.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", serve_it, "--state-dir", home, "serve", "--port", "0", "--api-key", KEY]
        command += ["--dtype", args.dtype, "--model", args.model]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = process.stderr or sys.stdin
        ready = next((line for line in said if line.startswith("ready: ")), None)
        if ready is None:
            raise SystemExit("the server did not start")
        # Its output is read, so that it never waits for a full pipe.
        threading.Thread(target=said.read, daemon=True).start()
        try:
            yield int(ready.split()[1].rsplit(":", 1)[1]), process.pid, Path(home)
        finally:
            process.terminate()
            process.wait(120)


def cpu_seconds(process: int) -> float:
    """Return the time that a process has spent on cores so far."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def rss(process: int) -> int:
    """Return the bytes that a process has in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def connect(port: int) -> Any:
    import tinker

    return tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key=KEY)


def datums(args: argparse.Namespace, source: random.Random, count: int, length: int) -> list[Any]:
    from tinker import types

    found = []
    for _ in range(count):
        tokens = [source.randrange(args.vocabulary) for _ in range(length + 1)]
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
        found.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return found


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


@contextlib.contextmanager
def beside(port: int, looks: list[Callable[[Wire], Awaitable[None]]], seconds: float) -> Iterator[None]:
    """Call each of `looks`, `f(wire)`, over a connection of its own, with a pause of `seconds` between two calls."""
    stop = threading.Event()

    async def repeat(look: Callable[[Wire], Awaitable[None]]) -> None:
        wire = Wire(port)
        while not stop.is_set():
            await look(wire)
            await asyncio.sleep(seconds)
        wire.close()

    async def repeat_all() -> None:
        await asyncio.gather(*map(repeat, looks))

    thread = threading.Thread(target=lambda: asyncio.run(repeat_all()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def health_checks(port: int) -> Iterator[list[float]]:
    """Ask for the health ten times a second; yields the growing list of latencies in seconds."""
    found: list[float] = []

    async def check(wire: Wire) -> None:
        began = time.perf_counter()
        status, _ = await wire.ask(f"{API}/healthz", method="GET")
        found.append(time.perf_counter() - began if status == 200 else float("inf"))

    with beside(port, [check], 0.1):
        yield found
