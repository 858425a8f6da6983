"""How is a recipe run against a server of ours, and what is noted about it?"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from recipe_data import read_lines
from recipe_family import Models

ROOT = Path(__file__).resolve().parents[3]
READY_SECONDS, STOP_SECONDS = 300, 180
console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)


class RecipeError(Exception):
    """A recipe, a probe or the server ended as it should not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """An expectation, and what became of it; `passed` is None where a shortened run cannot tell."""

    scenario: str
    expectation: str
    bar: str
    measured: str
    passed: bool | None


@dataclass(slots=True)
class Bench:
    """Where recipes run, against which server, and what was checked so far.

    Attributes:
        out: logs and results; out / "work" is the recipes' working directory.
        python: of the recipes' environment.
        models: what the recipes are told.
        steps: at which every run is cut off, None for whole runs.
        small: smaller batches where a step samples much.
    """

    out: Path
    python: Path
    models: Models
    steps: int | None
    small: bool
    url: str = ""
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def env(self) -> dict[str, str]:
        """What a recipe needs to find the server and nothing else."""
        ours = {
            "TINKER_BASE_URL": self.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.out / "hf"),
        }  # fmt: skip
        return {**os.environ, **ours}

    def check(
        self, scenario: str, expectation: str, bar: str, value: float | str, passed: bool, *, learning: bool = False
    ) -> None:
        """Note an expectation; one about learning is skipped in a shortened run."""
        verdict = None if learning and (self.steps is not None or self.small) else passed
        shown = value if isinstance(value, str) else f"{value:.4g}"
        self.checks.append(Check(scenario=scenario, expectation=expectation, bar=bar, measured=shown, passed=verdict))


@contextmanager
def server(bench: Bench, name: str, *options: str) -> Iterator[None]:
    """Run a server on a free port of this machine for as long as the block lasts.

    Args:
        bench: gets the server's address.
        name: of its log, and of its state directory.
        options: of `jax_client serve`.
    """
    log = bench.out / f"{name}.log"
    # The bars are those of float32, which "auto" takes only where a processor has no fast bfloat16.
    command = [
        str(Path(sys.executable).parent / "jax_client"), "serve", "--port", "0", "--dtype", "float32",
        "--state-dir", str(bench.out / f"{name}_state"), *options,
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=bench.out, stdout=file, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + READY_SECONDS
        while not (found := re.search(r"TINKER_BASE_URL=(\S+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise RecipeError(f"the server did not start; the end of {log}:\n{_tail(log)}")
            time.sleep(0.2)
        bench.url = found[1]
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _tail(path: Path, lines: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def run_recipe(
    bench: Bench,
    name: str,
    module: str,
    options: dict[str, Any],
    shown: str,
    kill_after: int | None = None,
    limit: float = math.inf,
) -> None:
    """Run a recipe to its end, or kill it once this step is in its metrics and a checkpoint in its records.

    Args:
        bench: where.
        name: of the scenario, its log and its folder below runs/.
        module: below tinker_cookbook.recipes.
        options: of the recipe, as key=value.
        shown: the metric to print with each step that has it.
        kill_after: a step; None lets it end.
        limit: seconds after which it is killed, and an error is raised.

    Raises:
        RecipeError: it ended with an error, or before it could be killed, or took too long.
    """
    folder = bench.work / "runs" / name
    log = bench.out / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    resumes = options.get("behavior_if_log_dir_exists") == "resume"
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
    command = [str(bench.python), "-m", f"tinker_cookbook.recipes.{module}"]
    command += [f"{key}={value}" for key, value in options.items()]
    console.print(f"{name}: python {' '.join(command[1:])}", highlight=False)
    began = time.perf_counter()
    told = len(read_lines(folder / "metrics.jsonl"))
    with log.open("a" if resumes else "w") as file:
        # A group of its own, so that a kill takes the SDK's helper processes too.
        process = subprocess.Popen(
            command, cwd=bench.work, env=bench.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    killed = False
    try:
        while process.poll() is None:
            time.sleep(0.25)
            rows = read_lines(folder / "metrics.jsonl")
            for row in rows[told:]:
                if shown in row:
                    seconds, value = time.perf_counter() - began, row[shown]
                    console.print(f"{name}: {seconds:5.0f} s, step {row['step']}: {shown} {value:.4g}", highlight=False)
            told = len(rows)
            saved = read_lines(folder / "checkpoints.jsonl")
            if kill_after is not None and rows and saved and rows[-1]["step"] >= kill_after:
                killed = True
                break
            if time.perf_counter() - began > limit:
                raise RecipeError(f"{name} was killed after {limit:.0f} s; the end of {log}:\n{_tail(log)}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    bench.seconds[name] = bench.seconds.get(name, 0.0) + time.perf_counter() - began
    if killed:
        console.print(f"{name}: killed after step {kill_after}")
    elif kill_after is not None or process.returncode != 0:
        raise RecipeError(f"{name} ended with exit code {process.returncode}; the end of {log}:\n{_tail(log)}")


def probe(bench: Bench, *arguments: str) -> dict[str, float]:
    """Ask something in the recipes' environment; see recipe_probe.py.

    Raises:
        RecipeError: it failed.
    """
    command = [str(bench.python), str(Path(__file__).with_name("recipe_probe.py")), "--model", bench.models.model]
    command += arguments
    log = bench.out / "logs" / f"probe-{arguments[0]}.log"
    began = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(command, cwd=bench.work, env=bench.env, stdout=subprocess.PIPE, stderr=file, text=True)
    if done.returncode != 0:
        raise RecipeError(f"the probe {arguments[0]} failed; the end of {log}:\n{_tail(log)}")
    bench.seconds[f"probe {arguments[0]}"] = time.perf_counter() - began
    return json.loads(done.stdout.splitlines()[-1])


def options_of(bench: Bench, name: str, **own: Any) -> dict[str, Any]:
    options = {"model_name": bench.models.model, "renderer_name": bench.models.renderer, **own}
    if bench.steps is not None:
        options["max_steps"] = bench.steps
    return {**options, "log_path": f"runs/{name}", "behavior_if_log_dir_exists": "delete"}


def metrics_of(bench: Bench, name: str, key: str) -> list[float]:
    values = [row[key] for row in read_lines(bench.work / "runs" / name / "metrics.jsonl") if key in row]
    if not values:
        raise RecipeError(f"runs/{name}/metrics.jsonl has no {key}")
    return values


def final_sampler(bench: Bench, name: str) -> str:
    """Check the last record of the checkpoints; return the path of its weights."""
    records = read_lines(bench.work / "runs" / name / "checkpoints.jsonl")
    last = records[-1] if records else {}
    whole = all(str(last.get(key)).startswith("tinker://") for key in ("state_path", "sampler_path"))
    bench.check(
        name, "the last checkpoint record has state and sampler", "both", "both" if whole else "not both", whole
    )
    if not whole:
        raise RecipeError(f"runs/{name}/checkpoints.jsonl ends with {last}")
    return last["sampler_path"]
