"""How do I fine-tune a model on my conversations? One JSON object with "messages" per line in, an adapter out."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax_client
from chat_data import Example, batches, read_conversations, render, truncated
from jax_client import types


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
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
    args = parser.parse_args()
    for name in ("rank", "batch_size", "epochs", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    return args


def resumed_step(path: str) -> int:
    """Read the number of finished steps from a checkpoint's name."""
    if match := re.search(r"-(\d{6})$", path):
        return int(match[1])
    sys.exit(f"--resume {path}: the name does not end with a step, such as sft-000120, so the place is unknown.")


def load_examples(tokenizer: Any, args: argparse.Namespace) -> list[Example]:
    """Render and cut every conversation; say what was cut."""
    try:
        rendered = [render(tokenizer, messages) for messages in read_conversations(args.data)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    kept = [cut for example in rendered if (cut := truncated(example, args.max_length)) is not None]
    longer = sum(len(example.tokens) > args.max_length + 1 for example in rendered)
    tokens = sum(len(example.tokens) for example in kept)
    print(f"{len(kept)} conversations, {tokens:,} tokens; {longer} were longer than {args.max_length} tokens", end="")
    print(f", {len(rendered) - len(kept)} of them had no answer left and are dropped")
    if not kept:
        sys.exit("Nothing to train on: raise --max-length.")
    return kept


def train(client: Any, examples: list[Example], first: int, total: int, args: argparse.Namespace) -> int:
    """Run steps `first` to `total`, one ahead of the device; return how many were finished."""
    stream = itertools.islice(batches(examples, args.batch_size, args.seed), first, None)

    def submit(step: int) -> tuple[list[Example], float, Any, Any]:
        nonlocal sent
        batch, rate = next(stream), args.lr * (1 - step / total)
        fwdbwd = client.forward_backward([example.datum for example in batch], "cross_entropy")
        optim = client.optim_step(types.AdamParams(learning_rate=rate))
        sent = step + 1
        return batch, rate, fwdbwd, optim

    done = sent = first
    flying = submit(first)
    try:
        while done < total:
            began = time.perf_counter()
            batch, rate, fwdbwd, optim = flying
            saves = args.save_every > 0 and (done + 1) % args.save_every == 0
            # A state is saved between two steps, so nothing may be in flight behind it.
            ahead = done + 1 < total and not saves
            if ahead:
                flying = submit(done + 1)
            scored = sum(example.scored for example in batch)
            row = {"step": done + 1, "loss": fwdbwd.result().metrics["loss:sum"] / scored, "learning_rate": rate}
            row |= {"grad_norm": (optim.result().metrics or {}).get("grad_norm:mean"), "scored_tokens": scored}
            row |= {"tokens": sum(len(example.tokens) - 1 for example in batch)}
            row |= {"seconds": round(time.perf_counter() - began, 3)}
            done += 1
            report(row, total, args.log)
            if saves and done < total:
                save(client, args.name, done)
            if done < total and not ahead:
                flying = submit(done)
    except KeyboardInterrupt:
        # What was sent runs to its end, and so is part of what is saved.
        flying[3].result()
        return sent
    return done


def report(row: dict[str, Any], total: int, log: Path | None) -> None:
    print(f"step {row['step']}/{total}: loss {row['loss']:.4f}, {row['tokens'] / row['seconds']:,.0f} tokens/s")
    if log:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def save(client: Any, name: str, done: int) -> str:
    path = client.save_state(f"{name}-{done:06d}", overwrite=True).result().path
    print(f"state: {path}")
    return path


def main() -> int:
    args = arguments()
    service = jax_client.ServiceClient()
    first = 0
    if args.resume:
        first = resumed_step(args.resume)
        client = service.create_training_client_from_state_with_optimizer(args.resume).result()
    else:
        client = service.create_lora_training_client(
            base_model=args.model, rank=args.rank, seed=args.seed, train_unembed=not args.no_train_unembed
        ).result()
    examples = load_examples(client.get_tokenizer(), args)
    total = args.epochs * -(-len(examples) // args.batch_size)
    if first >= total:
        sys.exit(f"{args.resume} is at step {first} of {total}: nothing is left to do. Raise --epochs.")
    done = train(client, examples, first, total, args)
    state = save(client, args.name, done)
    if done < total:
        print(f"stopped; go on with: python {' '.join(without_resume(sys.argv))} --resume {state}")
        return 130
    print(f"sampler weights: {client.save_weights_for_sampler(f'{args.name}-{done:06d}').result().path}")
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
