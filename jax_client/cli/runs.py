"""`jax_client runs`: which training runs are on this machine, and how far is each? The answer is a table, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import click

from jax_client.cli import output
from jax_client.cli.options import base_model_of, find_run, json_option, open_store, reads_state

if TYPE_CHECKING:
    from jax_client.checkpoint.record import Record
    from jax_client.checkpoint.store import CheckpointStore


class RunEntry(TypedDict):
    """A run as --json shows it; None is what is not known.

    Attributes:
        steps: of the checkpoint with most.
        created, last_saved: UTC, ISO 8601.
        key: the name of the server's key whose run it is.
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
    owner: NotRequired[dict[str, object] | None]


@click.group("runs")
def runs_group() -> None:
    """Show the training runs of this machine."""


@runs_group.command("list")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Show the newest N only.")
@json_option
@reads_state
def list_runs(home: Path, limit: int | None, as_json: bool) -> None:
    """List the runs, newest first."""
    known = _runs(open_store(home))
    chosen = known[:limit]
    if as_json:
        output.print_json(chosen)
    elif not known:
        click.echo(f"No runs under {home}. A training client makes one; --state-dir looks elsewhere.", err=True)
    else:
        headers = ("CREATED", "LAST CHECKPOINT", "STEPS", "CHECKPOINTS", "SIZE", "RANK", "BASE MODEL", "RUN")
        output.print_table(headers, [_row(entry) for entry in chosen], right=("STEPS", "CHECKPOINTS", "SIZE", "RANK"))
        if len(chosen) < len(known):
            click.echo(f"{len(chosen)} of {len(known)} runs are shown.", err=True)


@runs_group.command("info")
@click.argument("run_id", metavar="RUN")
@json_option
@reads_state
def info(home: Path, run_id: str, as_json: bool) -> None:
    """Show one run. RUN is its id, or as much of the beginning as no other run shares."""
    store = open_store(home)
    known = {entry["run_id"]: entry for entry in _runs(store)}
    entry = known[find_run(list(known), run_id, home)]
    owner = store.lock_holder(entry["run_id"])
    entry["owner"] = None if owner is None else {"pid": owner.pid, "host": owner.host}
    if as_json:
        output.print_json([entry])
        return
    fields = {
        "run": entry["run_id"],
        "base model": output.shown(entry["base_model"]),
        "rank": output.shown(entry["rank"]),
        "created": output.human_time(entry["created"]),
        "steps": output.shown(entry["steps"]),
        "checkpoints": f"{entry['checkpoints']}, {output.human_size(entry['size_bytes'])}",
        "last checkpoint": output.shown(entry["last_checkpoint"]),
        "saved": output.human_time(entry["last_saved"]),
        "key": output.shown(entry["key"]),
        "open in": "no process" if owner is None else f"process {owner.pid} on {output.shown(owner.host)}",
    }
    fields |= {output.shown(key): output.shown(value) for key, value in (entry["user_metadata"] or {}).items()}
    output.print_fields(fields)


def _row(entry: RunEntry) -> tuple[str, ...]:
    return (
        output.human_time(entry["created"]),
        output.human_time(entry["last_saved"]),
        str(entry["steps"]),
        str(entry["checkpoints"]),
        output.human_size(entry["size_bytes"]),
        output.shown(entry["rank"]),
        output.shown(entry["base_model"]),
        entry["run_id"],
    )


def _runs(store: CheckpointStore) -> list[RunEntry]:
    """Return every run, newest first; a run whose own file is lost is described by its checkpoints."""
    described = dict(store.runs())
    saved: dict[str, list[Record]] = {}
    for record in store.list():
        saved.setdefault(record.run_id, []).append(record)
    known = [(run_id, described.get(run_id, {}), saved.get(run_id, [])) for run_id in {*described, *saved}]
    known.sort(key=lambda run: (_created(run[1], run[2]), run[0]), reverse=True)
    return [_as_json(*run) for run in known]


def _created(described: Mapping[str, Any], records: list[Record]) -> float:
    return described.get("created") or min((record.created for record in records), default=0.0)


def _as_json(run_id: str, described: Mapping[str, Any], records: list[Record]) -> RunEntry:
    """Return the entry of a run; `records` are in the order of saving."""
    last = records[-1] if records else None
    metadata = described or (last.metadata if last else {})
    return {
        "run_id": run_id,
        "base_model": base_model_of(metadata),
        "rank": metadata.get("spec", {}).get("rank"),
        "created": output.iso_time(_created(described, records)),
        "steps": max((record.step for record in records), default=0),
        "checkpoints": len(records),
        "size_bytes": sum(record.size_bytes for record in records),
        "last_checkpoint": str(last.key) if last else None,
        "last_saved": output.iso_time(last.created if last else None),
        "user_metadata": described.get("user_metadata"),
        "key": metadata.get("owner"),
    }
