"""Are the hosts of a launch found as each environment names them, and is what is missing refused by name?"""

from __future__ import annotations

import socket

import pytest

from jax_client.cli.launch.finding import addresses
from jax_client.cli.launch.finding.node_list import expand_nodes
from jax_client.cli.launch.finding.places import Places, find_places
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.host import slices

STEP = {
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_NODELIST": "node[03-05]",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
}
SLICE = {"TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "names", "index"),
    [
        ({}, ("localhost",), 0),
        (STEP, ("node03", "node04", "node05"), 1),
        # More allocated than this step uses: NTASKS of the allocation is not asked.
        (STEP | {"SLURM_NTASKS": "24", "SLURM_JOB_NUM_NODES": "8"}, ("node03", "node04", "node05"), 1),
        (STEP | {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}, ("localhost",), 0),
        ({"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "1"}, ("localhost",), 0),
        (SLICE, ("t-0.t", "t-1.t"), 1),
        # In a pod that has both.
        (SLICE | {"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("t-0.t", "t-1.t"), 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ("localhost",), 0),
        (SLICE | {"TPU_PROCESS_BOUNDS": "1,1,1"}, ("localhost",), 0),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ("localhost",), 0),
    ],
)
def test_hosts_are_found(environ, names, index):
    found = find_places(None, None, environ)
    assert (found.names, found.index) == (names, index)


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "4"}, "has 4 nodes, .*write 'srun jax_client launch"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "24"}, "24 tasks on 3 nodes; start one on each: srun --ntasks-per-node=1"),
        (STEP | {"SLURM_STEP_NODELIST": "a[3-"}, "SLURM_STEP_NODELIST: .* cannot be read at"),
        (STEP | {"SLURM_NODEID": "x"}, "SLURM_NODEID is 'x', which is no number"),
        (STEP | {"SLURM_NODEID": "7"}, "this is host 7, but there are 3, numbered from 0"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "one of the 2 hosts of a TPU slice, but TPU_WORKER_ID does not say which"),
        (SLICE | {"TPU_WORKER_HOSTNAMES": "a,b,a"}, "'a' is host 0 and host 2"),
        ({"JOB_COMPLETION_INDEX": "2"}, "pod 2 of an indexed Kubernetes Job, .*give --hosts"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "one of 8 processes of MPI.*give --hosts"),
    ],
)
def test_hosts_that_are_not_known_are_refused(environ, error, monkeypatch):
    monkeypatch.setattr(slices, "worker_number", lambda: "")
    with pytest.raises(BadRequestError, match=error):
        find_places(None, None, environ)


def test_several_slices_are_refused(monkeypatch):
    with pytest.raises(UnsupportedError, match="MEGASCALE_NUM_SLICES is 2"):
        find_places(None, None, SLICE | {"MEGASCALE_NUM_SLICES": "2"})
    assert len(find_places(None, None, SLICE | {"MEGASCALE_NUM_SLICES": "1"}).names) == 2
    # A virtual machine's metadata says it in a line of many.
    answers = {
        "worker-network-endpoints": "?:?:10.0.0.2,?:?:10.0.0.3",
        "agent-worker-number": "1\n",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '3'\nZONE: 'z'",
    }
    monkeypatch.setattr(slices, "_attribute", lambda name: answers[name])
    monkeypatch.setattr(slices, "_CHIPS", ("null",))
    slices._metadata_hosts.cache_clear()
    with pytest.raises(UnsupportedError, match="MEGASCALE_NUM_SLICES is 3"):
        find_places(None, None, {})
    answers["tpu-env"] = "ACCELERATOR_TYPE: 'v5p-16'"
    assert find_places(None, None, {}) == Places(names=("10.0.0.2", "10.0.0.3"), index=1, source="the TPU slice")
    slices._metadata_hosts.cache_clear()


