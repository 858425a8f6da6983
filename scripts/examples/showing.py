"""How do the examples show what a run did? Answers before and after as a table, losses as a smoothed curve."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from chat_data import Message, prompt_tokens
from jax_client import types


def answers(sampler: Any, tokenizer: Any, chats: Sequence[Sequence[Message]], max_tokens: int = 48) -> list[str]:
    """Sample one greedy answer per conversation; all are submitted at once, so that they are decoded as one batch.

    An answer that was cut ends with "…".
    """
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    prompts = [types.ModelInput.from_ints(prompt_tokens(tokenizer, chat)) for chat in chats]
    futures = [sampler.sample(prompt, 1, params) for prompt in prompts]
    sequences = [future.result().sequences[0] for future in futures]
    return [
        tokenizer.decode(each.tokens, skip_special_tokens=True).strip() + ("…" if each.stop_reason == "length" else "")
        for each in sequences
    ]


def answer_table(prompts: Sequence[str], before: Sequence[str], after: Sequence[str], title: str) -> Table:
    """Return the answers side by side."""
    table = Table(title, "before", "after", show_lines=True, title="greedy answers")
    for row in itertools.zip_longest(prompts, before, after, fillvalue=""):
        table.add_row(*row)
    return table


def command_line(*words: str) -> str:
    """Return a command line of jax_client that works also where the environment is not activated."""
    beside = Path(sys.executable).with_name("jax_client")
    return " ".join(["jax_client" if shutil.which("jax_client") else str(beside), *words])


def smoothed(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Return the running mean of values, in which each older one counts `keep` times as much as the next."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out


def draw_losses(losses: Mapping[int, float], held_out: Mapping[int, float], path: Path, title: str) -> None:
    """Write the losses by step as a picture: a smoothed line over the faint values, and what was held out as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(list(losses), list(losses.values()), color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(list(losses), smoothed(list(losses.values())), color="tab:blue", linewidth=2, label="training, smoothed")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o--", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
