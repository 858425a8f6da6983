"""What do torch and peft reach on the same files, modules and lengths? By the project's comparison, in one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import bench_rows
from gpu_phases.models import LENGTHS, TOY_LENGTHS
from gpu_phases.rows import Journal

STEPS, BUDGET_S = 3, 8.0
GENERATED = (8, 32)  # prompts


def job(model: Path, row: bench_rows.Row, most: int) -> bench_rows.Job:
    """Return a row of the comparison as torch's contender takes it."""
    return bench_rows.Job(
        contender="torch",
        row=row,
        dtype="bfloat16",
        model=str(model),
        surface="engine",
        steps=STEPS,
        budget_s=BUDGET_S,
        torch_compile=False,
        torch_group=4,
        torch_micro_tokens=most,
    )


def torch_and_peft(journal: Journal, config: dict[str, Any], model: Path) -> None:
    """Time torch's training steps and its generation."""
    bench_rows.TOKEN_LIMIT = min(bench_rows.TOKEN_LIMIT, config["vocab_size"])
    import torch
    from peft import LoraConfig, get_peft_model

    import bench_torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    new_tokens = bench_torch.NEW_TOKENS
    train = lambda name, lengths: bench_rows.Row(name=name, kind="train", lengths=lengths)  # noqa: E731
    with journal.row("load") as row:
        start = time.perf_counter()
        lora = LoraConfig(r=32, lora_alpha=32, target_modules=bench_torch.MODULES, lora_dropout=0.0, bias="none")
        base = bench_torch.load(job(model, train("load", (8,)), 8)).to(device)
        adapted: Any = get_peft_model(base, lora)
        row |= {"seconds": time.perf_counter() - start, "attention": adapted.config._attn_implementation}
    shapes = TOY_LENGTHS if journal.tiny else {name: LENGTHS[name] for name in ("2x4096", "8x256", "ragged16")}
    for name, lengths in shapes.items():
        for most in (8192, 4096):  # all at once; where that does not fit, one sequence
            if not journal.has_time(name, 5):
                break
            with journal.row(name) as row:
                row["micro_tokens"] = most
                step = None
                try:
                    step = bench_torch.training(adapted, job(model, train(name, lengths), most), device)
                    measured = bench_rows.measure(step, STEPS, BUDGET_S)
                except torch.OutOfMemoryError as error:
                    row["out_of_memory"] = str(error)[:200]
                    continue
                finally:
                    del step
                    torch.cuda.empty_cache()
                row |= {"tokens_per_s": sum(lengths) / measured["step_s"], "ms": measured["step_s"] * 1e3}
                row["peak_MiB"] = bench_torch.device_peak_mib()
            break
    # The comparison merges the adapter itself, once for each row.
    merged = adapted.merge_and_unload()
    merged.merge_and_unload = lambda: merged
    for prompts in GENERATED[: 1 if journal.tiny else None]:
        if not journal.has_time(f"generate{prompts}", 8):
            continue
        with journal.row(f"generate{prompts}") as row:
            asked = bench_rows.Row(name=f"generate{prompts}", kind="generate", lengths=(32,) * prompts)
            step = bench_torch.generation(merged, job(model, asked, 8192), device)
            measured = bench_rows.measure(step, STEPS, BUDGET_S)
            row["tokens_per_s"] = prompts * new_tokens / measured["step_s"]
            row["ms_per_step"] = measured["step_s"] * 1e3 / new_tokens
