"""What does HTTP itself cost, and what does a full queue do?

A server without an engine answers at once or holds its answers; the share of a training pass outside the engine is
measured on the real server.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from typing import Any

from load.load_process import Report, connect, cpu_seconds, datums, percentile, served, stand_in
from load.load_wire import API, Wire, sample_body


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
    """Return the seconds that the engines report for training: on the host, on the device, compiling, in the queue."""
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


async def _flood(port: int, sampler_id: str, requests: int) -> tuple[int, list[float]]:
    """Send requests without fetching answers; return how many were accepted, and the seconds of each refusal."""
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
