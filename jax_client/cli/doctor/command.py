"""`jax_client doctor`: is this machine set up, and if not, what should the user do? The command runs every check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jax_client.cli import output
from jax_client.cli.doctor.errors import ALL, print_errors
from jax_client.cli.options import STATE_DIR_HELP, STATE_DIR_TYPE, GlobalOptions, open_store, state_home, wrong_usage
from jax_client.errors import BadRequestError

if TYPE_CHECKING:
    from jax_client.cli.doctor.finding import Check

_COLOURS = {"OK": "green", "PASS": "green", "WARN": "yellow", "FAIL": "red", "SKIP": "blue"}
_STDOUT = "-"


@click.command("doctor")
@click.option("--repair", is_flag=True, help="Build the catalogue anew from the checkpoints' own files first.")
@click.option(
    "--selftest",
    is_flag=True,
    help="Also compute on the devices, for two minutes: numbers, kernels, mesh and speed, with tiny random weights.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long jax, and a cluster, may take to answer.",
)
@click.option(
    "--json",
    "target",
    is_flag=False,
    flag_value=_STDOUT,
    metavar="[FILE]",
    help="Print JSON and nothing else; with a FILE, write it there beside the table.",
)
@click.option(
    "--errors",
    "error",
    is_flag=False,
    flag_value=ALL,
    metavar="[NAME]",
    help="Print what each error class means and what to do about it, or the one of that NAME; checks nothing.",
)
@click.option("--state-dir", type=STATE_DIR_TYPE, metavar="DIR", help=STATE_DIR_HELP)
@click.pass_obj
def doctor(
    options: GlobalOptions,
    repair: bool,
    selftest: bool,
    timeout: float,
    target: str | None,
    error: str | None,
    state_dir: Path | None,
) -> None:
    """Check packages, devices and the state directory.

    Prints a line for each check: OK, WARN or FAIL, what was found, and what to do. Exits with 3 if one failed.
    """
    from jax_client.cli.doctor.finding import run_checks
    from jax_client.cli.doctor.selftest import run_selftest

    if error is not None:
        with wrong_usage("--errors"):
            print_errors(error, as_json=target is not None)
        return
    quiet, findings = target == _STDOUT, []
    for finding in run_checks(_checks(options, repair, timeout, state_dir)):
        findings.append(finding)
        if not quiet:
            _show(finding.status, finding.check, output.shown(finding.found), finding.advice)
    failed = any(finding.status == "FAIL" for finding in findings)
    answer: list[dict[str, object]] | dict[str, object] = [asdict(finding) for finding in findings]
    if selftest:
        if any(finding.check == "devices" and finding.status == "FAIL" for finding in findings):
            click.echo("The self-test is left out: there is no device to run it on.", err=True)
        else:
            if not quiet:
                click.echo("\nSelf-test, with tiny random weights:")
            report = run_selftest(lambda row: None if quiet else _show_row(row))
            failed |= bool(report.failed)
            if not quiet:
                verdict = f"failed: {', '.join(report.failed)}" if report.failed else "nothing failed"
                click.echo(f"{len(report.rows)} checks in {report.seconds:.0f} s, {verdict}.")
            answer = {"findings": answer, "selftest": asdict(report)}
    if quiet:
        click.echo(json.dumps(answer, indent=2))
    elif target is not None:
        Path(target).write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
        click.echo(f"Written to {target}: paste it into an issue.", err=True)
    if failed:
        raise click.exceptions.Exit(3)


def _show(status: str, check: str, found: str, advice: str) -> None:
    styled = click.style(f"{status:<5}", fg=_COLOURS[status], bold=True)
    click.echo(f"{styled} {check:<17} {found}" + (f"  -> {advice}" if advice else ""))


def _show_row(row: Mapping[str, Any]) -> None:
    styled = click.style(f"{row['verdict']:<5}", fg=_COLOURS[row["verdict"]], bold=True)
    bar = f" ({row['bar']})" if row["bar"] else ""
    meaning = output.shown(row["meaning"])
    if row["verdict"] == "SKIP":
        click.echo(f"{styled} {row['check']:<34} {meaning}")
    else:
        click.echo(f"{styled} {row['check']:<34} {row['measured']}{bar}" + (f"  -> {meaning}" if meaning else ""))


def _checks(options: GlobalOptions, repair: bool, timeout: float, state_dir: Path | None) -> Mapping[str, Check]:
    """Return the checks by name; with `repair`, build the catalogue anew first."""
    from jax_client.cli.doctor import devices, hosts, network, software, storage

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
    return {
        "python": software.python,
        "packages": software.packages,
        "device users": devices.users_of_devices,
        "devices": lambda: devices.devices(timeout),
        "hosts": lambda: hosts.hosts(timeout),
        "proxy": network.proxies,
        "memory": storage.memory,
        **places,
    }
