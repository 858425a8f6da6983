"""How is an estimate shown? As fields and tables for people, as one object for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from jax_client.cli import output
from jax_client.cli.output import human_size

if TYPE_CHECKING:
    from jax_client.estimate.plan import Estimate, Range
    from jax_client.estimate.speed import Speed


def memory_of(found: Estimate) -> dict[str, int]:
    """Return the bytes of a device by kind, in the order in which they are taken."""
    layout = found.layout
    taken = {"weights": layout.weights, "adapter": layout.adapter, "moments": 2 * layout.adapter}
    if found.training is not None:
        taken |= found.training.parts
    if found.sampling is not None:
        taken["cache"] = layout.cache_bytes
        if found.sampling.whole:
            taken["weights to decode"] = found.sampling.whole
        taken["decoding"] = found.sampling.temporaries
    return taken


def verdicts(found: Estimate) -> dict[str, str]:
    """Return in words whether the model trains and samples."""
    layout, training, sampling = found.layout, found.training, found.sampling
    if training is None or sampling is None:
        short = human_size(layout.weights - layout.usable)
        return {"fits": f"no: the weights alone are {short} more than may be filled"}
    states = 3 * layout.adapter
    train_needs = layout.weights + states + sum(training.parts.values())
    said = {}
    if not training.fits:
        said["trains"] = f"no: {human_size(train_needs)} of {human_size(layout.usable)}"
    else:
        beside = "beside the cache" if training.beside_cache else "once the cache is released"
        said["trains"] = f"yes, {beside}: {human_size(train_needs)} of {human_size(layout.usable)}"
    if not sampling.rows:
        tokens = f"{sampling.cache_tokens:,} tokens in all"
        said["samples"] = f"no: the cache holds {tokens}, and no row of {found.question.sampled_tokens:,}"
    else:
        rows = min(found.question.sampled_rows, sampling.rows * layout.limits.ways)
        yes = "yes" if sampling.fits else "no, too little is left to decode"
        said["samples"] = f"{yes}: {rows} rows at once, a cache of {sampling.cache_tokens:,} tokens"
    return said


def print_estimate(model: str, found: Estimate, speed: Speed, hints: Sequence[str]) -> None:
    """Print what would be chosen, the memory, the verdicts and the times."""
    q, layout, training = found.question, found.layout, found.training
    chip = q.machine.chip
    mesh = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1) or "one device"
    fields = {
        "model": f"{model}, {q.dtype}, adapter of rank {q.spec.rank}",
        "machine": f"{q.machine.count} x {chip.kind}, {human_size(layout.usable)} of each may be filled",
        "mesh": mesh,
        "attention": layout.attention.name,
    }
    if training is not None:
        rows, length = training.largest.rows, training.largest.length
        count = len(training.plans)
        fields["micro-batch"] = (
            f"{rows} x {length:,} tokens, remat {training.remat}; {count} for {q.rows} x {q.length:,}"
        )
    output.print_fields(fields | verdicts(found))
    if hints:
        click.echo("Any of these would do: " + "; ".join(hints) + ".")
    click.echo("")
    rows = [[name, human_size(size)] for name, size in memory_of(found).items()]
    output.print_table(["OF EACH DEVICE", "SIZE"], rows, right=["SIZE"])
    click.echo("")
    output.print_fields(_times(found, speed))
    if q.machine.hosts > 1:
        click.echo(f"These devices are on {q.machine.hosts} hosts; so far one process computes on one host.")


def _times(found: Estimate, speed: Speed) -> dict[str, str]:
    q, times = found.question, {}
    if speed.call_seconds is not None and speed.tokens_per_second is not None:
        each = speed.tokens_per_second
        of_each = _range((each[1] / q.machine.count, each[0] / q.machine.count), "tokens/s")
        times["training"] = (
            f"{_seconds(speed.call_seconds)} a call; {_range((each[1], each[0]), 'tokens/s')}, {of_each} each"
        )
    if speed.decode_seconds is not None and speed.sampled_per_second is not None:
        rate = _range((speed.sampled_per_second[1], speed.sampled_per_second[0]), "tokens/s")
        times["decoding"] = f"{_seconds(speed.decode_seconds)} a step; {rate}"
    if speed.flops:
        recomputed = speed.hardware_flops / speed.flops - 1
        times["arithmetic"] = f"{speed.flops / 1e12:,.0f} TFLOP a call, {recomputed:.0%} more recomputed or padded"
    times["download"], times["load"] = _seconds(speed.download_seconds), _seconds(speed.load_seconds)
    times["programs"] = f"{speed.programs} to compile"
    return times


def _seconds(times: Range) -> str:
    if times[1] < 1:
        return f"{1000 * times[0]:.3g} to {1000 * times[1]:.3g} ms"
    return (
        f"{times[0]:.3g} to {times[1]:.3g} s" if times[1] < 600 else f"{times[0] / 60:.3g} to {times[1] / 60:.3g} min"
    )


def _range(ends: Range, unit: str) -> str:
    return f"{float(f'{ends[0]:.2g}'):,.0f} to {float(f'{ends[1]:.2g}'):,.0f} {unit}"


def as_object(
    model: str, found: Estimate, speed: Speed, hints: Sequence[str], accounts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return an estimate as --json shows it; bytes are of one device, ranges have the fastest first."""
    q, layout, training, sampling = found.question, found.layout, found.training, found.sampling
    chip = q.machine.chip
    trains = None
    if training is not None:
        trains = {
            "fits": training.fits,
            "fits_beside_cache": training.beside_cache,
            "micro_batch": [training.largest.rows, training.largest.length],
            "micro_batches": len(training.plans),
            "remat": training.remat,
        }
    samples = None
    if sampling is not None:
        samples = {
            "fits": sampling.fits,
            "rows": min(q.sampled_rows, sampling.rows * layout.limits.ways),
            "cache_tokens": sampling.cache_tokens,
        }
    return {
        "model": model,
        "machine": {"name": q.machine.name, "chip": asdict(chip), "count": q.machine.count, "hosts": q.machine.hosts},
        "mesh": dict(layout.mesh.shape),
        "dtype": q.dtype,
        "attention": layout.attention.name,
        "fits": found.fits,
        "usable_bytes": layout.usable,
        "memory_bytes": memory_of(found),
        "training": trains,
        "sampling": samples,
        "hints": list(hints),
        "speed": asdict(speed),
        "compiled": list(accounts),
    }


