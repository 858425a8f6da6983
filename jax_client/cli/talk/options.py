"""How is an answer sampled? `sample` and `chat` take the same options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, get_args

import click

from jax_client.config import DType

Command = TypeVar("Command", bound=Callable[..., object])


def sampling_options(command: Command) -> Command:
    """Add --max-tokens, --temperature, --seed and --dtype."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(get_args(DType)),
            default="auto",
            envvar="JAX_CLIENT_DTYPE",
            help="Of the weights; a server that is asked has its own.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Makes the answer repeatable; else each is another."),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.7,
            show_default=True,
            help="0 takes the likeliest token each time.",
        ),
        click.option(
            "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Where an answer is cut."
        ),
    ):
        command = option(command)
    return command
