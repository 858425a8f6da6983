"""`jax_client estimate`: will a model train and sample on a machine that is not here, and how fast?"""

from __future__ import annotations

import re
from typing import Any, get_args

import click

from jax_client.cli import output
from jax_client.cli.options import wrong_usage
from jax_client.cli.setting_types import Mesh
from jax_client.cli.stages import say
from jax_client.config import Remat

DTYPES = ("bfloat16", "float32")


class SampleSize(click.ParamType):
    """Rows and tokens of each: ROWSxTOKENS."""

    name = "rowsxtokens"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text, or fail as wrong usage."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,6})", str(value))
        if found is None:
            self.fail(f"{value!r} is no size; give rows and tokens of each, such as 128x2048.", param, ctx)
        return int(found[1]), int(found[2])


_POSITIVE = click.IntRange(1, 2**20)


@click.command("estimate")
@click.argument("model", metavar="MODEL")
@click.option("--on", "machine", metavar="MACHINE", help="Such as v5e-8, v5p-8, h100 or h100-8; else this machine.")
@click.option("--mesh", type=Mesh(), default="auto", show_default=True, help="Such as fsdp=4,tensor=2.")
@click.option("--rank", type=click.IntRange(1, 512), default=32, show_default=True, help="Of the adapter.")
@click.option("--no-train-unembed", is_flag=True, help="An adapter without the output projection.")
@click.option("--length", type=_POSITIVE, default=4096, show_default=True, help="Tokens of a training sequence.")
@click.option("--rows", type=_POSITIVE, default=32, show_default=True, help="Sequences of a training call.")
@click.option(
    "--sample",
    type=SampleSize(),
    default="128x2048",
    show_default=True,
    help="Rows that are sampled together, and tokens of each.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of the weights.")
@click.option("--remat", type=click.Choice(get_args(Remat)), default="auto", show_default=True)
@click.option("--max-tokens-per-micro-batch", "max_tokens", type=click.IntRange(16), help="As of EngineConfig.")
@click.option("--memory-fraction", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option(
    "--compile", "compiles", is_flag=True, help="Also ask XLA's compiler; takes minutes, and the extra 'aot'."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of one object, and nothing else.")
def estimate(
    model: str,
    machine: str | None,
    mesh: Any,
    rank: int,
    no_train_unembed: bool,
    length: int,
    rows: int,
    sample: tuple[int, int],
    compiles: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Estimate what MODEL takes on a machine, what is chosen there, and how fast it is.

    MODEL is a directory with config.json, or a hub name; no weights are read. Exits with 1 where it does not fit.
    """
    from jax_client.cli.estimate import text
    from jax_client.cli.estimate.machine import this_machine
    from jax_client.estimate import plan
    from jax_client.estimate.chips import parse_machine
    from jax_client.estimate.compile import compile_programs
    from jax_client.estimate.speed import speed
    from jax_client.values import LoraSpec
    from jax_client.weights.read.load import read_config
    from jax_client.weights.read.source import resolve_config

    with wrong_usage("--on"):
        where = this_machine() if machine is None else parse_machine(machine)
    question = plan.Question(
        model=read_config(resolve_config(model)),
        machine=where,
        mesh=mesh,
        spec=LoraSpec(rank=rank, seed=0, train_unembed=not no_train_unembed),
        rows=rows,
        length=length,
        sampled_rows=sample[0],
        sampled_tokens=sample[1],
        **settings,
    )
    with wrong_usage("--mesh"):
        found = plan.estimate(question)
    helps = [] if found.fits else plan.hints(question)
    if not as_json:
        text.print_estimate(model, found, speed(found), helps)
    accounts = []
    for account in compile_programs(found) if compiles else ():
        accounts.append(account)
        say(f"compiled {account['program']}" if "error" not in account else f"{account['program']} does not compile")
    if as_json:
        output.print_json([text.as_object(model, found, speed(found), helps, accounts)])
    else:
        text.print_accounts(accounts)
    if not found.fits or any(account.get("error") for account in accounts):
        raise click.exceptions.Exit(1)
