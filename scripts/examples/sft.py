"""How do I fine-tune a model on my conversations? One JSON object with "messages" per line in, an adapter out.

A share of the conversations is held out: the loss on it is measured at the beginning, after each epoch and at the end,
and the model answers a few of its questions before and after. A picture of both losses is written beside the log.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jax_client
from chat_data import Example, Message, batches, read_conversations, render, truncated
from jax_client import types
from showing import answer_table, answers, command_line, draw_losses


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", type=Path, help="JSONL file")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or directory")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank")
    parser.add_argument(
        "--no-train-unembed", action="store_true", help="no adapter on the output projection: vLLM, SGLang take it then"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="conversations per optimizer step")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-4, help="decays linearly to zero over the run")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens kept of each conversation")
    parser.add_argument("--seed", type=int, default=0, help="of the initial adapter and the order of the data")
    parser.add_argument("--save-every", type=int, default=0, help="steps between saved states; 0 saves at the end only")
    parser.add_argument("--name", default="sft", help="prefix of the checkpoints' names")
    parser.add_argument("--resume", metavar="PATH", help="tinker://RUN/weights/NAME-STEP, saved by this script")
    parser.add_argument("--log", type=Path, help="append one JSON object per step to this file")
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="share of the conversations to evaluate on, 0 to 0.5"
    )
    parser.add_argument("--ask", type=int, default=3, help="questions of the held-out ones, answered before and after")
    parser.add_argument("--plot", type=Path, default=Path("sft_loss.png"), help="picture of the losses")
    args = parser.parse_args()
    for name in ("rank", "batch_size", "epochs", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if not 0 <= args.held_out <= 0.5:
        parser.error(f"--held-out is {args.held_out:g}; give 0 to 0.5")
    return args


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Conversations to train on, those held out, and the beginnings of the latter, up to the answer, to be asked."""

    train: list[Example]
    held_out: list[Example]
    questions: list[list[Message]]


@dataclass(slots=True)
class Losses:
    """Mean nats per scored token, by the number of finished steps."""

    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)


def resumed_step(path: str) -> int:
    """Read the number of finished steps from a checkpoint's name."""
    if match := re.search(r"-(\d{6})$", path):
        return int(match[1])
    sys.exit(f"--resume {path}: the name does not end with a step, such as sft-000120, so the place is unknown.")


def load_data(tokenizer: Any, args: argparse.Namespace, console: Console) -> Data:
    """Render and cut every conversation, and set some aside; which ones depends on the seed alone."""
    try:
        conversations = read_conversations(args.data)
        rendered = [render(tokenizer, messages) for messages in conversations]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    kept = [(i, cut) for i, example in enumerate(rendered) if (cut := truncated(example, args.max_length)) is not None]
    if not kept:
        sys.exit("Nothing to train on: raise --max-length.")
    order = np.random.default_rng(args.seed).permutation(len(kept))
    aside = {int(i) for i in order[: int(args.held_out * len(kept))]}
    train = [example for i, (_, example) in enumerate(kept) if i not in aside]
    held_out = [example for i, (_, example) in enumerate(kept) if i in aside]
    asked = [conversations[kept[i][0]] for i in sorted(aside)][: args.ask]
    tokens = sum(len(example.tokens) for example in train)
    console.print(f"{len(train)} conversations to train on, {tokens:,} tokens; {len(held_out)} held out")
    if longer := sum(len(example.tokens) > args.max_length + 1 for example in rendered):
        console.print(f"{longer} were cut at {args.max_length} tokens (--max-length)")
    if lost := len(rendered) - len(kept):
        console.print(f"{lost} have no answer within {args.max_length} tokens and are left out (--max-length)")
    first = [next(i for i, message in enumerate(chat) if message["role"] == "assistant") for chat in asked]
    return Data(train=train, held_out=held_out, questions=[chat[:end] for chat, end in zip(asked, first, strict=True)])


def evaluate(client: Any, examples: Sequence[Example]) -> float:
    """Return the loss on examples, in nats per scored token; nothing is learned from them."""
    output = client.forward([example.datum for example in examples], "cross_entropy").result()
    return output.metrics["loss:sum"] / sum(example.scored for example in examples)


