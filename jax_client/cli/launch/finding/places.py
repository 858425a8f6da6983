"""Which hosts are there, and which of them is this one? `--hosts` says so, else what set this process's environment up.

The variables are those that jax's own detection reads (jax/_src/clusters): of a TPU slice, a Slurm step, a Kubernetes
job. Where they show that there are other hosts and not which, that is refused: each host would run the program alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax_client.cli.launch.finding.addresses import is_here
from jax_client.cli.launch.finding.node_list import expand_nodes
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.host import slices


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The hosts of a launch.

    Attributes:
        names: of all hosts, in an order on which they agree; host 0 runs the program.
        index: of this host.
        source: what named them, for messages.
    """

    names: tuple[str, ...]
    index: int
    source: str

    def __post_init__(self) -> None:
        for i, name in enumerate(self.names):
            if not name.strip():
                raise BadRequestError(f"{self.source}: host {i} has no name.")
            if name in self.names[:i]:
                raise BadRequestError(
                    f"{self.source}: {name!r} is host {self.names.index(name)} and host {i}; name each host once, and "
                    "start one launch on it."
                )
        if not 0 <= self.index < len(self.names):
            raise BadRequestError(
                f"{self.source}: this is host {self.index}, but there are {len(self.names)}, numbered from 0."
            )


def find_places(hosts: str | None, index: int | None, environ: Mapping[str, str]) -> Places:
    """Return the hosts that were given, or found; one host where nothing tells of others.

    Args:
        hosts: names or addresses, with commas between them.
        index: of this host among them.
        environ: variables of this process.

    Raises:
        BadRequestError: they are wrong, or which of them is this one is not clear.
        UnsupportedError: there are other hosts, and it cannot be known which.
    """
    if hosts is not None:
        return _given(tuple(name.strip() for name in hosts.split(",")), index, environ)
    if index is not None:
        raise BadRequestError("--host-index is given without --hosts; give the hosts too, in the same order on each.")
    for find in (_tpu_slice, _slurm, _kubernetes, _mpi):
        if (found := find(environ)) is not None:
            return found
    return Places(names=("localhost",), index=0, source="this host alone")


def _given(names: tuple[str, ...], index: int | None, environ: Mapping[str, str]) -> Places:
    if index is None and len(names) == 1:
        index = 0
    if index is None and (number := environ.get("JOB_COMPLETION_INDEX")):
        return Places(names=names, index=_number(number, "JOB_COMPLETION_INDEX"), source="--hosts")
    if index is not None:
        return Places(names=names, index=index, source="--hosts")
    here = [i for i, name in enumerate(names) if is_here(name)]
    if len(here) == 1:
        return Places(names=names, index=here[0], source="--hosts")
    which = "none of them is" if not here else f"{' and '.join(names[i] for i in here)} are"
    raise BadRequestError(f"--hosts {','.join(names)}: {which} this machine; give --host-index too, from 0.")


def _tpu_slice(environ: Mapping[str, str]) -> Places | None:
    names = tuple(name.partition(":")[0] for name in slices.slice_hosts(environ))
    number_of_slices = environ.get("MEGASCALE_NUM_SLICES") or slices.metadata_of_tpu("MEGASCALE_NUM_SLICES", environ)
    if names and number_of_slices and _number(number_of_slices, "MEGASCALE_NUM_SLICES") > 1:
        raise UnsupportedError(
            f"MEGASCALE_NUM_SLICES is {number_of_slices}: a program computes on the hosts of one slice. Start launch "
            "on the hosts of one slice, without MEGASCALE variables."
        )
    if len(names) < 2:
        return None
    number = environ.get("TPU_WORKER_ID") or slices.worker_number()
    if not number:
        raise BadRequestError(
            f"this is one of the {len(names)} hosts of a TPU slice, but TPU_WORKER_ID does not say which; set it, or "
            "give --hosts and --host-index."
        )
    return Places(names=names, index=_number(number, "TPU_WORKER_ID"), source="the TPU slice")


def _slurm(environ: Mapping[str, str]) -> Places | None:
    if "SLURM_JOB_ID" not in environ:
        return None
    listed = environ.get("SLURM_STEP_NODELIST")
    if listed is None or "SLURM_PROCID" not in environ:
        nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
        if _number(nodes, "SLURM_JOB_NUM_NODES") == 1:
            return None
        raise BadRequestError(
            f"this Slurm job has {nodes} nodes, and launch runs on one of them; write 'srun jax_client launch ...'."
        )
    try:
        names = expand_nodes(listed)
    except ValueError as error:
        raise BadRequestError(f"SLURM_STEP_NODELIST: {error}; give --hosts and --host-index.") from None
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or str(len(names))
    if _number(tasks, "SLURM_STEP_NUM_TASKS") != len(names):
        raise BadRequestError(
            f"this Slurm step has {tasks} tasks on {len(names)} nodes; start one on each: srun --ntasks-per-node=1."
        )
    if len(names) < 2:
        return None
    number = environ.get("SLURM_NODEID") or environ["SLURM_PROCID"]
    return Places(names=names, index=_number(number, "SLURM_NODEID"), source="the Slurm step")


def _kubernetes(environ: Mapping[str, str]) -> Places | None:
    number = environ.get("JOB_COMPLETION_INDEX")
    if number is None or "TPU_WORKER_HOSTNAMES" in environ:
        return None
    raise BadRequestError(
        f"this is pod {number} of an indexed Kubernetes Job, which does not tell its pods the others' names; give "
        "--hosts, such as NAME-hosts-0-0.NAME,NAME-hosts-0-1.NAME for a JobSet NAME, or run the program without launch "
        "if it has one pod."
    )


def _mpi(environ: Mapping[str, str]) -> Places | None:
    size = environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("PMI_SIZE") or "1"
    if _number(size, "OMPI_COMM_WORLD_SIZE") > 1:
        raise BadRequestError(
            f"this is one of {size} processes of MPI, which does not tell the hosts' names; give --hosts and "
            "--host-index, or use srun."
        )
    return None


def _number(text: str, variable: str) -> int:
    if not text.strip().isdecimal():
        raise BadRequestError(
            f"{variable} is {text!r}, which is no number; set it right, or give --hosts and --host-index."
        )
    return int(text)
