"""Does it work on this machine? Fine-tune the bundled model on a persona, and compare its answers before and after."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import jax_client
from chat_data import Example, batches, read_conversations, render
from jax_client import types
from showing import answer_table, answers, command_line, draw_losses

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = Path(__file__).parent / "data" / "lighthouse_keeper.jsonl"
UNSEEN = (
    "How do I make a cup of tea?",
    "What is a computer?",
    "I lost my keys. What now?",
    "Why should I read books?",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=22, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="conversations per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, decays linearly to a tenth")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument(
        "--no-train-unembed", action="store_true", help="no adapter on the output projection: vLLM, SGLang take it then"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial adapter and the order of the data")
    parser.add_argument("--out", type=Path, default=Path("quickstart_out"), help="folder for loss.png")
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    return args


def train(client: Any, examples: Sequence[Example], args: argparse.Namespace, console: Console) -> list[float]:
    """Run the loop, one step ahead of the device; return each step's loss per scored token, in nats."""
    stream = batches(examples, args.batch, args.seed)

    def submit(step: int) -> tuple[list[Example], Any, Any]:
        batch = next(stream)
        rate = args.lr * (1.0 - 0.9 * step / args.steps)
        fwdbwd = client.forward_backward([example.datum for example in batch], "cross_entropy")
        return batch, fwdbwd, client.optim_step(types.AdamParams(learning_rate=rate))

    losses: list[float] = []
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "compiling the training step (once; kept for the next start)", total=args.steps, info=""
        )
        flying = submit(0)
        began, tokens = time.perf_counter(), 0
        for step in range(args.steps):
            batch, fwdbwd, optim = flying
            if step + 1 < args.steps:
                flying = submit(step + 1)
            losses.append(fwdbwd.result().metrics["loss:sum"] / sum(example.scored for example in batch))
            optim.result()
            if step == 0:  # the first step compiles: the speed counts from here
                began = time.perf_counter()
            else:
                tokens += sum(len(example.tokens) - 1 for example in batch)
            speed = f", {tokens / (time.perf_counter() - began):,.0f} tokens/s" if step else ""
            progress.update(task, advance=1, description="training", info=f"loss {losses[-1]:.3f}{speed}")
            if not console.is_terminal and (step == 0 or (step + 1) % 6 == 0):
                console.print(f"step {step + 1}/{args.steps}: loss {losses[-1]:.3f} nats per token{speed}")
    return losses


def settings(service: Any) -> str:
    """Say in one line what `auto` chose."""
    described = service.describe()
    device, mesh = described["device"], described["mesh"]
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{device['kind']}, {described['dtype']}, {sizes}"


def programs(service: Any) -> str:
    """Say in one line what was compiled, and what an earlier start had left."""
    compiled = service.describe()["compiled"]
    new = [record["seconds"] for record in compiled if not record["cached"]]
    return f"programs: {len(new)} compiled in {sum(new):.0f} s, {len(compiled) - len(new)} kept from an earlier start"


def main() -> int:
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # A terminal shows it here; elsewhere jax_client writes a line for what takes long.
    config = jax_client.EngineConfig(progress=not console.is_terminal)
    with console.status(f"loading {MODEL}"):
        service = jax_client.ServiceClient(config=config)
        client = service.create_lora_training_client(
            base_model=MODEL, rank=args.rank, seed=args.seed, train_unembed=not args.no_train_unembed
        ).result()
        tokenizer = client.get_tokenizer()
    console.print(f"loaded {MODEL} in {time.perf_counter() - start:.1f} s ({settings(service)})")
    examples = [render(tokenizer, messages) for messages in read_conversations(DATA)]
    total = sum(len(example.tokens) for example in examples)
    console.print(f"{len(examples)} conversations, {total:,} tokens, from {DATA.name}")

    unseen = [[{"role": "user", "content": prompt}] for prompt in UNSEEN]
    with console.status("compiling the sampler, then asking the model as it is"):
        before = answers(service.create_sampling_client(base_model=MODEL).result(), tokenizer, unseen)
    losses = train(client, examples, args, console)
    state = client.save_state("quickstart", overwrite=True).result().path
    weights = client.save_weights_for_sampler("quickstart").result().path
    with console.status("asking the trained model"):
        after = answers(service.create_sampling_client(model_path=weights).result(), tokenizer, unseen)

    console.print(answer_table(UNSEEN, before, after, "prompt (not in the data)"))
    title = "SmolLM2-135M learns to keep a lighthouse"
    draw_losses(dict(enumerate(losses, start=1)), {}, args.out / "loss.png", title)
    console.print(f"loss per token: {losses[0]:.3f} -> {losses[-1]:.3f}; curve in {args.out / 'loss.png'}")
    console.print(f"state:   {state}\nsampler: {weights}", soft_wrap=True)
    console.print("resume:  client = service.create_training_client_from_state_with_optimizer(")
    console.print(f'             "{state}").result()', soft_wrap=True)
    console.print(programs(service))
    console.print(f"done in {time.perf_counter() - start:.0f} s")
    service.close("success").result()
    console.print(f"talk to it:\n  {command_line('chat', weights)}", soft_wrap=True)
    console.print(f"see its curves, and ask it beside the base model:\n  {command_line('dashboard')}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
