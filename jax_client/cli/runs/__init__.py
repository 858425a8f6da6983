"""`jax_client runs`: which training runs are on this machine, and how does each do?"""

from __future__ import annotations

import click

from jax_client.cli.runs.info import info
from jax_client.cli.runs.listing import list_runs
from jax_client.cli.runs.watch import watch


@click.group("runs")
def runs_group() -> None:
    """Show the training runs of this machine."""


for _command in (list_runs, info, watch):
    runs_group.add_command(_command)
