"""Is this machine one of several hosts, and can they compute together? Nothing is reported of a machine of its own."""

from __future__ import annotations

import importlib.metadata as metadata
import os
from collections.abc import Iterator, Mapping

from jax_client.cli.doctor.finding import Finding
from jax_client.cli.doctor.probes.child import Answer, ask
from jax_client.cli.launch.finding.places import find_places
from jax_client.cli.output import shown
from jax_client.errors import JaxClientError


def hosts(timeout: float) -> Iterator[Finding]:
    """Report what the environment says of other hosts, and what the Ray cluster, which is asked for `timeout` seconds.

    The environment speaks of other hosts by the variables of a TPU slice, of Slurm, Kubernetes or MPI, by
    `$JAX_CLIENT_HOSTS` and by `$RAY_ADDRESS`.
    """
    several, address = False, os.environ.get("RAY_ADDRESS", "")
    try:
        places = find_places(None, None, os.environ)
        several = len(places.names) > 1
        if several:
            yield Finding(
                check="hosts",
                found=f"this is host {places.index} of {len(places.names)}, by {places.source}: "
                f"{', '.join(map(shown, places.names))}",
                advice="" if address else "Run programs with 'jax_client launch -- PROGRAM' on each.",
                details={"names": places.names, "index": places.index, "source": places.source},
            )
    except JaxClientError as error:
        several = True
        yield Finding(check="hosts", status="WARN", found=str(error), advice="'jax_client launch' needs this.")
    if not (several or address or os.environ.get("JAX_CLIENT_HOSTS")):
        return
    try:
        ray = metadata.version("ray")
    except metadata.PackageNotFoundError:
        yield Finding(
            check="ray",
            status="FAIL",
            found="not installed; several hosts need it",
            advice="Run on every host: pip install 'jax_client[cluster]'",
        )
        return
    if address:
        yield _cluster(address, timeout)
    else:
        yield Finding(check="ray", found=f"{ray}, and no cluster is named by RAY_ADDRESS", details={"version": ray})


def _cluster(address: str, timeout: float) -> Finding:
    found, problem = ask(
        "jax_client.cli.doctor.probes.hosts",
        timeout=timeout,
        environment=os.environ,
        starts=f"the cluster at {address}",
    )
    if found is None:
        return Finding(
            check="ray cluster",
            status="FAIL",
            found=problem,
            advice="Look at 'ray status' there; unset RAY_ADDRESS if that cluster is gone.",
        )
    each: list[Answer] = found["hosts"]
    wrong = [line for host in each for line in _differences(host, found["versions"])]
    names = ", ".join(_name(host) for host in each)
    alone = len(each) == 1
    return Finding(
        check="ray cluster",
        status="FAIL" if wrong else "WARN" if alone else "OK",
        found=f"{len(each)} host{'' if alone else 's'}: {names}" + (f". {'; '.join(wrong)}" if wrong else ""),
        advice="Install the same versions on every host, and start Ray there anew."
        if wrong
        else "No other host has joined; EngineConfig.hosts needs two."
        if alone
        else "",
        details=found,
    )


def _name(host: Answer) -> str:
    chips = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in host["chips"].items())
    return f"{shown(host['name'])} at {shown(host['address'])}" + (f" with {chips}" if chips else "")


def _differences(host: Answer, own: Mapping[str, str]) -> Iterator[str]:
    if host["problem"]:
        yield f"{shown(host['name'])} does not answer: {shown(host['problem'])}"
        return
    for name, version in own.items():
        if (theirs := host["versions"].get(name)) != version:
            yield f"{shown(host['name'])} has {name} {shown(theirs)}, and this host {version}"
