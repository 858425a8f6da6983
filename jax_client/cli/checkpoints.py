"""`jax_client checkpoint`: which checkpoints are on this machine, and are they whole?

The commands list, verify, delete, expire, export, download and import them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import click

from jax_client.cli import output
from jax_client.cli.options import (
    CheckpointPath,
    base_model_of,
    find_run,
    json_option,
    open_store,
    reads_state,
    wrong_usage,
)
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError, UnsupportedError

if TYPE_CHECKING:
    from jax_client.checkpoint.record import Record
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.runs.lifecycle.export import DType, Format
    from jax_client.values import CheckpointKey
    from jax_client.weights.write.peft import Program


class CheckpointEntry(TypedDict):
    """A checkpoint as --json shows it; None is what is not known.

    Attributes:
        created, expires_at: UTC, ISO 8601; None in `expires_at` is never.
        optimizer: whether Adam's moments are in it.
    """

    path: str
    run_id: str
    kind: str
    name: str
    created: str | None
    expires_at: str | None
    public: bool
    size_bytes: int
    step: int
    optimizer: bool
    base_model: str | None
    rank: int | None
    train_attn: bool | None
    train_mlp: bool | None
    train_unembed: bool | None
    user_metadata: dict[str, str] | None


class VerifyEntry(TypedDict):
    """The result of verifying a checkpoint: its size if it is whole, else the problem."""

    path: str
    status: Literal["OK", "DAMAGED", "NEWER"]
    size_bytes: int | None
    problem: str | None


@click.group("checkpoint")
def checkpoint() -> None:
    """List, check, delete, export and import checkpoints. A PATH is tinker://RUN/KIND/NAME."""


@checkpoint.command("list")
@click.argument("run_id", metavar="[RUN]", required=False)
@json_option
@reads_state
def list_checkpoints(home: Path, run_id: str | None, as_json: bool) -> None:
    """List the checkpoints of a run, or of all, newest first. RUN may be the beginning of its id."""
    store = open_store(home)
    records, where = store.list(), f"under {home}"
    if run_id is not None:
        known = {run for run, _ in store.runs()} | {record.run_id for record in records}
        run_id = find_run(sorted(known), run_id, home)
        records, where = [record for record in records if record.run_id == run_id], f"of run {run_id} {where}"
    found = [_as_json(record) for record in reversed(records)]
    if as_json:
        output.print_json(found)
    elif not found:
        click.echo(f"No checkpoints {where}. save_state makes one; --state-dir looks elsewhere.", err=True)
    else:
        headers = ("SAVED", "EXPIRES", "STEP", "SIZE", "BASE MODEL", "PATH")
        output.print_table(headers, [_row(entry) for entry in found], right=("STEP", "SIZE"))


@checkpoint.command("info")
@click.argument("path", type=CheckpointPath())
@json_option
@reads_state
def info(home: Path, path: CheckpointKey, as_json: bool) -> None:
    """Show one checkpoint."""
    entry = _as_json(open_store(home).record(path))
    if as_json:
        output.print_json([entry])
        return
    parts = {"attn": entry["train_attn"], "mlp": entry["train_mlp"], "unembed": entry["train_unembed"]}
    covers = [part for part, trained in parts.items() if trained]
    fields = {
        "path": entry["path"],
        "base model": output.shown(entry["base_model"]),
        "rank": output.shown(entry["rank"]),
        "covers": ", ".join(covers) or "-",
        "step": output.shown(entry["step"]),
        "optimizer": "with Adam's moments" if entry["optimizer"] else "weights only",
        "size": f"{output.human_size(entry['size_bytes'])} ({entry['size_bytes']} bytes)",
        "saved": output.human_time(entry["created"]),
        "expires": output.human_time(entry["expires_at"]) if entry["expires_at"] else "never",
    }
    fields |= {output.shown(key): output.shown(value) for key, value in (entry["user_metadata"] or {}).items()}
    output.print_fields(fields)


