"""Does `jax_client doctor` say what there is of other hosts, and what keeps them from computing together?"""

from __future__ import annotations

import json
import os
import sys

import pytest

from jax_client.cli.doctor import hosts
from jax_client.cli.doctor.probes import child


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Start as a machine of its own."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "SLURM_", "TPU_", "OMPI_", "MEGASCALE_", "JOB_", "JAX_CLIENT_HOSTS")):
            monkeypatch.delenv(name)


def versions(**other: str) -> dict[str, str]:
    return {"jax_client": "0.1.0", "jax": "0.10.2", "Python": "3.11.7"} | other


def host(name: str, **fields: object) -> dict[str, object]:
    return {"name": name, "address": "10.0.0.1", "chips": {}, "versions": versions(), "problem": ""} | fields


def test_a_machine_of_its_own_is_not_spoken_of(monkeypatch):
    monkeypatch.setattr(hosts, "ask", lambda *_, **__: pytest.fail("a cluster was asked"))
    assert list(hosts.hosts(1.0)) == []


def test_the_other_hosts_are_named_with_what_starts_a_program(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t1v-0,t1v-1")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(hosts.metadata, "version", lambda name: "2.55.0")  # also where there is no ray
    places, ray = hosts.hosts(1.0)
    assert places.status == "OK" and "host 1 of 2" in places.found and "t1v-0, t1v-1" in places.found
    assert "jax_client launch -- PROGRAM" in places.advice
    assert ray.check == "ray" and "no cluster is named" in ray.found


def test_hosts_that_are_not_clear_are_a_warning(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    places, _ = hosts.hosts(1.0)
    assert places.status == "WARN" and "srun jax_client launch" in places.found


def test_ray_is_missing(monkeypatch):
    def missing(name: str) -> str:
        raise hosts.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("JAX_CLIENT_HOSTS", "ray")
    monkeypatch.setattr(hosts.metadata, "version", missing)
    (finding,) = hosts.hosts(1.0)
    assert finding.status == "FAIL" and "jax_client[cluster]" in finding.advice


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([host("a", chips={"TPU": 4}), host("b", chips={"TPU": 4})], "OK", "2 hosts: a at 10.0.0.1 with 4 TPUs, b"),
        ([host("a")], "WARN", "1 host: a"),
        ([host("a"), host("b", versions=versions(jax="0.11.0"))], "FAIL", "b has jax 0.11.0, and this host 0.10.2"),
        ([host("a"), host("b", versions={}, problem="no memory")], "FAIL", "b does not answer: no memory"),
    ],
)
def test_what_the_cluster_says(monkeypatch, found, status, words):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(hosts, "ask", lambda *_, **__: ({"hosts": found, "versions": versions()}, ""))
    (finding,) = hosts.hosts(1.0)
    assert finding.status == status and words in finding.found
    assert bool(finding.advice) == (status != "OK")
    json.dumps(finding.details)


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch, tmp_path):
    pytest.importorskip("ray")
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nsleep 60\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(child.sys, "executable", str(stuck))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (finding,) = hosts.hosts(0.3)
    assert finding.status == "FAIL" and "127.0.0.1:1 did not start within 0.3 seconds" in finding.found
    assert "unset RAY_ADDRESS" in finding.advice and sys.executable == str(stuck)