def test_hosts_that_are_given_go_before_those_that_are_found(monkeypatch):
    assert find_places("a, b", 1, STEP | SLICE) == Places(names=("a", "b"), index=1, source="--hosts")
    assert find_places("a,b", None, {"JOB_COMPLETION_INDEX": "1"}).index == 1
    assert find_places("a", None, {}).index == 0
    # A host finds itself by its name or its address.
    assert find_places(f"no-such-host.invalid,{socket.gethostname()}", None, {}).index == 1
    assert find_places("127.0.0.5,192.0.2.77", None, {}).index == 0
    with pytest.raises(BadRequestError, match=r"127.0.0.5 and 127.0.0.6 are this machine; give --host-index"):
        find_places("127.0.0.5,127.0.0.6", None, {})
    with pytest.raises(BadRequestError, match="none of them is this machine; give --host-index"):
        find_places("192.0.2.77,192.0.2.78", None, {})
    for hosts, index, error in (
        ("a,b", 2, "this is host 2, but there are 2"),
        ("a,b,a", 0, "'a' is host 0 and host 2; name each host once"),
        ("a,,b", 0, "host 1 has no name"),
        (None, 0, "--host-index is given without --hosts"),
    ):
        with pytest.raises(BadRequestError, match=error):
            find_places(hosts, index, {})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node001", ["node001"]),
        ("node001,host2", ["node001", "host2"]),
        ("node[001-003],host2", ["node001", "node002", "node003", "host2"]),
        ("node[001,007-008],b[9-10]", ["node001", "node007", "node008", "b9", "b10"]),
        ("r[1-2]n[01-02].x", ["r1n01.x", "r1n02.x", "r2n01.x", "r2n02.x"]),
        ("gpu-a-[1]", ["gpu-a-1"]),
    ],
)
def test_node_lists_of_slurm(text, names):
    assert expand_nodes(text) == tuple(names)


@pytest.mark.parametrize(
    "text", ["", "a,,b", "a[", "a[]", "a[3-1]", "a[1-x]", "a]", "a[1-999999999]", "a[1-999][1-999]"]
)
def test_what_is_no_node_list(text):
    with pytest.raises(ValueError, match=r"^'"):
        expand_nodes(text)


def test_the_address_between_the_hosts(monkeypatch):
    known = {"a": "192.0.2.10", "b": "192.0.2.11", "c": "127.0.1.1"}
    monkeypatch.setattr(addresses, "resolve", lambda name: known.get(name, name if name[0].isdigit() else None))
    monkeypatch.setattr(addresses, "can_bind", lambda address, port: address in ("192.0.2.10", "127.0.1.1"))
    monkeypatch.setattr(addresses, "_source_towards", lambda address: f"towards {address}")
    assert addresses.own_address(("a", "b"), 0) == "192.0.2.10"
    # /etc/hosts gives a machine's own name a loopback address; or the name is that of a router in front of it.
    assert addresses.own_address(("a", "c"), 1) == "towards 192.0.2.10"
    assert addresses.own_address(("b", "a"), 0) == "towards 192.0.2.10"
    # Names of pods that are not known yet.
    assert addresses.own_address(("x", "y"), 0) is None and addresses.own_address(("c", "y"), 0) is None
    assert addresses.own_address(("x", "c"), 1) is None
    with pytest.raises(BadRequestError, match=r"host 0 \(c\) has the address 127.0.1.1 on this host"):
        addresses.own_address(("c", "b"), 1)
    # Several hosts on one machine, as in tests.
    monkeypatch.setattr(addresses, "can_bind", lambda address, port: True)
    assert addresses.own_address(("127.0.0.2", "127.0.0.3"), 1) == "127.0.0.3"


def test_addresses_of_this_machine():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert addresses.answers("127.0.0.1", port) and not addresses.can_bind("127.0.0.1", port)
        assert not addresses.refuses("127.0.0.1", port)
    assert addresses.refuses("127.0.0.1", port)
    assert not addresses.answers("127.0.0.1", port) and addresses.can_bind("127.0.0.1", port)
    assert not addresses.can_bind("192.0.2.77", 0)
    assert addresses.resolve("no-such-host.invalid") is None and addresses.resolve("127.0.0.9") == "127.0.0.9"
    assert addresses._source_towards("127.0.0.9") == "127.0.0.1"
    private = ("10.1.2.3", "192.168.0.1", "172.16.0.1", "100.64.0.1", "127.0.0.2", "fd00::1", "fe80::1%eth0")
    assert all(map(addresses.is_private, private))
    assert not any(map(addresses.is_private, ("8.8.8.8", "35.1.2.3", "2600::1")))
    assert addresses.joined("::1", 5) == "[::1]:5" and addresses.joined("10.0.0.1", 5) == "10.0.0.1:5"
