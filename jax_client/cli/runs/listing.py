"""`jax_client runs list`: which training runs are on this machine? The answer is a table, or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jax_client.cli import output
from jax_client.cli.options import json_option, reads_state
from jax_client.cli.runs.entries import COLOURS, count, entry_of, figure, logs_option, open_overview

if TYPE_CHECKING:
    from jax_client.runs.overview.records import RunRow

MOST_OF_NAME = 32


@click.command("list")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Show the newest N only.")
@click.option("--archived", is_flag=True, help="Show the archived runs too.")
@logs_option
@json_option
@reads_state
def list_runs(home: Path, limit: int | None, archived: bool, logs: Sequence[Path], as_json: bool) -> None:
    """List the runs, that with the newest sign of life first."""
    every = open_overview(home, logs).runs()
    known = [row for row in every if archived or not row.archived]
    chosen = known[:limit]
    if as_json:
        output.print_json([entry_of(row) for row in chosen])
        return
    if not every:
        click.echo(f"No runs under {home}. A training client makes one; --state-dir looks elsewhere.", err=True)
        return
    _print(chosen)
    if len(chosen) < len(known):
        click.echo(f"{len(chosen)} of {len(known)} runs are shown.", err=True)
    if len(known) < len(every):
        click.echo(f"{len(every) - len(known)} archived runs are not shown; --archived shows them.", err=True)


def _print(rows: Sequence[RunRow]) -> None:
    has_reward = any(row.reward is not None for row in rows)
    headers = ["NAME", "STATE", "STEP", "LOSS", *(["REWARD"] if has_reward else []), "TOKENS", "UPDATED", "BASE MODEL"]
    cells = []
    for row in rows:
        name = output.shown(row.name)
        name = name if len(name) <= MOST_OF_NAME else f"{name[: MOST_OF_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        reward = [figure(row.reward)] if has_reward else []
        step = "-" if row.step is None else str(row.step)
        updated = output.human_time(output.iso_time(row.updated))
        model = output.shown(row.model)
        run = output.shown(row.run)
        cells.append([name, row.state, step, figure(row.loss), *reward, count(row.tokens), updated, model, run])
    right = ("STEP", "LOSS", "REWARD", "TOKENS")
    output.print_table([*headers, "RUN"], cells, right=right, colours={"STATE": COLOURS})
    for row in rows:
        for alert in row.alerts:
            click.secho(f"! {output.shown(row.name)}: {output.shown(alert.text)}", fg="yellow", err=True)
