"""How is a run shown on a terminal, and as JSON? As a `RunEntry`, made of the overview's row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, TypeVar

import click

from jax_client.cli import output

if TYPE_CHECKING:
    from jax_client.runs.overview.records import RunRow
    from jax_client.runs.overview.rows import Overview

Command = TypeVar("Command", bound=Callable[..., object])
COLOURS = {
    "live": "green",
    "idle": "cyan",
    "done": "blue",
    "unloaded": "yellow",
    "crashed": "red",
    "unknown": "bright_black",
}


class RunEntry(TypedDict):
    """A run as --json shows it; None is what is not known.

    Attributes:
        steps: optimizer steps taken, as the metrics know them, else the checkpoints.
        created, last_saved, updated, ended: UTC, ISO 8601.
        key: the name of the server's key whose run it is.
        source: "run", or "log" of a log directory.
        owner: the process that has it open, only in `info`.
    """

    run_id: str
    base_model: str | None
    rank: int | None
    created: str | None
    steps: int
    key: str | None
    checkpoints: int
    size_bytes: int
    last_checkpoint: str | None
    last_saved: str | None
    user_metadata: dict[str, str] | None
    source: str
    name: str
    script: str | None
    state: str
    reason: str | None
    updated: str | None
    ended: str | None
    loss: float | None
    reward: float | None
    tokens: int | None
    tokens_per_second: float | None
    wall_seconds: float | None
    resumed_from: str | None
    parent: str | None
    children: list[str]
    pid: int | None
    host: str | None
    alerts: list[dict[str, object]]
    note: str
    tags: list[str]
    archived: bool
    owner: NotRequired[dict[str, object] | None]


def logs_option(command: Command) -> Command:
    """Add --logs, which the command gets as `logs`."""
    return click.option(
        "--logs",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        multiple=True,
        metavar="DIR",
        help="Show the log directories below it too, each with a metrics.jsonl.",
    )(command)


def open_overview(home: Path, logs: Sequence[Path]) -> Overview:
    """Open the overview of a state directory. The import takes numpy, so it waits until a command runs."""
    from jax_client.runs.overview.rows import Overview

    return Overview(home, logs=logs)


def entry_of(row: RunRow) -> RunEntry:
    """Return what --json shows of a row."""
    return {
        "run_id": row.run,
        "base_model": row.model,
        "rank": row.rank,
        "created": output.iso_time(row.created),
        "steps": row.step or 0,
        "checkpoints": row.checkpoints,
        "size_bytes": row.disk_bytes,
        "last_checkpoint": row.last_checkpoint,
        "last_saved": output.iso_time(row.last_saved),
        "user_metadata": None if row.user_metadata is None else dict(row.user_metadata),
        "key": row.key,
        "source": row.source,
        "name": row.name,
        "script": row.script,
        "state": row.state,
        "reason": row.reason,
        "updated": output.iso_time(row.updated),
        "ended": output.iso_time(row.ended),
        "loss": row.loss,
        "reward": row.reward,
        "tokens": row.tokens,
        "tokens_per_second": row.tokens_per_second,
        "wall_seconds": row.wall_seconds,
        "resumed_from": row.resumed_from,
        "parent": row.parent,
        "children": list(row.children),
        "pid": row.pid,
        "host": row.host,
        "alerts": [alert.to_json() for alert in row.alerts],
        "note": row.note,
        "tags": list(row.tags),
        "archived": row.archived,
    }


def count(number: float | None) -> str:
    """Return a number of tokens as people read it, such as "1.2 M"; "-" for None."""
    if number is None:
        return "-"
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.0f}{unit}" if not unit or number >= 99.95 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f} G"


def figure(value: float | None) -> str:
    """Return a loss or a reward with four digits; "-" for None."""
    return "-" if value is None else f"{value:.4g}"
