"""What does the server stand: many samples, many clients, slow clients, a full queue; and what does HTTP itself cost?

Run it on idle cores. The server has a process of its own, the load comes from this one. Each figure is printed beside
its bar; the exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench_rows import machine
from jax_client.metrics.store import FILE_NAME
from load_wire import API, KEY, Wire, sample_body, serve

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHUNK_BYTES, CHUNKS, SLOW_BYTES_PER_S = 5_000_000, 20, 10_000


@dataclass
class Report:
    """The figures beside their bars."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, what: str, value: float, bar: float, *, at_most: bool = True, unit: str = "") -> None:
        met = value <= bar if at_most else value >= bar
        self.rows.append({"part": part, "what": what, "value": value, "bar": bar, "unit": unit, "met": met})
        sign = "<=" if at_most else ">="
        print(f"{part:10} {what:58} {value:12.3f} {unit:7} {sign} {bar:10.3f}  {'' if met else 'MISSED'}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", default=MODEL, help="what the server trains and samples")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--vocabulary", type=int, default=49_000, help="token ids are below it")
    parser.add_argument(
        "--length", type=int, default=64, help="tokens of a sequence of the parts clients, slow and watched"
    )
    parser.add_argument("--pairs", type=int, default=20_000, help="asample + retrieve pairs of the part pairs")
    parser.add_argument("--connections", type=int, default=64, help="of the part pairs")
    parser.add_argument("--batch", type=int, nargs=2, default=(64, 512), help="sequences and tokens of the part passes")
    parser.add_argument("--passes", type=int, default=3, help="forward_backward calls of the part passes")
    parser.add_argument("--samples", type=int, default=500, help="concurrent samples of the part samples")
    parser.add_argument("--p99", type=float, default=120.0, help="bar of the part samples, s")
    parser.add_argument("--clients", type=int, default=8, help="of the part clients")
    parser.add_argument("--steps", type=int, default=12, help="of each client of the part clients")
    parser.add_argument("--slow-seconds", type=float, default=30.0, help="how long the slow clients send")
    parser.add_argument("--rounds", type=int, default=25, help="of the part watched, 12 steps each")
    parser.add_argument("--flood", type=int, default=10_000, help="requests that fill the queue")
    parser.add_argument("--json", type=Path, help="write conditions and every figure")
    parser.add_argument("--child", choices=("instant", "held"), help=argparse.SUPPRESS)
    return parser.parse_args()


@contextlib.contextmanager
def stand_in(kind: str) -> Iterator[tuple[int, int]]:
    """A server without an engine; yields port and process id."""
    command = [sys.executable, str(Path(__file__)), "--child", kind]
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
        # Read on, so that it never waits for a full pipe.
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
    """Let each of `looks` ask over a connection of its own, again and again with a pause of so many seconds."""
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
    """Ask for the health ten times a second; yields the list that the latencies come into."""
    found: list[float] = []

    async def check(wire: Wire) -> None:
        began = time.perf_counter()
        status, _ = await wire.ask(f"{API}/healthz", method="GET")
        found.append(time.perf_counter() - began if status == 200 else float("inf"))

    with beside(port, [check], 0.1):
        yield found


async def _pairs(port: int, pairs: int, connections: int) -> tuple[float, list[float]]:
    first = Wire(port)
    sampler_id = await first.sampler("none")
    numbers = itertools.count()
    tokens, latencies = list(range(64)), []

    async def work(until: int) -> None:
        wire = Wire(port)
        while (number := next(numbers)) < until:
            began = time.perf_counter()
            status, answer = await wire.ask(f"{API}/asample", sample_body(sampler_id, number, tokens))
            if status != 200:
                raise RuntimeError(answer)
            asked = json.dumps({"request_id": json.loads(answer)["request_id"], "allow_metadata_only": True}).encode()
            status, answer = await wire.ask(f"{API}/retrieve_future", asked)
            if status != 200 or b"error" in answer:
                raise RuntimeError(answer)
            latencies.append(time.perf_counter() - began)
        wire.close()

    await work(200)
    latencies.clear()
    began = time.perf_counter()
    await asyncio.gather(*(work(200 + pairs) for _ in range(connections)))
    first.close()
    return len(latencies) / (time.perf_counter() - began), latencies


def pairs(args: argparse.Namespace, report: Report) -> None:
    """Pairs of asample and retrieve_future per second, with an engine that answers at once."""
    with stand_in("instant") as (port, process):
        before = cpu_seconds(process)
        rate, latencies = asyncio.run(_pairs(port, args.pairs, args.connections))
        each = 1e6 * (cpu_seconds(process) - before) / len(latencies)
    report.add("pairs", "asample + retrieve pairs", rate, 1_000, at_most=False, unit="/s")
    median, slowest = 1e3 * statistics.median(latencies), 1e3 * percentile(latencies, 0.99)
    print(f"{'':10} of a pair: median {median:.1f} ms, p99 {slowest:.1f} ms, {each:.0f} us of the server's cores")


