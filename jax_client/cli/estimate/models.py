"""`jax_client model list`: which models are on this machine, and which of them train and sample here?"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import click

from jax_client.cli import output
from jax_client.cli.options import json_option
from jax_client.errors import JaxClientError

if TYPE_CHECKING:
    from jax_client.estimate.chips import Machine


@click.group("model")
def model_group() -> None:
    """Show the models of this machine."""


@model_group.command("list")
@click.option("--on", "machine", metavar="MACHINE", help="What fits there instead, such as v5e-8.")
@json_option
def list_models(machine: str | None, as_json: bool) -> None:
    """List the models that load without a network, and what of them fits in this machine's devices."""
    from jax_client.cli.estimate.machine import this_machine
    from jax_client.estimate.chips import parse_machine
    from jax_client.weights.read.source import local_models

    where = this_machine() if machine is None else parse_machine(machine)
    entries = [_entry(name, where) for name in local_models()]
    if as_json:
        output.print_json(entries)
    elif not entries:
        click.echo("No models on this machine yet. Naming one, as in --model Qwen/Qwen3-4B, downloads it.", err=True)
    else:
        output.print_table(["WEIGHTS", "TRAINS", "SAMPLES", "MODEL"], list(map(_shown, entries)), right=["WEIGHTS"])


class Entry(TypedDict):
    """A model as --json shows it.

    Attributes:
        weights_bytes: of each device.
        trains, samples: in words; null where the weights do not fit.
        problem: why nothing can be said; null where something can.
    """

    model: str
    fits: bool
    weights_bytes: int | None
    trains: str | None
    samples: str | None
    problem: str | None


def _entry(name: str, where: Machine) -> Entry:
    from jax_client.cli.estimate.text import verdicts
    from jax_client.estimate.plan import Question, estimate
    from jax_client.weights.read.load import read_config
    from jax_client.weights.read.source import resolve_config

    try:
        model = read_config(resolve_config(name))
        dtype = "float32" if where.chip.platform == "cpu" else "bfloat16"
        found = estimate(Question(model=model, machine=where, dtype=dtype))
    except JaxClientError as error:
        return Entry(model=name, fits=False, weights_bytes=None, trains=None, samples=None, problem=str(error))
    said = verdicts(found)
    return Entry(
        model=name,
        fits=found.fits,
        weights_bytes=found.layout.weights,
        trains=said.get("trains"),
        samples=said.get("samples"),
        problem=said.get("fits"),
    )


def _shown(entry: Entry) -> list[str]:
    size = "-" if entry["weights_bytes"] is None else output.human_size(entry["weights_bytes"])
    said = [entry["trains"] or entry["problem"], entry["samples"]]
    return [size, *map(output.shown, said), output.shown(entry["model"])]
