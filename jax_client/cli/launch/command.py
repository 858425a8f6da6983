"""`jax_client launch -- PROGRAM`: how do several hosts run one program? The same command is run on each of them.

The first one runs the program; all of them are hosts of a Ray cluster that lives as long as the program does.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib import util

import click

from jax_client.cli.launch.finding.addresses import own_address
from jax_client.cli.launch.finding.places import Places, find_places
from jax_client.cli.launch.messages import say
from jax_client.cli.launch.plan import RAY_VARIABLES, Plan
from jax_client.cli.launch.tokens import authentication, no_authentication
from jax_client.cli.program.child import Child, check_program
from jax_client.cli.program.command import CONTEXT, METAVAR, ProgramCommand
from jax_client.errors import BadRequestError, UnsupportedError

# Ray gives these to its workers.
_TAKEN_PORTS = range(10002, 20000)


@click.command("launch", cls=ProgramCommand, no_args_is_help=True, options_metavar=METAVAR, context_settings=CONTEXT)
@click.option("--hosts", metavar="NAME,NAME,...", help="All hosts, in the same order on each; else they are found.")
@click.option("--host-index", type=click.IntRange(0), metavar="I", help="This host among --hosts, from 0.")
@click.option("--port", type=click.IntRange(1, 65535), default=6379, show_default=True, help="Of Ray, on host 0.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="In which all hosts must have joined.",
)
@click.option(
    "--restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="How often the program runs anew after a host was lost (exit code 75), once all hosts are there again.",
)
@click.option(
    "--no-auth", is_flag=True, help="No token: anyone who reaches the hosts' private network runs code there."
)
@click.pass_context
def launch(ctx: click.Context, **_: object) -> None:
    """Run a program on several hosts: the same command is run on each of them.

    \b
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="jax_client launch -- python train.py"
    srun --ntasks-per-node=1 jax_client launch -- python train.py
    jax_client launch --hosts a,b -- python train.py

    The program runs once, on host 0, and computes on all; every launch ends with its exit code. The hosts share a
    secret that you make once. On one host the program is just run. docs/clusters.md has more.
    """
    program: list[str] = ctx.args
    if not program:
        raise click.UsageError("there is no program; give it after --, as in 'launch -- python train.py'.", ctx)
    try:
        places = find_places(ctx.params["hosts"], ctx.params["host_index"], os.environ)
    except (BadRequestError, UnsupportedError) as error:
        raise click.UsageError(str(error), ctx) from None
    if places.index == 0:
        check_program(program[0])
    if len(places.names) == 1:
        raise click.exceptions.Exit(Child().run(program, os.environ))
    raise click.exceptions.Exit(_on_several(ctx, places, program))


def _on_several(ctx: click.Context, places: Places, program: list[str]) -> int:
    port, timeout = ctx.params["port"], ctx.params["timeout"]
    if port in _TAKEN_PORTS:
        last = _TAKEN_PORTS.stop - 1
        raise click.UsageError(f"--port {port}: Ray gives {_TAKEN_PORTS.start} to {last} to its workers.", ctx)
    if address := os.environ.get("RAY_ADDRESS"):
        raise click.UsageError(
            f"RAY_ADDRESS is {address!r}: this host belongs to a Ray cluster. Run the program in it without launch, "
            "once, with JAX_CLIENT_HOSTS=ray; or unset RAY_ADDRESS.",
            ctx,
        )
    if util.find_spec("ray") is None:
        raise ModuleNotFoundError(
            "a program on several hosts needs Ray, which is not installed: pip install 'jax_client[cluster]' on every "
            "host"
        )
    plan = Plan(places=places, port=port, timeout=timeout, restarts=ctx.params["restarts"], environment={})
    try:
        allowed = {} if ctx.params["no_auth"] else authentication(os.environ, _others(places))
        own = _own_address(plan)
        if ctx.params["no_auth"]:
            allowed = no_authentication(own)
    except BadRequestError as error:
        raise click.UsageError(str(error), ctx) from None
    plan = replace(plan, environment=dict(os.environ) | RAY_VARIABLES | allowed)
    # Imported here: one host needs none of it.
    from jax_client.cli.launch.follower import follow
    from jax_client.cli.launch.leader import lead

    return lead(plan, own, program) if places.index == 0 else follow(plan, own)


def _others(places: Places) -> tuple[str, ...]:
    return places.names[: places.index] + places.names[places.index + 1 :]


def _own_address(plan: Plan) -> str:
    """Return the address of this host, once it is known: the name of a pod is so a while after its start."""
    names, index = plan.places.names, plan.places.index
    end, said = time.monotonic() + plan.timeout, False
    while (found := own_address(names, index)) is None:
        if time.monotonic() > end:
            raise click.ClickException(
                f"no address of this host ({plan.label(index)}) was found in {plan.timeout:g} s by which the others "
                "reach it: the names of the hosts are not known here. Give the hosts' addresses as --hosts."
            )
        if not said:
            say(f"waiting until the names of the hosts are known: {', '.join(names)}")
            said = True
        time.sleep(1.0)
    return found
