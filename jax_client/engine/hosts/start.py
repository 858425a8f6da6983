"""How does a process become the leader of the other hosts of its Ray cluster?

Each further host gets one actor, which takes all of its chips. All join jax's runtime; the leading host is process 0.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

from jax_client import process
from jax_client.config import EngineConfig
from jax_client.engine.hosts import ray_cluster
from jax_client.engine.hosts.actor import GROUPS, ActorChannel, FollowerActor
from jax_client.engine.hosts.ray_cluster import Handle, Ray
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.process import Step

if TYPE_CHECKING:
    from jax_client.engine.devices.leader import Leader

JOIN_S = 300
# What of this process's environment decides how jax, XLA and this package compute.
_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "TF_", "NCCL_", "HF_")
_lock = threading.Lock()
_joined: set[str] = set()  # nodes of the other hosts


def lead_other_hosts(settings: EngineConfig) -> Leader | None:
    """Return the leader of this process if the settings ask for other hosts, which are joined at the first time.

    Raises:
        BadRequestError: there is no cluster, or a host that cannot compute with this one.
        RequestFailedError: a host did not join.
    """
    if not settings.on_several_hosts:
        return None
    from jax_client.engine.devices.current import leads

    with _lock:
        return leads() or led_by(_join(settings.samplers))


def led_by(found: Leader) -> Leader:
    """Make a leader that of this process, until the process ends."""
    from jax_client.engine.devices.current import lead
    from jax_client.engine.devices.leader import Leader

    lead(found)
    process.register(
        "hosts",
        "the processes of the other hosts, and the thread that looks after them",
        owner=found,
        at_exit={Step.ENGINES: Leader.refuse, Step.MEMORY: Leader.close},
    )
    return found


def computing_hosts(hosts: list[ray_cluster.Host], samplers: int) -> list[ray_cluster.Host]:
    """Return the hosts that compute as one engine: this one, and those that are not left to samplers, the last ones.

    Once hosts have been joined, they are these, whatever a later engine asks for.

    Args:
        hosts: of the cluster, this one first.
        samplers: beside the engine; each takes a host.

    Raises:
        BadRequestError: fewer than two are left.
    """
    if _joined:
        return [host for host in hosts if host.here or host.node in _joined]
    if len(hosts) - samplers > 1:
        return hosts[: len(hosts) - samplers]
    if len(hosts) == 1:
        raise BadRequestError(
            f"EngineConfig.hosts is 'ray', but {hosts[0].name} is the only host of the Ray cluster. Wait for the "
            "others to join it ('ray status' shows them), or leave EngineConfig.hosts out."
        )
    raise BadRequestError(
        f"EngineConfig.hosts is 'ray' with {samplers} samplers, but the Ray cluster has {len(hosts)} hosts: two or "
        "more compute together, and each sampler needs one more. Ask for fewer samplers, or leave hosts out."
    )


def environment() -> dict[str, str]:
    """Return the variables of this process that the others need."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}


def _join(samplers: int) -> Leader:
    from jax_client.engine.devices.leader import Leader
    from jax_client.engine.hosts.joining import join, versions

    ray = ray_cluster.connect(start=False)
    here, *others = computing_hosts(ray_cluster.hosts(ray), samplers)
    remote = ray.remote(concurrency_groups=GROUPS)(FollowerActor)
    actors = [remote.options(max_restarts=0, **ray_cluster.on_host(host)).remote(environment()) for host in others]
    _refuse_other_versions(ray, others, actors, versions())
    coordinator = f"{here.address}:{os.environ.get('JAX_CLIENT_COORDINATOR_PORT') or _free_port(here.address)}"
    joins = [
        actor.join.remote(coordinator, len(actors) + 1, number, JOIN_S) for number, actor in enumerate(actors, start=1)
    ]
    join(coordinator, len(actors) + 1, 0, JOIN_S)
    hellos = [_answer(ray, host, answer, JOIN_S) for host, answer in zip(others, joins, strict=True)]
    _joined.update(host.node for host in others)
    ways = zip(others, actors, hellos, strict=True)
    return Leader([ActorChannel(ray=ray, actor=actor, name=host.name, hello=hello) for host, actor, hello in ways])


def _refuse_other_versions(ray: Ray, hosts: list[ray_cluster.Host], actors: list[Handle], own: dict[str, str]) -> None:
    """Raise BadRequestError if a host has another version of something that must be the same everywhere."""
    for host, answer in [(host, actor.versions.remote()) for host, actor in zip(hosts, actors, strict=True)]:
        theirs = _answer(ray, host, answer, JOIN_S)
        for name, version in own.items():
            if theirs.get(name) != version:
                raise BadRequestError(
                    f"host {host.name} ({host.address}) has {name} {theirs.get(name)}, and this one {version}. Install "
                    "the same on every host, and start Ray there again."
                )


def _answer(ray: Ray, host: ray_cluster.Host, answer: Handle, timeout_s: float) -> Handle:
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.RayError as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        raise RequestFailedError(
            f"host {host.name} ({host.address}) cannot compute with this one: {last}. Its log is below "
            "/tmp/ray/session_latest/logs there.",
            category="server",
        ) from None


def _free_port(address: str) -> int:
    with socket.socket() as listening:
        listening.bind((address, 0))
        return int(listening.getsockname()[1])
