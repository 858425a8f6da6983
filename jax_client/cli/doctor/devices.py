"""Which accelerators does this machine have, which processes use them, and can jax use them?

A child process starts jax's backend: where another process holds a TPU, the start can hang or end the process.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jax_client.cli.doctor.finding import Finding
from jax_client.cli.doctor.probes.child import Answer, ask
from jax_client.cli.output import human_size, shown
from jax_client.host.slices import ADVICE, slice_hosts

TPU_FILE, NVIDIA_FILE = re.compile(r"/dev/(accel\d+|vfio/\d+)"), re.compile(r"/dev/nvidia\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process that has device files open. Its arguments are left out: they may hold secrets."""

    pid: int
    command: str
    files: tuple[str, ...]


def accelerator_files() -> dict[str, list[str]]:
    """Return the device files of accelerators, under "tpu" and "nvidia"."""
    paths = [str(path) for pattern in ("accel*", "vfio/*", "nvidia*") for path in sorted(Path("/dev").glob(pattern))]
    found = {"tpu": TPU_FILE, "nvidia": NVIDIA_FILE}
    return {kind: [path for path in paths if form.fullmatch(path)] for kind, form in found.items()}


def holders(files: list[str], proc: Path = Path("/proc")) -> tuple[list[Holder], int]:
    """Return the processes that have one of these files open, and the number of processes that cannot be inspected."""
    found, hidden = [], 0
    for process in proc.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        held = set()
        try:
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(os.readlink(descriptor))
        except PermissionError:
            hidden += 1
        except OSError:  # it has ended
            continue
        if mine := sorted(held & set(files)):
            command = "?"
            with contextlib.suppress(OSError):
                command = (process / "comm").read_text(errors="replace").strip()
            found.append(Holder(pid=int(process.name), command=command, files=tuple(mine)))
    return sorted(found, key=lambda holder: holder.pid), hidden


def users_of_devices() -> Iterator[Finding]:
    """Report which processes have an accelerator open; yield nothing on a machine without one."""
    for kind, files in accelerator_files().items():
        if not files:
            continue
        found, hidden = holders(files)
        details = {"files": files, "holders": [asdict(holder) for holder in found], "hidden_processes": hidden}
        unseen = f"; {hidden} processes of other users could not be looked at" if hidden else ""
        if not found:
            text = f"{len(files)} device files, no process has them open{unseen}"
            yield Finding(check=f"{kind} users", found=text, details=details)
            continue
        who = ", ".join(f"process {holder.pid} ({shown(holder.command)})" for holder in found)
        why = "A TPU belongs to one process at a time" if kind == "tpu" else "It may hold most of the GPU's memory"
        yield Finding(
            check=f"{kind} users",
            status="WARN",
            found=f"in use by {who}{unseen}",
            advice=f"{why}: end it first if it is a leftover, with 'kill {found[0].pid}'.",
            details=details,
        )


def devices(timeout: float) -> Iterator[Finding]:
    """Start jax in a child process and report what it finds within `timeout` seconds."""
    if len(hosts := slice_hosts(os.environ)) > 1:  # whose others jax would wait for
        yield Finding(
            check="devices",
            status="FAIL",
            found=f"this machine is one of the {len(hosts)} hosts of a TPU slice",
            advice=ADVICE,
            details={"hosts": hosts},
        )
        return
    found, problem = _probe(timeout)
    present = {kind: files for kind, files in accelerator_files().items() if files}
    if found is None:
        used = ", ".join(f"process {holder.pid}" for files in present.values() for holder in holders(files)[0])
        hint = f"End {used}, which uses the accelerator" if used else "See that no other process uses the accelerator"
        if not present:
            hint = "Install the package's requirements again"
        yield Finding(
            check="devices",
            status="FAIL",
            found=problem,
            advice=f"{hint}, or set JAX_PLATFORMS=cpu to work without one.",
        )
        return
    memory = found["memory_bytes"]
    text = f"{found['count']} x {found['kind']} ({found['platform']})"
    text += f", {human_size(memory)} each for jax" if memory else ""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if found["platform"] == "cpu" and present and "cpu" not in chosen.split(","):
        extra = "[tpu]'" if "tpu" in present else "[cuda12]', or [cuda13] for drivers from 580 on"
        yield Finding(
            check="devices",
            status="FAIL",
            found=f"{text}, although there are {' and '.join(map(str.upper, present))} device files",
            advice="Training would run on the CPU. "
            f"Run: pip install 'jax_client{extra}; if that is done, see who uses the device.",
            details=found,
        )
        return
    of_devices = {name: value for name, value in found.items() if name not in ("kernels", "cudnn")}
    text += f", JAX_PLATFORMS={chosen}" if chosen else ""
    yield Finding(check="devices", found=text, details=of_devices)
    yield kernels(found, timeout)


def kernels(found: Answer, timeout: float) -> Finding:
    """Report with which attention kernels engines train and sample here, and why with no others."""
    if "kernels" not in found:
        return Finding(
            check="kernels",
            status="WARN",
            found=f"they were not tried within {timeout:g} seconds, in which the devices were found",
            advice="Give a longer --timeout. Each start of an engine tries them too, and takes as long.",
        )
    each: list[Answer] = found["kernels"]
    training, sampling = (_by_model(each, use) for use in ("training", "sampling"))
    refused = {f"{name}: {why}": None for choice in each for name, why in choice["refused"].items()}
    version = f" (cuDNN {found['cudnn']})" if found.get("cudnn") else ""
    failed = any(choice["failed"] for choice in each)
    return Finding(
        check="kernels",
        status="WARN" if failed else "OK",
        found=f"training: {training}{version}. Sampling: {sampling}. Not used: {'; '.join(refused)}",
        advice="A kernel for this platform failed its check, and a slower one stands in. Run: jax_client doctor "
        "--selftest, and report its table."
        if failed
        else "",
        details={"kernels": each, "cudnn": found.get("cudnn")},
    )


def _by_model(choices: list[Answer], use: str) -> str:
    """Return which kernels serve which models, in words."""
    by_name: dict[str, list[str]] = {}
    for choice in choices:
        by_name.setdefault(choice[use], []).append(f"{choice['dtype']} with heads of {choice['head_width']}")
    if len(by_name) == 1:
        return f"{choices[0][use]} for every model"
    return "; ".join(f"{name} for {', '.join(models)}" for name, models in by_name.items())


def _probe(timeout: float) -> tuple[Answer | None, str]:
    """Return what the child process found, or None and why not."""
    # Else the child would take three quarters of the memory of a GPU on which another process may train.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return ask(
        "jax_client.cli.doctor.probes.devices", "kernels", timeout=timeout, environment=environment, starts="jax"
    )
