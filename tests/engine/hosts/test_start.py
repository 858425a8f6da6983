"""Which hosts of a cluster compute together, and which are left to samplers?"""

from __future__ import annotations

import pytest

from jax_client.engine.hosts import start
from jax_client.engine.hosts.ray_cluster import Host
from jax_client.engine.hosts.samplers.placement import hosts_for_samplers
from jax_client.errors import BadRequestError


def cluster(count: int) -> list[Host]:
    return [Host(node=f"n{i}", address=f"10.0.0.{i}", name=f"h{i}", here=i == 0, gpus=8, tpus=0) for i in range(count)]


@pytest.mark.parametrize(("count", "samplers", "computing"), [(2, 0, 2), (4, 0, 4), (4, 1, 3), (4, 2, 2)])
def test_samplers_have_the_last_hosts(count: int, samplers: int, computing: int) -> None:
    hosts = cluster(count)
    together = start.computing_hosts(hosts, samplers)
    assert together == hosts[:computing]
    places = hosts_for_samplers(hosts, samplers, excluded={host.node for host in together}, on_cpu=False)
    assert [place.host for place in places] == hosts[computing:]


@pytest.mark.parametrize(
    ("count", "samplers", "says"), [(1, 0, "h0 is the only host"), (3, 2, "with 2 samplers"), (2, 1, "has 2 hosts")]
)
def test_too_few_hosts_are_refused(count: int, samplers: int, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        start.computing_hosts(cluster(count), samplers)


def test_hosts_that_compute_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_joined", {"n1"})
    assert [host.name for host in start.computing_hosts(cluster(4), 0)] == ["h0", "h1"]
