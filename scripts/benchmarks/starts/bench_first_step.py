"""How long does a first reinforcement learning step take on a machine that has compiled nothing, and on the next start?

    python scripts/benchmarks/starts/bench_first_step.py
    python scripts/benchmarks/starts/bench_first_step.py --against ../other/.venv-test/bin/python --rounds 3

The step is that of the cookbook's arithmetic recipe: 8 prompts of about 75 tokens, 4 answers of up to 5 tokens to each,
importance_sampling on all of them, one optimizer step. Each start is a process of its own, first with an empty
compilation cache, then with the one that the first start left. With --against, starts of the two environments take
turns. Time is measured from the start of the process to the end of optim_step. Use an idle machine; CPU seconds, which
are printed too, suffer less from other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS, GROUP, PREFIX, QUESTION, ANSWER = 8, 4, 60, 14, 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=MODEL, help="hub name or directory")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--against", nargs="*", default=[], help="Python of other environments to take turns with")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compiles", action="store_true", help="show each compile of the starts")
    parser.add_argument("--json", type=Path, help="write every measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Take the step; return the seconds since the process began, and the compiles."""
    began = time.time() - _age_s()
    import numpy as np

    import jax_client
    from jax_client import types

    cache, state = os.path.join(args.child, "cache"), tempfile.mkdtemp(dir=args.child)
    config = jax_client.EngineConfig(dtype=args.dtype, compilation_cache_dir=cache, state_dir=state)
    service = jax_client.ServiceClient(config=config)
    client = service.create_lora_training_client(base_model=args.model, rank=32, seed=0).result()
    loaded = time.time()
    source = np.random.default_rng(0)
    prefix, data = source.integers(3, 40_000, PREFIX).tolist(), []
    sampler = client.save_weights_and_get_sampling_client().result()
    flying = []
    for _ in range(PROMPTS):
        prompt = prefix + source.integers(3, 40_000, QUESTION).tolist()
        params = types.SamplingParams(max_tokens=ANSWER, temperature=1.0, stop=[])
        asked = [sampler.sample(types.ModelInput.from_ints(prompt), 1, params) for _ in range(GROUP)]
        flying += [(prompt, i, future) for i, future in enumerate(asked)]
    for prompt, i, future in flying:
        (answer,) = future.result().sequences
        masked = len(prompt) - 1
        inputs = {
            "target_tokens": np.asarray(prompt[1:] + list(answer.tokens), np.int64),
            "logprobs": np.asarray([0.0] * masked + list(answer.logprobs), np.float32),
            "advantages": np.asarray([0.0] * masked + [i - (GROUP - 1) / 2] * len(answer.tokens), np.float32),
        }
        tensors = {name: types.TensorData.from_numpy(array) for name, array in inputs.items()}
        model_input = types.ModelInput.from_ints(prompt + list(answer.tokens)[:-1])
        data.append(types.Datum(model_input=model_input, loss_fn_inputs=tensors))
    sampled = time.time()
    client.forward_backward(data, "importance_sampling")
    client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    stepped, used = time.time(), resource.getrusage(resource.RUSAGE_SELF)
    (engine,) = _engines(service.describe())
    return {
        "loaded_s": loaded - began,
        "sampled_s": sampled - began,
        "first_step_s": stepped - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "compiles": [record for record in engine["compiled"] if record["ended_at"] <= stepped],
        "began": began,
    }


def _engines(described: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions that have compiles, at whichever depth this version shows them."""
    if "compiled" in described:
        return [described]
    nested = [value for value in described.values() if isinstance(value, (dict, list))]
    maps = [each for value in nested for each in (value if isinstance(value, list) else [value])]
    return [found for each in maps if isinstance(each, dict) for found in _engines(each)]


def _age_s() -> float:
    """Return how long this process has run, its start included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def start(python: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    options = ["--child", folder, "--model", args.model, "--dtype", args.dtype]
    command = [python, "-W", "ignore", str(Path(__file__).resolve()), *options]
    # Not from this checkout: a relative import path would find its package instead of the environment's.
    answer = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if answer.returncode:
        sys.exit(f"{python} failed:\n{answer.stderr[-3000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def show(python: str, which: str, found: dict[str, Any], args: argparse.Namespace) -> None:
    waited = [record for record in found["compiles"] if record["cause"] == "first use"]
    print(
        f"{which:12} {found['first_step_s']:6.1f} s to the first step ({found['loaded_s']:.1f} s to load, "
        f"{found['sampled_s']:.1f} s to the last sample), {found['cpu_s']:.0f} CPU s, {len(found['compiles'])} "
        f"programs, of them {len(waited)} waited for | {python}",
        flush=True,
    )
    for record in found["compiles"] if args.compiles else ():
        ended = record["ended_at"] - found["began"]
        how = "loaded" if record["cached"] else "compiled"
        print(
            f"    {ended - record['seconds']:6.1f} to {ended:6.1f} s: {how} {record['program']} ({record['shapes']}), "
            f"{record['cause']}"
        )


def main() -> int:
    args = arguments()
    if args.child:
        print(json.dumps(child(args)))
        sys.stdout.flush()
        os._exit(0)  # the step is what counts
    pythons = [sys.executable, *(os.path.abspath(each) for each in args.against)]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {each: {"empty cache": [], "second": []} for each in pythons}
    for round_ in range(args.rounds):
        for python in pythons if round_ % 2 == 0 else pythons[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                for which, found in runs[python].items():
                    found.append(start(python, args, folder))
                    show(python, which, found[-1], args)
    if len(pythons) > 1:
        medians = [statistics.median(run["first_step_s"] for run in runs[each]["empty cache"]) for each in pythons]
        for python, median in zip(pythons[1:], medians[1:], strict=True):
            print(f"empty cache: {medians[0] / median:.2f} of the time of {python}")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