def engine_seconds(port: int) -> float:
    """Return what the engines say they have spent on training so far: on the host, on the device, in their queue."""
    status, answer = asyncio.run(Wire(port).ask(f"{API}/metrics/engines", method="GET"))
    if status != 200:
        raise RuntimeError(answer)

    def sums(value: Any) -> float:
        if isinstance(value, list):
            return sum(map(sums, value))
        if not isinstance(value, dict):
            return 0.0
        if "device_seconds" in value:
            return sum(value[f"{part}_seconds"] for part in ("host", "device", "compile", "queue"))
        return sum(map(sums, value.values()))

    return sums(json.loads(answer))


def passes(args: argparse.Namespace, report: Report) -> None:
    """The share of a forward_backward that is spent outside of the engine."""
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.types.forward_backward_input import ForwardBackwardInput
    from tinker.types.forward_backward_request import ForwardBackwardRequest

    count, length = args.batch
    with served(args) as (port, *_):
        client = connect(port).create_lora_training_client(base_model=args.model, rank=32).result()
        data = datums(args, random.Random(0), count, length)
        client.forward_backward(data, "cross_entropy").result()
        before, began = engine_seconds(port), time.perf_counter()
        for _ in range(args.passes):
            client.forward_backward(data, "cross_entropy").result()
        total, engine = time.perf_counter() - began, engine_seconds(port) - before
        outside = 100 * (total - engine) / total
        report.add("passes", f"outside the engine, with the SDK, {count} x {length} tokens", outside, 3, unit="%")

        async def wired() -> float:
            wire, spent = Wire(port), 0.0
            for number in range(args.passes):
                # The SDK has used the numbers before these.
                asked = ForwardBackwardRequest(
                    model_id=client.model_id,
                    seq_id=args.passes + 2 + number,
                    forward_backward_input=ForwardBackwardInput(data=data, loss_fn="cross_entropy"),
                )
                body = forward_backward_request_to_proto(asked).SerializeToString()
                started = time.perf_counter()
                status, answer = await wire.ask(f"{API}/forward_backward", body)
                request = json.dumps({"request_id": json.loads(answer)["request_id"]}).encode()
                status = 408
                while status == 408:
                    status, answer = await wire.ask(f"{API}/retrieve_future", request)
                if status != 200 or answer.startswith(b'{"error"'):
                    raise RuntimeError(answer[:500])
                spent += time.perf_counter() - started
            wire.close()
            return spent

        before = engine_seconds(port)
        total = asyncio.run(wired())
        outside = 100 * (total - (engine_seconds(port) - before)) / total
        report.add("passes", "outside the engine, from the socket on", outside, 3, unit="%")


def samples(args: argparse.Namespace, report: Report) -> None:
    """L2: very many samples at once, and health checks meanwhile."""
    from tinker import types

    with served(args) as (port, *_):
        sampler = connect(port).create_sampling_client(base_model=args.model).result()
        source = random.Random(0)
        prompts = [[source.randrange(args.vocabulary) for _ in range(16)] for _ in range(args.samples)]
        params = types.SamplingParams(max_tokens=32, temperature=1.0, seed=1, stop=[])
        sampler.sample(types.ModelInput.from_ints(prompts[0]), 1, params).result()
        latencies: list[float] = []

        async def sample(prompt: list[int], began: float) -> Any:
            answer = await sampler.sample_async(types.ModelInput.from_ints(prompt), 1, params)
            latencies.append(time.perf_counter() - began)
            return answer

        async def sample_all() -> list[Any]:
            began = time.perf_counter()
            return await asyncio.gather(*(sample(prompt, began) for prompt in prompts))

        with health_checks(port) as health:
            answers = asyncio.run(sample_all())
        lengths = sum(len(answer.sequences[0].tokens) for answer in answers)
        report.add(
            "samples", f"of {args.samples} samples of 32 tokens finished", lengths / 32, args.samples, at_most=False
        )
        report.add("samples", "p99 of their latency", percentile(latencies, 0.99), args.p99, unit="s")
        report.add("samples", f"slowest of {len(health)} health checks meanwhile", max(health), 0.2, unit="s")


