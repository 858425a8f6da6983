"""Are samplers placed where there is room, refused by name where there is none, and kept off each other's cores?"""

from __future__ import annotations

import subprocess
import sys

import pytest

from jax_client.engine.hosts.ray_cluster import Host
from jax_client.engine.hosts.samplers import placement
from jax_client.engine.hosts.samplers.engine import sampler_environment
from jax_client.engine.hosts.samplers.placement import hosts_for_samplers, keep_other_chips, share_of_cores, use_chips
from jax_client.errors import BadRequestError


def host(name: str, gpus: int = 0, tpus: int = 0) -> Host:
    return Host(node=name, address=name, name=name, here=name == "here", gpus=gpus, tpus=tpus)


HERE = host("here")


def test_on_a_cpu_other_hosts_come_first_and_this_one_takes_the_rest() -> None:
    places = hosts_for_samplers([HERE, host("b"), host("c")], 4, on_cpu=True)
    assert [(p.host.node, p.index, p.count) for p in places] == [
        ("b", 0, 1),
        ("c", 0, 1),
        ("here", 0, 2),
        ("here", 1, 2),
    ]
    assert all(p.gpus == p.tpus == 0 for p in places)


def test_another_host_gives_all_of_its_chips() -> None:
    (place,) = hosts_for_samplers([host("here", gpus=8), host("b"), host("c", gpus=4)], 1, on_cpu=False)
    assert (place.host.node, place.gpus) == ("c", 4)


@pytest.mark.parametrize(("chips", "samplers", "share"), [(2, 1, 1), (8, 1, 4), (8, 2, 2), (8, 7, 1), (6, 1, 2)])
def test_this_host_shares_its_chips_in_powers_of_two(chips: int, samplers: int, share: int) -> None:
    places = hosts_for_samplers([host("here", tpus=chips)], samplers, on_cpu=False)
    assert [p.tpus for p in places] == [share] * samplers
    assert chips - samplers * share >= share, "the trainer has no less"


@pytest.mark.parametrize(
    ("hosts", "samplers", "excluded", "message"),
    [
        ([host("here", gpus=1)], 1, set(), "samplers is 1, but 0 fit: 0 other hosts with chips, and 1 chips here"),
        ([host("here", gpus=4), host("b", gpus=4)], 5, set(), "is 5, but 4 fit: 1 other hosts with chips, and 4 chips"),
        ([HERE, host("b")], 1, {"here", "b"}, "is 1, but 0 fit: of 2 hosts 2 compute with the trainer"),
        ([HERE, host("b"), host("c")], 2, {"here", "b"}, "is 2, but 1 fit: of 3 hosts 2 compute with the trainer"),
    ],
)
def test_what_does_not_fit_is_refused_with_counts(
    hosts: list[Host], samplers: int, excluded: set[str], message: str
) -> None:
    with pytest.raises(BadRequestError, match=message):
        hosts_for_samplers(hosts, samplers, excluded=excluded, on_cpu=hosts[0] is HERE)


def test_shares_of_cores_are_disjoint_and_cover_all() -> None:
    for cores, count in ((8, 3), (4, 4), (7, 2)):
        shares = [share_of_cores(set(range(cores)), i, count) for i in range(count)]
        assert all(shares) and sum(map(len, shares)) == cores and set().union(*shares) == set(range(cores))
    assert [share_of_cores({3, 5}, i, 3) for i in range(3)] == [{3}, {5}, {3}], "more processes than cores"


def test_the_trainer_keeps_the_chips_that_no_sampler_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "backend_started", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    keep_other_chips("GPU", 8, {"0", "1", "2"})
    assert placement.os.environ["CUDA_VISIBLE_DEVICES"] == "3,4,5,6"
    for name in ("TPU_VISIBLE_CHIPS", "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS"):
        monkeypatch.setenv(name, "")
    use_chips("TPU", ["2", "3"])
    assert placement.os.environ["TPU_VISIBLE_CHIPS"] == "2,3"
    assert placement.os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"


def test_a_sampler_computes_as_this_process_and_is_no_engine_over_several_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"JAX_CLIENT_HOSTS": "ray", "JAX_ENABLE_X64": "0", "XLA_FLAGS": "--f", "OTHER": "1"}.items():
        monkeypatch.setenv(name, value)
    environment = sampler_environment()
    assert (environment["JAX_ENABLE_X64"], environment["XLA_FLAGS"]) == ("0", "--f")
    assert not {"JAX_CLIENT_HOSTS", "OTHER"} & environment.keys()


def test_chips_that_are_in_use_cannot_be_left_to_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "backend_started", lambda: True)
    with pytest.raises(BadRequestError, match="Load the model with samplers before any other"):
        keep_other_chips("GPU", 2, {"0"})


def test_without_samplers_nothing_imports_ray() -> None:
    code = (
        "import sys, jax_client.runs.lifecycle.base_models as b, jax_client.engine.engine as e, jax_client\n"
        "from jax_client.config import EngineConfig\n"
        "e.Engine = lambda source, config: 'engine'\n"
        "import jax_client.weights.read.identity as i\n"
        "i.fingerprint = lambda source: 'f'\n"
        "assert b.open_engine(None, EngineConfig()) == ('engine', 'f')\n"
        "sys.exit(str(found) if (found := [n for n in sys.modules if n == 'ray' or 'hosts.samplers' in n]) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
