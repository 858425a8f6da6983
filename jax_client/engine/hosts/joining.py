"""How does a process join jax's runtime of several hosts, and what must be the same on all of them?"""

from __future__ import annotations

import os
import platform
from importlib import metadata

import jax

from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.host.proxies import bypassing

# Until the process of a host is taken for dead by jax itself; the leading host notices before.
HEARTBEAT_S = 100


def versions() -> dict[str, str]:
    """Return what must be the same on all hosts, by name."""
    packages = "jax_client", "jax", "jaxlib"
    return {name: metadata.version(name) for name in packages} | {"Python": platform.python_version()}


def join(coordinator: str, count: int, process: int, timeout_s: int) -> None:
    """Join jax's runtime of several hosts; waits for all of them.

    Args:
        coordinator: address and port of the leading host, which is process 0 there.
        count: of the hosts.
        process: number of this one.
        timeout_s: until it is given up.

    Raises:
        BadRequestError: this process has computed with jax before.
        RequestFailedError: not all hosts have come.
    """
    address = coordinator.rsplit(":", 1)[0]
    os.environ.update(bypassing(os.environ, address))  # gRPC would ask a proxy for it
    jax.config.update("jax_check_proxy_envs", False)
    # Else the death of one host would end the process of every other, also of the one that has something to save.
    jax.config.update("jax_enable_recoverability", True)
    # Its handler of SIGTERM would replace the one that saves runs.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            process,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            coordinator_bind_address=coordinator,
            cluster_detection_method="deactivate",
        )
        jax.devices()  # waits until every process has told its own
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise BadRequestError(
                "EngineConfig.hosts is 'ray', but this process has computed with jax on its own devices before, which "
                "then cannot be joined to others. Make the ServiceClient first."
            ) from None
        raise RequestFailedError(
            f"the hosts could not be joined at {coordinator} within {timeout_s} s: {error}. The port must be open "
            "between them; JAX_CLIENT_COORDINATOR_PORT sets it.",
            category="server",
        ) from None
