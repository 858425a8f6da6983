"""How long is a checkpoint kept when clocks jump and machines restart? It expires by the clock since the boot.

A lifetime is measured by the clock since the boot while the machine runs, and after a reboot by the wall clock, once it
has been past the deadline for an hour. The wall clock jumps: it is set by hand, by a time server, or wrong until one
answers after a start. The clock since the boot does not jump, and runs while a laptop sleeps, but starts anew with each
boot.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jax_client.values import JsonObject

GRACE_SECONDS = 3600.0
# The year 9999 begins: what is later is no time, and Python has no words for it.
MAX_TIME = 253_370_764_800.0


def unix_seconds(value: object) -> float | None:
    """Return the time that a file gives in unix seconds; None for what is none, such as 1e300."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= MAX_TIME else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Now, by both clocks.

    Attributes:
        wall: unix seconds.
        boot_id: of this start of the machine, "" where the system has none.
        since_boot: seconds.
    """

    wall: float
    boot_id: str
    since_boot: float


def now() -> Moment:
    """Read both clocks."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return Moment(wall=time.time(), boot_id=_boot_id(), since_boot=time.clock_gettime(clock))


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """When something ends.

    Attributes:
        wall: unix seconds; what is shown.
        boot_id, since_boot: the same moment by the clock of the boot in which the deadline was set.
        doubted_in, doubted_since: the boot in which the wall clock was first seen past `wall`, and since when.
    """

    wall: float
    boot_id: str
    since_boot: float
    doubted_in: str = ""
    doubted_since: float = 0.0

    @classmethod
    def after(cls, seconds: float, moment: Moment) -> Deadline:
        """Return the deadline `seconds` after `moment`."""
        return cls(wall=moment.wall + seconds, boot_id=moment.boot_id, since_boot=moment.since_boot + seconds)

    @classmethod
    def of(cls, fields: JsonObject | None) -> Deadline | None:
        """Undo `dataclasses.asdict`."""
        return None if fields is None else cls(**fields)

    def passed(self, moment: Moment) -> bool:
        """Return whether the deadline has passed for certain."""
        if self.boot_id and self.boot_id == moment.boot_id:
            return moment.since_boot >= self.since_boot
        insisted = self._doubted(moment) and moment.since_boot - self.doubted_since >= GRACE_SECONDS
        return moment.wall >= self.wall and insisted

    def observed(self, moment: Moment) -> Deadline:
        """Return the deadline with what `moment` adds: the wall clock is past it, for the first time in this boot."""
        if self.boot_id and self.boot_id == moment.boot_id:
            return self
        if moment.wall < self.wall:
            return replace(self, doubted_in="", doubted_since=0.0)
        if self._doubted(moment):
            return self
        return replace(self, doubted_in=moment.boot_id or "?", doubted_since=moment.since_boot)

    def _doubted(self, moment: Moment) -> bool:
        return self.doubted_in == (moment.boot_id or "?") and self.doubted_since <= moment.since_boot
