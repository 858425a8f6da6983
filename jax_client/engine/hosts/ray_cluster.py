"""Which Ray cluster does this process belong to, and which hosts does it have?

Ray is imported here and in the modules beside this one alone, and only once hosts or samplers are asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_client.errors import BadRequestError, RequestFailedError

# Ray comes without types: the module, and what it gives: actors, answers.
Handle = Any
Ray = Handle
# Of the names of actors and the logs of this package in a cluster that others use too.
NAMESPACE = "jax_client"
# Ray sends no statistics, leaves signals alone, and does not hide the chips of an actor that reserves none.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A host of the cluster.

    Attributes:
        node: Ray's id of it.
        address: where the others reach it.
        name: that people know it by.
        here: whether this process runs on it.
        gpus, tpus: chips that Ray has found there.
    """

    node: str
    address: str
    name: str
    here: bool
    gpus: int
    tpus: int


def connect(*, start: bool) -> Ray:
    """Join the cluster of `$RAY_ADDRESS`, unless this process has joined one; return the module `ray`.

    Args:
        start: without that variable, start a cluster of this machine alone; else join the one that runs here.

    Raises:
        BadRequestError: Ray is not installed, or there is no cluster and none may be started.
        RequestFailedError: there is one, and it does not let this process in.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise BadRequestError(
            f"EngineConfig.hosts and EngineConfig.samplers need Ray, which cannot be imported ({error}). Install "
            "jax_client[cluster] on every host."
        ) from None
    with _lock:
        if not ray.is_initialized():
            _join(ray, start)
    return ray


def _join(ray: Ray, start: bool) -> None:
    quiet = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    with _own_sigterm():
        try:
            # One that happens to run on this machine may be another user's, or a dead one's rest.
            own = start and not os.environ.get("RAY_ADDRESS")
            ray.init(address="local" if own else "auto", **({"include_dashboard": False} if own else {}), **quiet)
        except ConnectionError as error:
            if os.environ.get("RAY_ADDRESS"):
                raise RequestFailedError(
                    f"the Ray cluster at {os.environ['RAY_ADDRESS']} ($RAY_ADDRESS) cannot be joined: {error}. Look "
                    "at 'ray status' there, and start it again if it is gone.",
                    category="server",
                ) from None
            raise BadRequestError(
                "EngineConfig.hosts is 'ray', but there is no Ray cluster. Run the program with 'jax_client launch -- "
                "PROGRAM' on every host, or inside a cluster, whose head $RAY_ADDRESS names."
            ) from None


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which saves runs: Ray sets one of its own that only exits."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no thread but the main one can set a handler
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hosts(ray: Ray) -> list[Host]:
    """Return the hosts of the cluster that are alive: this one first, then by their addresses."""
    own = ray.get_runtime_context().get_node_id()
    found = [
        Host(
            node=node["NodeID"],
            address=node["NodeManagerAddress"],
            name=node["NodeManagerHostname"],
            here=node["NodeID"] == own,
            gpus=int(node["Resources"].get("GPU", 0)),
            tpus=int(node["Resources"].get("TPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda host: (not host.here, host.address))


def on_host(host: Host) -> dict[str, object]:
    """Return the options of an actor that runs on this host and no other, and reserves all of its chips."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id=host.node, soft=False)
    chips: dict[str, object] = {"num_gpus": host.gpus} if host.gpus else {}
    if host.tpus:
        chips["resources"] = {"TPU": host.tpus}
    return {"num_cpus": 0, "scheduling_strategy": place, **chips}