def clients(args: argparse.Namespace, report: Report) -> None:
    """L3: training clients at once; none is served before the others, and each gets what it gets alone."""
    from tinker import types

    def run(service: Any, seed: int, done: list[int]) -> list[float]:
        client = service.create_lora_training_client(base_model=args.model, rank=8, seed=seed).result()
        source, losses = random.Random(seed), []
        for _ in range(args.steps):
            passed = client.forward_backward(datums(args, source, 4, args.length), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            losses.append(passed.result().metrics["loss:sum"])
            done[seed] += 1
        return losses

    with served(args) as (port, *_):
        service = connect(port)
        alone = [run(service, seed, [0] * args.clients) for seed in range(args.clients)]
        done, shares = [0] * args.clients, []
        with ThreadPoolExecutor(args.clients) as pool:
            running = [pool.submit(run, service, seed, done) for seed in range(args.clients)]
            while max(done) < args.steps:
                time.sleep(0.05)
                # Of fewer steps the ratio says more about their size than about who is served.
                if args.steps > min(done) >= min(6, args.steps - 1):
                    shares.append(max(done) / min(done))
            together = [each.result() for each in running]
    report.add("clients", f"of {args.clients} clients, most steps over fewest", max(shares, default=1.0), 1.5)
    differing = sum(a != b for a, b in zip(alone, together, strict=True))
    report.add("clients", "clients whose losses differ from those alone", differing, 0)


async def _slow(port: int, seconds: float) -> int:
    async def one() -> int:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {API}/forward_backward HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\n"
        writer.write(f"{head}Content-Length: {CHUNK_BYTES}\r\n\r\n".encode())
        sent, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            writer.write(b"x" * (SLOW_BYTES_PER_S // 10))
            await writer.drain()
            sent += SLOW_BYTES_PER_S // 10
            await asyncio.sleep(0.1)
        writer.close()
        return sent

    return sum(await asyncio.gather(*(one() for _ in range(CHUNKS))))


async def _waiting(port: int, bodies: list[bytes]) -> None:
    async def one(body: bytes) -> None:
        wire = Wire(port)
        status, answer = await wire.ask(f"{API}/forward_backward", body)
        if status != 200:
            raise RuntimeError(answer)
        wire.close()

    await asyncio.gather(*map(one, bodies))


def slow(args: argparse.Namespace, report: Report) -> None:
    """L8: large bodies that come slowly, then such that wait; others go on."""
    from tinker import types
    from tinker.proto import tinker_public_pb2 as pb

    with served(args) as (port, process, _):
        service = connect(port)
        client = service.create_lora_training_client(base_model=args.model, rank=8).result()
        source = random.Random(0)

        def step() -> float:
            began = time.perf_counter()
            client.forward_backward(datums(args, source, 4, args.length), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            return time.perf_counter() - began

        for _ in range(5):
            step()
        alone, before = statistics.median(step() for _ in range(10)), rss(process)
        with ThreadPoolExecutor(1) as pool, health_checks(port) as health:
            slowly = pool.submit(lambda: asyncio.run(_slow(port, args.slow_seconds)))
            times, most = [], 0
            while not slowly.done():
                times.append(step())
                most = max(most, rss(process) - before)
        what = f"memory for {CHUNKS} bodies of 5 MB at 10 kB/s"
        report.add("slow", what, most / 1e6, CHUNKS * CHUNK_BYTES / 1e6, unit="MB")
        report.add("slow", "a step of another client, over alone", statistics.median(times) / alone, 1.2)
        report.add("slow", "slowest health check meanwhile", max(health), 0.2, unit="s")

        # They wait for a first chunk that never comes.
        other = service.create_lora_training_client(base_model=args.model, rank=8).result()
        bodies = []
        for number in range(CHUNKS):
            message = pb.ForwardBackwardRequest(model_id=other.model_id, seq_id=number + 2, loss_fn="cross_entropy")
            datum = message.data.add()
            datum.model_input.add().encoded_text.tokens = random.Random(number).randbytes(CHUNK_BYTES)
            bodies.append(message.SerializeToString())
        before = rss(process)
        asyncio.run(_waiting(port, bodies))
        grown, total = rss(process) - before, sum(map(len, bodies))
        report.add("slow", f"memory for {CHUNKS} chunks of 5 MB that wait", grown / 1e6, 2.5 * total / 1e6, unit="MB")
        report.add(
            "slow", "a step of another client, over alone", statistics.median(step() for _ in range(10)) / alone, 1.2
        )


@contextlib.contextmanager
def dashboards(port: int, run: str, cursors: list[str]) -> Iterator[list[int]]:
    """Follow a run as dashboards do, looking once a second, from where each stands; yields the answers' statuses."""
    statuses: list[int] = []

    async def look(one: int, wire: Wire) -> None:
        status, answer = await wire.ask(f"{API}/metrics/runs/{run}?points=500&since={cursors[one]}", method="GET")
        cursors[one] = json.loads(answer)["next"]
        statuses.append(status)
        for path in ("metrics/runs", "metrics/engines"):
            statuses.append((await wire.ask(f"{API}/{path}", method="GET"))[0])

    with beside(port, [partial(look, one) for one in range(len(cursors))], 1.0):
        yield statuses


@contextlib.contextmanager
def metrics_cannot_be_written(state_dir: Path) -> Iterator[None]:
    """Put a directory where the metrics file is."""
    file, aside = state_dir / FILE_NAME, state_dir / "aside"
    file.rename(aside)
    file.mkdir()
    try:
        yield
    finally:
        file.rmdir()
        aside.rename(file)


def watched(args: argparse.Namespace, report: Report) -> None:
    """A step while its metrics are read all the time, or cannot be written, over one just before it."""
    from tinker import types

    with served(args) as (port, _, state_dir):
        client = connect(port).create_lora_training_client(base_model=args.model, rank=32).result()
        data = datums(args, random.Random(0), 4, args.length)

        def step() -> float:
            began = time.perf_counter()
            client.forward_backward(data, "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            return time.perf_counter() - began

        def steps() -> float:
            return statistics.median(step() for _ in range(3))

        for _ in range(5):
            step()
        read, broken, statuses, cursors = [], [], [], ["0-0"] * 5
        for _ in range(args.rounds):
            alone = steps()
            with dashboards(port, client.model_id, cursors) as found:
                read.append(steps() / alone)
            statuses += found
            alone = steps()
            with metrics_cannot_be_written(state_dir):
                broken.append(steps() / alone)
        report.add("watched", "a step beside five dashboards, over alone", statistics.median(read), 1.02)
        report.add("watched", "a step whose metrics cannot be written, over alone", statistics.median(broken), 1.02)
        report.add("watched", f"of {len(statuses)} answers, refused", sum(s != 200 for s in statuses), 0)


async def _flood(port: int, sampler_id: str, requests: int) -> tuple[int, list[float]]:
    """Send requests whose answers nobody fetches yet; return how many were taken, and how fast the others refused."""
    numbers, refused, taken = itertools.count(10**6), [], 0

    async def work() -> None:
        nonlocal taken
        wire = Wire(port)
        while (number := next(numbers)) < 10**6 + requests:
            began = time.perf_counter()
            status, answer = await wire.ask(f"{API}/asample", sample_body(sampler_id, number, [1, 2, 3]))
            if status == 429:
                refused.append(time.perf_counter() - began)
            elif status == 200:
                taken += 1
            else:
                raise RuntimeError(answer)
        wire.close()

    await asyncio.gather(*(work() for _ in range(16)))
    return taken, refused


def full(args: argparse.Namespace, report: Report) -> None:
    """L9: a full queue."""
    from tinker import types

    more, limit = 500, 10_000
    with stand_in("held") as (port, _):
        sampler_id = asyncio.run(Wire(port).sampler("none"))
        taken, refused = asyncio.run(_flood(port, sampler_id, args.flood + more))
        expected = min(args.flood + more, limit)
        report.add("full", f"accepted of {args.flood + more} more than expected", abs(taken - expected), 0)
        if refused:
            report.add("full", "p99 of the time of a refusal", percentile(refused, 0.99), 0.2, unit="s")
        sampler = connect(port).create_sampling_client(base_model="none").result()
        params = types.SamplingParams(max_tokens=32, stop=[])
        futures = [sampler.sample(types.ModelInput.from_ints([1, 2, number]), 1, params) for number in range(300)]
        time.sleep(3)
        asyncio.run(Wire(port).ask("/release"))
        finished = sum(len(future.result(120).sequences) for future in futures)
        report.add("full", "of 300 samples of the SDK meanwhile, answered after", finished, 300, at_most=False)
        _, generated = asyncio.run(Wire(port).ask("/generated"))
        report.add("full", "samples lost or made twice", abs(int(generated) - taken - 300), 0)


PARTS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "pairs": pairs,
    "passes": passes,
    "samples": samples,
    "clients": clients,
    "slow": slow,
    "watched": watched,
    "full": full,
}


def main() -> int:
    args = arguments()
    if args.child:
        serve(args.child == "held")
        return 0
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    conditions = machine()
    print(json.dumps(conditions), flush=True)
    report = Report()
    for name in args.parts:
        PARTS[name](args, report)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": report.rows}, indent=1) + "\n")
    return int(not all(row["met"] for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
