"""How is an answer sampled? `sample` and `chat` take the same options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])


def sampling_options(command: Command) -> Command:
    """Add --max-tokens, --temperature and --seed."""
    for option in (
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