@checkpoint.command("verify")
@click.argument("paths", type=CheckpointPath(), nargs=-1, metavar="[PATH]...")
@json_option
@reads_state
def verify(home: Path, paths: tuple[CheckpointKey, ...], as_json: bool) -> None:
    """Compare every byte of checkpoints with its hash; of all checkpoints without a PATH.

    Prints a line for each, OK or DAMAGED, and exits with 1 if one is damaged. NEWER is a checkpoint that only a newer
    version of jax_client can read; it makes the exit code 1 too.
    """
    store = open_store(home)
    results = []
    for path in paths or store.everything():
        result = _verify(store, path)
        results.append(result)
        if not as_json:
            status = click.style(f"{result['status']:<8}", fg="green" if result["status"] == "OK" else "red", bold=True)
            click.echo(f"{status} {path}" + (f"  {output.shown(result['problem'])}" if result["problem"] else ""))
    _record(home, results)
    if as_json:
        output.print_json(results)
    elif not results:
        click.echo(f"No checkpoints under {home}.", err=True)
    if any(result["status"] != "OK" for result in results):
        raise click.exceptions.Exit(1)


@checkpoint.command("delete")
@click.argument("paths", type=CheckpointPath(), nargs=-1, required=True, metavar="PATH...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reads_state
def delete(home: Path, paths: tuple[CheckpointKey, ...], yes: bool) -> None:
    """Delete checkpoints, damaged or not, for good. Asks first; without a terminal, --yes must be given."""
    store = open_store(home)
    chosen = dict.fromkeys(paths)
    for path in chosen:
        if not store.exists(path):
            # For its error message; nothing is deleted unless all exist.
            store.record(path)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("there is no terminal to ask on, nothing was deleted; give --yes to delete.")
        for path in chosen:
            click.echo(f"{path}  {_size(store, path)}", err=True)
        if not click.confirm(f"Delete {_count(len(chosen))} for good?", err=True):
            click.echo("Nothing was deleted.", err=True)
            raise click.exceptions.Exit(1)
    for path in chosen:
        store.delete(path)
        click.echo(f"deleted {path}")


@checkpoint.command("ttl")
@click.argument("path", type=CheckpointPath())
@click.argument("seconds", metavar="SECONDS|never")
@reads_state
def ttl(home: Path, path: CheckpointKey, seconds: str) -> None:
    """Let a checkpoint expire SECONDS from now, or never."""
    from jax_client.runs.lifetimes import ttl as check_ttl  # `checks` would import the SDK

    with wrong_usage("SECONDS"):
        try:
            number = None if seconds == "never" else int(seconds)
        except ValueError:
            raise BadRequestError(f"{seconds!r} is neither a whole number nor 'never'.") from None
        lifetime = check_ttl(number)
    expires = output.iso_time(open_store(home).set_ttl(path, lifetime).expires_at)
    click.echo(f"{path} expires {output.human_time(expires) if expires else 'never'}")


@checkpoint.command("export")
@click.argument("path", type=CheckpointPath())
@click.option(
    "--format",
    "form",
    type=click.Choice(["peft", "merged"]),
    help="peft: the adapter alone. merged: the whole model with the adapter added to its weights.",
)
@click.option(
    "--for",
    "program",
    type=click.Choice(["peft", "vllm", "sglang"]),
    help="What will load the adapter; --format is peft then. An adapter on a tied output projection is for peft alone.",
)
@click.option(
    "--output",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="A directory that does not exist yet, or is empty.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the merged weights; an adapter is always float32.",
)
@reads_state
def export(
    home: Path, path: CheckpointKey, form: Format | None, program: Program | None, directory: Path, dtype: DType
) -> None:
    """Write a checkpoint as files that other programs load, then read them back and compare logits."""
    if form is None and program is None:
        raise click.UsageError("Missing option '--format'. Choose from: peft, merged; or give --for.")
    from jax_client.config import EngineConfig
    from jax_client.runs.lifecycle.export import export_checkpoint

    config = EngineConfig(state_dir=home, precompile=False, autosave_minutes=None)
    report = export_checkpoint(
        open_store(home),
        path,
        directory,
        form or "peft",
        dtype,
        config,
        program,
    )
    click.echo(f"{report.directory}: {report.files} files, {output.human_size(report.size_bytes)}")
    if report.check is None:
        click.echo(f"not checked: {report.unchecked}")
    else:
        click.echo(
            f"OK: read back, the files compute what the checkpoint computes (logits of {report.check.tokens} tokens "
            f"are equal up to rounding: {report.check.difference:.1g}, allowed {report.check.tolerance:.1g})"
        )


@checkpoint.command("download")
@click.argument("path", type=CheckpointPath())
@click.option("--from", "url", required=True, metavar="URL", help="Of the server, such as http://host:8000.")
@click.option(
    "--output",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="A directory that does not exist yet, or is empty.",
)
def download(path: CheckpointKey, url: str, directory: Path) -> None:
    """Fetch a checkpoint of a server as a PEFT adapter.

    PATH is of kind external_weights, or of kind weights, which the server then exports for this download.
    TINKER_API_KEY is the key of the server.
    """
    from jax_client.clients.download import download_adapter

    sizes = download_adapter(url, path, directory)
    click.echo(f"{directory}: {len(sizes)} files, {output.human_size(sum(sizes.values()))}")


@checkpoint.command("import")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR")
@click.option("--base-model", required=True, metavar="NAME", help="The model that the adapter was trained on.")
@click.option("--name", default="imported", show_default=True, help="Of the new checkpoint.")
@reads_state
def import_(home: Path, directory: Path, base_model: str, name: str) -> None:
    """Take in a PEFT adapter as a checkpoint of a new run, to sample from or to train on.

    The last line on stdout is its path.
    """
    from jax_client.runs import checks
    from jax_client.runs.lifecycle.export import import_adapter

    with wrong_usage("--name"):
        checks.checkpoint_name(name)
    path = import_adapter(open_store(home), directory, base_model, name)
    click.echo("The optimizer starts fresh: create_training_client_from_state takes this path.")
    click.echo(path)


def _as_json(record: Record) -> CheckpointEntry:
    metadata = record.metadata
    spec = metadata.get("spec", {})
    return {
        "path": str(record.key),
        "run_id": record.run_id,
        "kind": record.kind,
        "name": record.name,
        "created": output.iso_time(record.created),
        "expires_at": output.iso_time(record.expires_at),
        "public": record.public,
        "size_bytes": record.size_bytes,
        "step": record.step,
        "optimizer": bool(metadata.get("optimizer")),
        "base_model": base_model_of(metadata),
        "rank": spec.get("rank"),
        "train_attn": spec.get("train_attn"),
        "train_mlp": spec.get("train_mlp"),
        "train_unembed": spec.get("train_unembed"),
        "user_metadata": metadata.get("user_metadata"),
    }


def _row(entry: CheckpointEntry) -> tuple[str, ...]:
    return (
        output.human_time(entry["created"]),
        output.human_time(entry["expires_at"]) if entry["expires_at"] else "never",
        output.shown(entry["step"]),
        output.human_size(entry["size_bytes"]),
        output.shown(entry["base_model"]),
        entry["path"],
    )


def _record(home: Path, results: Sequence[VerifyEntry]) -> None:
    """Keep what was found, for listings; a directory that cannot be written keeps nothing."""
    from jax_client.runs.overview.verified import Verified

    found = {result["path"]: result["problem"] for result in results if result["status"] != "NEWER"}
    if found:
        with contextlib.suppress(RequestFailedError):
            Verified(home).record_all(found)


def _verify(store: CheckpointStore, path: CheckpointKey) -> VerifyEntry:
    try:
        size = store.verify(path).size_bytes
    except UnsupportedError as error:
        return {"path": str(path), "status": "NEWER", "size_bytes": None, "problem": str(error)}
    except RequestFailedError as error:
        return {"path": str(path), "status": "DAMAGED", "size_bytes": None, "problem": str(error)}
    return {"path": str(path), "status": "OK", "size_bytes": size, "problem": None}


def _size(store: CheckpointStore, path: CheckpointKey) -> str:
    try:
        return output.human_size(store.record(path).size_bytes)
    except (NotFoundError, RequestFailedError, UnsupportedError):
        return "damaged"


def _count(number: int) -> str:
    return "1 checkpoint" if number == 1 else f"{number} checkpoints"
