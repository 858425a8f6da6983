"""`jax_client doctor`: is this machine set up, and if not, what should the user do? The command runs every check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from jax_client.cli import output
from jax_client.cli.options import json_option, open_store, reads_state

_COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@click.command("doctor")
@click.option("--repair", is_flag=True, help="Build the catalogue anew from the checkpoints' own files first.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long jax may take to start.",
)
@json_option
@reads_state
def doctor(home: Path, repair: bool, timeout: float, as_json: bool) -> None:
    """Check packages, devices and the state directory.

    Prints a line for each check: OK, WARN or FAIL, what was found, and what to do. Exits with 3 if one failed.
    """
    from jax_client.cli.doctor import devices, software, storage
    from jax_client.cli.doctor.finding import run_checks

    if repair:
        count = open_store(home).repair()
        click.echo(f"The catalogue of {home} was built anew: {count} checkpoints.", err=True)
    checks = {
        "python": software.python,
        "packages": software.packages,
        "device users": devices.users_of_devices,
        "devices": lambda: devices.devices(timeout),
        "memory": storage.memory,
        "state dir": lambda: storage.state_directory(home),
        "compile cache": storage.compilation_cache,
        "clock and catalogue": lambda: storage.clock_and_catalogue(home),
    }
    findings = []
    for finding in run_checks(checks):
        findings.append(finding)
        if not as_json:
            status = click.style(f"{finding.status:<5}", fg=_COLOURS[finding.status], bold=True)
            advice = f"  -> {finding.advice}" if finding.advice else ""
            click.echo(f"{status} {finding.check:<17} {output.shown(finding.found)}{advice}")
    if as_json:
        output.print_json([asdict(finding) for finding in findings])
    if any(finding.status == "FAIL" for finding in findings):
        raise click.exceptions.Exit(3)
