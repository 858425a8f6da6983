"""Where do the samplers run? On other hosts first, one on each, then on this host with a share of its chips or cores.

Variables of its environment have a process see its own chips alone, before jax's backend starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from types import ModuleType

from jax_client.engine.hosts.ray_cluster import Host
from jax_client.errors import BadRequestError

# Layouts of the chips that one process has, as libtpu takes them.
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one sampler runs.

    Attributes:
        host: the host.
        gpus, tpus: chips there that Ray reserves for it; none on a CPU.
        index, count: which of the samplers of that host it is, and how many they are.
    """

    host: Host
    gpus: int = 0
    tpus: int = 0
    index: int = 0
    count: int = 1


def hosts_for_samplers(
    hosts: Sequence[Host], samplers: int, *, excluded: Set[str] = frozenset(), on_cpu: bool
) -> list[Place]:
    """Return a place for each sampler.

    Other hosts come first, each with one sampler that has all of its chips. This host takes those that are left: on a
    CPU any number; else each has an equal share of the chips, in powers of two, and the trainer has one share at least.

    Args:
        hosts: of the cluster, as `ray_cluster.hosts` returns them.
        samplers: how many.
        excluded: nodes of hosts that compute with the trainer as one engine, so that no sampler fits there.
        on_cpu: whether this process computes on a CPU; the samplers then do, too.

    Raises:
        BadRequestError: they do not fit.
    """
    free = [host for host in hosts if host.node not in excluded]
    others = [host for host in free if not host.here and (on_cpu or host.gpus or host.tpus)]
    places = [_whole(host, on_cpu) for host in others[:samplers]]
    left = samplers - len(places)
    if not left:
        return places
    here = next((host for host in free if host.here), None)
    if here is None:
        raise _refusal(samplers, f"{len(others)} fit: of {len(hosts)} hosts {len(excluded)} compute with the trainer")
    if on_cpu:
        return [*places, *(Place(host=here, index=i, count=left) for i in range(left))]
    chips = here.gpus or here.tpus
    if (share := chips // (left + 1)) < 1:
        room = len(others) + max(0, chips - 1)
        raise _refusal(
            samplers, f"{room} fit: {len(others)} other hosts with chips, and {chips} chips here, of which one trains"
        )
    share = 1 << (share.bit_length() - 1)
    gpus, tpus = (share, 0) if here.gpus else (0, share)
    return [*places, *(Place(host=here, gpus=gpus, tpus=tpus, index=i, count=left) for i in range(left))]


def _whole(host: Host, on_cpu: bool) -> Place:
    return Place(host=host) if on_cpu else Place(host=host, gpus=host.gpus, tpus=0 if host.gpus else host.tpus)


def _refusal(samplers: int, why: str) -> BadRequestError:
    return BadRequestError(
        f"EngineConfig.samplers is {samplers}, but {why}. Ask for fewer samplers, or add hosts to the Ray cluster."
    )


def share_of_cores(cores: Set[int], index: int, count: int) -> set[int]:
    """Return the cores of one of `count` processes that should not fight; they share some where there are too few."""
    ordered = sorted(cores)
    if count > len(ordered):
        return {ordered[index % len(ordered)]}
    return set(ordered[index * len(ordered) // count : (index + 1) * len(ordered) // count])


def keep_other_chips(kind: str, count: int, taken: Collection[str]) -> None:
    """Have this process use the chips of its host that no sampler has, as many of them as a power of two.

    Args:
        kind: "GPU" or "TPU".
        count: of the chips of the host.
        taken: the chips that Ray gave to samplers of this host.

    Raises:
        BadRequestError: jax uses all chips of this process already.
    """
    if backend_started():
        raise BadRequestError(
            f"EngineConfig.samplers needs {len(taken)} of the {count} chips of this host, but this process uses all of "
            "them already. Load the model with samplers before any other, in a process that has not used jax."
        )
    name = "CUDA_VISIBLE_DEVICES" if kind == "GPU" else "TPU_VISIBLE_CHIPS"
    known = [each for each in os.environ.get(name, "").split(",") if each] or [str(i) for i in range(count)]
    free = [each for each in known if each not in taken]
    use_chips(kind, free[: 1 << (len(free).bit_length() - 1)])


def use_chips(kind: str, chips: Sequence[str]) -> None:
    """Have this process use these chips, and no others."""
    if kind == "GPU":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chips)
        return
    os.environ["TPU_VISIBLE_CHIPS"] = ",".join(chips)
    os.environ["TPU_PROCESS_BOUNDS"] = "1,1,1"
    os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] = _BOUNDS.get(len(chips), f"1,{len(chips)},1")


def backend_started() -> bool:
    """Return whether jax has taken the devices of this process. Imports nothing."""
    bridge: ModuleType | None = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(bridge.backends_are_initialized())
