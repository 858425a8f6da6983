"""`jax_client runs info`: how does one run do, what has it saved, and where does it come from?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from jax_client.cli import output
from jax_client.cli.options import find_run, json_option, reads_state
from jax_client.cli.runs.entries import COLOURS, count, entry_of, figure, logs_option, open_overview


@click.command("info")
@click.argument("run_id", metavar="RUN")
@logs_option
@json_option
@reads_state
def info(home: Path, run_id: str, logs: Sequence[Path], as_json: bool) -> None:
    """Show one run. RUN is its id, or as much of the beginning as no other run shares."""
    from jax_client.runs.overview.records import OPEN

    rows = {row.run: row for row in open_overview(home, logs).runs()}
    row = rows[find_run(list(rows), run_id, home)]
    entry, is_open = entry_of(row), row.state in OPEN
    entry["owner"] = {"pid": row.pid, "host": row.host} if is_open else None
    if as_json:
        output.print_json([entry])
        return
    speed = "" if row.tokens_per_second is None else f", {row.tokens_per_second:.0f} a second"
    fields = {
        "run": output.shown(row.run),
        "name": output.shown(row.name),
        "state": click.style(row.state, fg=COLOURS[row.state]),
        "why": output.shown(row.reason),
        "base model": output.shown(row.model),
        "rank": output.shown(row.rank),
        "script": output.shown(row.script),
        "created": output.human_time(entry["created"]),
        "updated": output.human_time(entry["updated"]),
        "steps": output.shown(row.step),
        "loss": figure(row.loss),
        "reward": figure(row.reward),
        "tokens": f"{count(row.tokens)}{speed}",
        "checkpoints": f"{row.checkpoints}, {output.human_size(row.disk_bytes)}",
        "last checkpoint": output.shown(row.last_checkpoint),
        "saved": output.human_time(entry["last_saved"]),
        "resumed from": output.shown(row.resumed_from),
        "continued by": output.shown(", ".join(row.children) or None),
        "key": output.shown(row.key),
        "open in": f"process {row.pid} on {output.shown(row.host)}" if is_open else "no process",
        "note": output.shown(row.note or None),
        "tags": output.shown(", ".join(row.tags) or None),
    }
    fields = {name: value for name, value in fields.items() if value != "-"}
    fields |= {output.shown(key): output.shown(value) for key, value in (row.user_metadata or {}).items()}
    output.print_fields(fields)
    for alert in row.alerts:
        click.secho(f"! {output.shown(alert.text)}", fg="yellow", err=True)
