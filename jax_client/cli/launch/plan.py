"""What has one `launch` been told, and with which variables do Ray and the program run?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax_client.cli.launch.finding.places import Places

# Ray sends no statistics, and does not hide the chips of an actor that reserves none.
RAY_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
LOST_HOST = 75  # EX_TEMPFAIL: the engine has saved after it lost a host


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The settings of a launch on several hosts.

    Attributes:
        places: the hosts, and which of them is this one.
        port: of Ray on host 0.
        timeout: seconds in which all hosts must join.
        restarts: how often the program may run anew after it lost a host.
        environment: variables of Ray and the program, with what Ray asks for at its door.
    """

    places: Places
    port: int
    timeout: float
    restarts: int
    environment: Mapping[str, str]

    def label(self, index: int) -> str:
        """Return how a message names a host."""
        return f"host {index} ({self.places.names[index]})"

    def node_name(self, index: int) -> str:
        """Return how Ray names the node of a host."""
        return f"{index}:{self.places.names[index]}"
