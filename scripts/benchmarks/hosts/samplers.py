"""How much faster do N samplers on a core each sample than one sampler on one core?

Every number of samplers runs in a child process of its own, one after the other, with the same requests for each
sampler: prompts of their own, so that none is found in a cache. The program itself keeps off the samplers' cores once
it is ready, where the machine has others. Only an idle machine gives figures that mean anything: the load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_rows import NEW_TOKENS, TOKEN_LIMIT, machine, measure

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WANTED = 1.8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--samplers", nargs="+", type=int, default=[1, 2], help="the first is what others compare to")
    parser.add_argument("--rows", type=int, default=8, help="requests of each sampler at once")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW_TOKENS, help="tokens drawn of each")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that are not")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a child is killed")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Measure `args.child` samplers, each on one core."""
    import jax_client
    from jax_client import types

    samplers, cores = args.child, sorted(os.sched_getaffinity(0))
    if len(cores) < samplers:
        sys.exit(f"{samplers} samplers need {samplers} cores, and there are {len(cores)}")
    os.sched_setaffinity(0, cores[:samplers])  # Ray and the samplers inherit it, and divide it among them
    config = jax_client.EngineConfig(
        dtype=args.dtype, compilation_cache_dir="", precompile=False, autosave_minutes=None, record_metrics=False,
        samplers=samplers,
    )  # fmt: skip
    with jax_client.ServiceClient(config=config) as service:
        client = service.create_sampling_client(base_model=args.model)
        rest = cores[samplers:] or cores
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), rest)
        source = random.Random(0)
        params = types.SamplingParams(max_tokens=args.new, temperature=1.0, stop=[], seed=1)

        def step() -> None:
            prompts = [[source.randrange(TOKEN_LIMIT) for _ in range(args.prompt)] for _ in range(samplers * args.rows)]
            for future in [client.sample(types.ModelInput.from_ints(prompt), 1, params) for prompt in prompts]:
                future.result()

        found = measure(step, args.steps, args.timeout)
        described = service.describe()["samplers"]
    tokens = samplers * args.rows * args.new
    return {
        "tokens_per_s": tokens / found["step_s"],
        "step_s": found["step_s"],
        "steps": found["steps_timed"],
        "cores": [each["cores"] for each in described],
        "requests": [each["requests"] for each in described],
        "own_cores": bool(cores[samplers:]),
    }


def main() -> int:
    args = arguments()
    if args.child:
        print(json.dumps(child(args)), flush=True)
        return 0
    settings = {name: getattr(args, name) for name in ("model", "dtype", "rows", "prompt", "new", "steps")}
    for name, value in (machine() | settings | {"load before": os.getloadavg()}).items():
        print(f"{name}: {value}")
    rates: list[float] = []
    print(
        "\n| samplers | new tokens/s | step s | against the first | cores of each | requests of each | program beside |"
    )
    print("|---:|---:|---:|---:|---|---|---|")
    for samplers in args.samplers:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(samplers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.timeout)
        if done.returncode:
            return done.returncode
        found = json.loads(done.stdout.splitlines()[-1])
        rates.append(found["tokens_per_s"])
        beside = "on other cores" if found["own_cores"] else "on the same cores"
        facts = (
            f"{found['step_s']:.2f} | {rates[-1] / rates[0]:.2f} | {found['cores']} | {found['requests']} | {beside}"
        )
        print(f"| {samplers} | {rates[-1]:,.0f} | {facts} |", flush=True)
    print(f"\nload after: {os.getloadavg()}; two samplers should have {WANTED} times the tokens/s of one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
