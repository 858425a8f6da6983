"""What does a chip have: memory, arithmetic, bandwidth, links? One table has the vendors' figures, with their sources.

Names are those of the clouds: "v5e-8", "v5p-8" (which counts cores: four chips), "h100", "h100-8".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jax_client.errors import BadRequestError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A kind of device, as jax counts devices.

    Attributes:
        name: how the command line names it.
        platform: "tpu", "gpu" or "cpu".
        kind: how jax's name of the device begins.
        usable: bytes that programs get by default.
        flops: peak of bfloat16 matmuls with float32 sums, FLOP/s; None where it is not known.
        bandwidth: of the memory, bytes/s.
        link: of all links to other devices of the slice or the host, one direction, bytes/s.
        per_host: devices of a host, on which one process computes.
        counted: what a cloud's name counts for each device.
        source: of the figures.
    """

    name: str
    platform: str
    kind: str
    usable: int
    flops: float | None
    bandwidth: float | None
    link: float | None
    per_host: int
    counted: int = 1
    source: str


_TPU = (
    "peak and bandwidth: Google's page of the TPU version; links: scaling-book (jax-ml.github.io), each way; memory: "
    "what XLA's compiler for TPUs lets a program have"
)
_GPU = (
    "peak (dense), bandwidth and NVLink, each way: NVIDIA's data sheet; memory: the three quarters that jax takes of "
    "what the driver reports"
)


def _tpu(
    name: str, kind: str, gib: float, tflops: float, gb_s: float, link: float, per_host: int, counted: int = 1
) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        kind=kind,
        usable=int(gib * GIB),
        flops=tflops * 1e12,
        bandwidth=gb_s * 1e9,
        link=link * 1e9,
        per_host=per_host,
        counted=counted,
        source=_TPU,
    )


def _gpu(name: str, kind: str, gib: float, tflops: float, gb_s: float, link: float) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        kind=kind,
        usable=int(0.75 * gib * GIB),
        flops=tflops * 1e12,
        bandwidth=gb_s * 1e9,
        link=link * 1e9,
        per_host=8,
        source=_GPU,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        #    name   kind            GiB   TFLOP/s GB/s  link per host
        _tpu("v4", "TPU v4", 30.75, 275, 1228, 270, 4, counted=2),
        _tpu("v5e", "TPU v5 lite", 15.75, 197, 819, 180, 8),
        _tpu("v5p", "TPU v5", 95.74, 459, 2765, 540, 4, counted=2),
        _tpu("v6e", "TPU v6 lite", 31.25, 918, 1638, 360, 8),
        # Each chip of this version is two devices: half of a chip's figures.
        _tpu("v7x", "TPU7x", 94.75, 1153, 3690, 300, 8),
        _gpu("a100", "NVIDIA A100", 79.2, 312, 2039, 300),
        _gpu("h100", "NVIDIA H100", 79.1, 989, 3350, 450),
        _gpu("h200", "NVIDIA H200", 139.8, 989, 4800, 450),
        _gpu("b200", "NVIDIA B200", 178.0, 2250, 7700, 900),
    )
}


@dataclass(frozen=True, slots=True)
class DescribedDevice:
    """A device that is not here: it says what a `sharding.Device` is asked, and cannot compute.

    Attributes:
        used: bytes that something is in already.
    """

    id: int
    chip: Chip
    used: int = 0

    @property
    def platform(self) -> str:
        """That of the chip."""
        return self.chip.platform

    @property
    def device_kind(self) -> str:
        """That of the chip."""
        return self.chip.kind

    def memory_stats(self) -> dict[str, Any] | None:
        """Return what a device of this kind says before anything but `used` is in it; a CPU says nothing."""
        if self.platform == "cpu":
            return None
        return {"bytes_limit": self.chip.usable, "bytes_in_use": self.used}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Devices of one kind, all of a slice or of a host.

    Attributes:
        name: as the user gave it.
        count: devices.
    """

    name: str
    chip: Chip
    count: int

    @property
    def hosts(self) -> int:
        """How many hosts the devices are on."""
        return -(-self.count // self.chip.per_host)

    def devices(self, used: int = 0) -> list[DescribedDevice]:
        """Return the devices, with `used` bytes of each in use."""
        return [DescribedDevice(i, self.chip, used) for i in range(self.count)]


def parse_machine(text: str) -> Machine:
    """Return the machine of a name such as "v5e-8", "v5p-8" or "h100"; without a number it is one device.

    Raises:
        BadRequestError: there is no such chip, or no such number of them.
    """
    name, _, number = text.strip().lower().partition("-")
    chip = CHIPS.get(name)
    known = ", ".join(CHIPS)
    if chip is None or not re.fullmatch(r"|[1-9]\d{0,3}", number):
        raise BadRequestError(
            f"the machine is {text!r}; give a chip and a number, such as v5e-8 or h100-8. Chips: {known}."
        )
    counted = int(number or chip.counted)
    if counted % chip.counted:
        raise BadRequestError(
            f"the machine is {text!r}, but names of {chip.name} count {chip.counted} for each chip; the number must be "
            f"a multiple of {chip.counted}."
        )
    return Machine(name=text, chip=chip, count=counted // chip.counted)


def machine_of(platform: str, kind: str, count: int, memory_bytes: int | None) -> Machine:
    """Return the machine of devices as jax names them, with the memory that they report.

    Args:
        platform: "tpu", "gpu" or "cpu".
        kind: of the devices.
        count: of devices.
        memory_bytes: of a device; None where it does not say.
    """
    # The longest name first: "TPU v5" begins "TPU v5 lite".
    known = sorted((c for c in CHIPS.values() if kind.startswith(c.kind)), key=lambda c: -len(c.kind))
    usable = memory_bytes or (known[0].usable if known else 0)
    chip = Chip(
        name=known[0].name if known else kind,
        platform=platform,
        kind=kind,
        usable=usable,
        flops=known[0].flops if known else None,
        bandwidth=known[0].bandwidth if known else None,
        link=known[0].link if known else None,
        per_host=count,
        source=known[0].source if known else "this machine",
    )
    return Machine(name=f"{count} x {kind}", chip=chip, count=count)