def print_accounts(accounts: Sequence[Mapping[str, Any]]) -> None:
    """Print what the compiler said of each program, beside the estimate."""
    if not accounts:
        return
    click.echo("")
    done = [account for account in accounts if "error" not in account]
    headers = ["PROGRAM", "COMPILED IN", "ARGUMENTS", "PADDING", "TEMPORARIES", "ESTIMATED", "PEAK"]
    rows = [
        [
            account["program"],
            f"{account['seconds']:.0f} s",
            human_size(account["arguments"]),
            f"{account['padding'] / account['arguments']:.2%}",
            human_size(account["temporaries"]),
            human_size(account["estimated"]) if account["estimated"] is not None else "-",
            human_size(account["peak"]) if account["peak"] is not None else "-",
        ]
        for account in done
    ]
    output.print_table(headers, rows, right=headers[1:])
    for account in done:
        if account["collectives"]:
            click.echo(f"\n{account['program']} sends, the largest first:")
        for each in account["collectives"][:8]:
            turns = " x ".join(str(n or "?") for n in (each["count"], *each["loops"]))
            click.echo(f"  {turns} {each['kind']} {each['shapes']}, {human_size(each['bytes'])}")
        if account["copies"]:
            click.echo(f"{account['program']} copies: {', '.join(account['copies'][:4])}")
    for account in accounts:
        if "error" in account:
            click.echo(
                f"error: {account['program']}: {output.shown(' '.join(account['error'].split()))[:600]}", err=True
            )