def train(
    client: Any, data: Data, losses: Losses, first: int, total: int, args: argparse.Namespace, console: Console
) -> int:
    """Run steps `first` to `total`, one ahead of the device; return how many were finished."""
    stream = itertools.islice(batches(data.train, args.batch_size, args.seed), first, None)
    epoch = -(-len(data.train) // args.batch_size)

    def submit(step: int) -> tuple[list[Example], float, Any, Any]:
        nonlocal sent
        batch, rate = next(stream), args.lr * (1 - step / total)
        fwdbwd = client.forward_backward([example.datum for example in batch], "cross_entropy")
        optim = client.optim_step(types.AdamParams(learning_rate=rate))
        sent = step + 1
        return batch, rate, fwdbwd, optim

    done = sent = first
    flying = submit(first)
    with progress_bar(console) as bar:
        task = bar.add_task("compiling (once)", total=total, completed=first, info="")
        try:
            while done < total:
                began = time.perf_counter()
                batch, rate, fwdbwd, optim = flying
                saves = args.save_every > 0 and (done + 1) % args.save_every == 0 and done + 1 < total
                evaluates = bool(data.held_out) and ((done + 1) % epoch == 0 or done + 1 == total)
                # What is saved or evaluated is between two steps, so nothing may be in flight behind it.
                ahead = done + 1 < total and not saves and not evaluates
                if ahead:
                    flying = submit(done + 1)
                scored = sum(example.scored for example in batch)
                row = {"step": done + 1, "loss": fwdbwd.result().metrics["loss:sum"] / scored, "learning_rate": rate}
                row |= {"grad_norm": (optim.result().metrics or {}).get("grad_norm:mean"), "scored_tokens": scored}
                row |= {"tokens": sum(len(example.tokens) - 1 for example in batch)}
                row |= {"seconds": round(time.perf_counter() - began, 3)}
                done += 1
                losses.train[done] = row["loss"]
                if evaluates:
                    losses.held_out[done] = row["held_out_loss"] = evaluate(client, data.held_out)
                bar.update(task, completed=done, description="training", info=report(row, total, args.log, console))
                if saves:
                    save(client, args.name, done, console)
                if done < total and not ahead:
                    flying = submit(done)
        except KeyboardInterrupt:
            # What was sent runs to its end, and so is part of what is saved.
            flying[3].result()
            return sent
    return done


def progress_bar(console: Console) -> Progress:
    """Return the bar of the steps; it is shown on a terminal only."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)


def report(row: dict[str, Any], total: int, log: Path | None, console: Console) -> str:
    """Write a step to the log, and where there is no bar to the console; return what the bar shows."""
    info = f"loss {row['loss']:.3f}, {row['tokens'] / max(row['seconds'], 1e-3):,.0f} tokens/s"
    if "held_out_loss" in row:
        console.print(f"after step {row['step']}: loss {row['held_out_loss']:.3f} on the held-out conversations")
    if not console.is_terminal:
        console.print(f"step {row['step']}/{total}: {info}")
    if log:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return info


def save(client: Any, name: str, done: int, console: Console) -> str:
    path = client.save_state(f"{name}-{done:06d}", overwrite=True).result().path
    console.print(f"state: {path}", soft_wrap=True)
    return path


def ask(client: Any, questions: Sequence[Sequence[Message]], console: Console) -> list[str]:
    """Have the model answer, as it is now."""
    if not questions:
        return []
    with console.status("asking the model"):
        sampler = client.save_weights_and_get_sampling_client().result()
        return answers(sampler, client.get_tokenizer(), questions)


def draw(losses: Losses, args: argparse.Namespace, console: Console) -> None:
    try:
        draw_losses(losses.train, losses.held_out, args.plot, args.name)
    except ImportError:
        console.print('no picture: matplotlib is not installed (pip install "matplotlib>=3.9")')
    else:
        console.print(f"picture: {args.plot}")


def main() -> int:
    args = arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    # On a terminal this script shows what it waits for; elsewhere jax_client writes a line.
    service = jax_client.ServiceClient(config=jax_client.EngineConfig(progress=not console.is_terminal))
    first = 0
    with console.status("loading the model"):
        if args.resume:
            first = resumed_step(args.resume)
            client = service.create_training_client_from_state_with_optimizer(args.resume).result()
        else:
            client = service.create_lora_training_client(
                base_model=args.model, rank=args.rank, seed=args.seed, train_unembed=not args.no_train_unembed
            ).result()
        data = load_data(client.get_tokenizer(), args, console)
    total = args.epochs * -(-len(data.train) // args.batch_size)
    if first >= total:
        sys.exit(f"{args.resume} is at step {first} of {total}: nothing is left to do. Raise --epochs.")
    losses, before = Losses(), ask(client, data.questions, console)
    if data.held_out:
        with console.status("evaluating"):
            losses.held_out[first] = evaluate(client, data.held_out)
        console.print(f"before: loss {losses.held_out[first]:.3f} on the held-out conversations")
    done = train(client, data, losses, first, total, args, console)
    state = save(client, args.name, done, console)
    if losses.train:
        draw(losses, args, console)
    if done < total:
        line = f"python {' '.join(without_resume(sys.argv))} --resume {state}"
        console.print(f"stopped; go on with: {line}", soft_wrap=True)
        return 130
    if before:
        asked = [chat[-1]["content"] for chat in data.questions]
        console.print(answer_table(asked, before, ask(client, data.questions, console), "question (held out)"))
    weights = client.save_weights_for_sampler(f"{args.name}-{done:06d}").result().path
    console.print(f"sampler weights: {weights}\ntalk to it: {command_line('chat', weights)}", soft_wrap=True)
    return 0


def without_resume(argv: list[str]) -> list[str]:
    """Return the command line less an earlier --resume."""
    kept = list(argv)
    while "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    return [word for word in kept if not word.startswith("--resume=")]


if __name__ == "__main__":
    sys.exit(main())
