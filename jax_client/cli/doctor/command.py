"""`jax_client doctor`: is this machine set up, and if not, what should the user do? The command runs every check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from jax_client.cli import output
from jax_client.cli.options import STATE_DIR_HELP, STATE_DIR_TYPE, GlobalOptions, json_option, open_store, state_home
from jax_client.errors import BadRequestError

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
@click.option("--state-dir", type=STATE_DIR_TYPE, metavar="DIR", help=STATE_DIR_HELP)
@click.pass_obj
def doctor(options: GlobalOptions, repair: bool, timeout: float, as_json: bool, state_dir: Path | None) -> None:
    """Check packages, devices and the state directory.

    Prints a line for each check: OK, WARN or FAIL, what was found, and what to do. Exits with 3 if one failed.
    """
    from jax_client.cli.doctor import devices, network, software, storage
    from jax_client.cli.doctor.finding import Check, run_checks

    places: dict[str, Check]
    try:
        home = state_home(options, state_dir)
        places = {
            "state dir": lambda: storage.state_directory(home),
            "compile cache": storage.compilation_cache,
            "clock and catalogue": lambda: storage.clock_and_catalogue(home),
        }
        if repair:
            count = open_store(home).repair()
            click.echo(f"The catalogue of {home} was built anew: {count} checkpoints.", err=True)
    except BadRequestError as error:
        nowhere = str(error)
        places = {
            "state dir": lambda: storage.no_state_directory(nowhere),
            "compile cache": storage.compilation_cache,
        }
    checks = {
        "python": software.python,
        "packages": software.packages,
        "device users": devices.users_of_devices,
        "devices": lambda: devices.devices(timeout),
        "proxy": network.proxies,
        "memory": storage.memory,
        **places,
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
