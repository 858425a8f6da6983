"""What do the clients of one server notice of each other?

Each part sends one kind of load through the SDK or raw sockets: samples, training runs, slow senders, dashboards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from jax_client.metrics.store import FILE_NAME
from load.load_process import Report, beside, connect, datums, health_checks, percentile, rss, served
from load.load_wire import API, KEY, Wire

CHUNK_BYTES, CHUNKS, SLOW_BYTES_PER_S = 5_000_000, 20, 10_000


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
    """L8: large bodies that arrive slowly, then large requests that wait for their turn; others are not held up."""
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
    """Follow a run as dashboards do, each looking once a second from its own cursor; yields the answers' statuses."""
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
