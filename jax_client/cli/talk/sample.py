"""`jax_client sample`: what does a model answer, once? The answer alone goes to stdout."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from jax_client.cli import output
from jax_client.cli.options import json_option, reads_state
from jax_client.cli.talk.options import sampling_options
from jax_client.cli.talk.voice import on_terminal, opened
from jax_client.config import DType


@click.command("sample")
@click.argument("name", metavar="PATH|MODEL")
@click.option(
    "--prompt",
    required=True,
    metavar="TEXT",
    help="What the model continues, or answers with --chat; - reads it from stdin.",
)
@click.option("--chat", is_flag=True, help="Give the prompt as a user's message, through the model's chat template.")
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True, help="How many answers.")
@sampling_options
@json_option
@reads_state
def sample(
    home: Path,
    name: str,
    prompt: str,
    chat: bool,
    num_samples: int,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    dtype: DType,
    as_json: bool,
) -> None:
    """Sample from a checkpoint (tinker://RUN/KIND/NAME) or a base model.

    Several answers have a line --- between them. The command computes in this process; where TINKER_BASE_URL is set, on
    that server.
    """
    from tinker import types

    text = sys.stdin.read() if prompt == "-" else prompt
    with opened(home, name, dtype, tells=not as_json) as voice:
        tokens = voice.encode_chat([{"role": "user", "content": text}]) if chat else voice.encode(text)
        params = types.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        answers = [(voice.decode(each.tokens), each) for each in voice.ask(tokens, num_samples, params)]
    if as_json:
        output.print_json(
            [
                {
                    "text": answer,
                    "tokens": list(each.tokens),
                    "logprobs": list(each.logprobs or []),
                    "stop_reason": each.stop_reason,
                }
                for answer, each in answers
            ]
        )
        return
    shown = on_terminal if sys.stdout.isatty() else str
    click.echo("\n---\n".join(shown(answer) for answer, _ in answers))
    cut = sum(each.stop_reason == "length" for _, each in answers)
    if cut:
        which = "the answer was" if len(answers) == 1 else f"{cut} of {len(answers)} answers were"
        click.echo(f"{which} cut at {max_tokens} tokens (--max-tokens)", err=True)
