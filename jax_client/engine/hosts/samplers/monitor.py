"""What does an engine with samplers say about itself? What the trainer says, with what all replicas have sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax_client.engine.core.programs import CompileRecord
from jax_client.engine.hosts.samplers.members import Member
from jax_client.engine.hosts.samplers.messages import Counts
from jax_client.engine.hosts.samplers.pool import SamplerPool
from jax_client.engine.protocol import Description, Health, Monitor, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplersMonitor:
    """Implements `protocol.Monitor`; asks no replica: each says what it has done with every answer, and when pinged.

    Attributes:
        trainer: of the engine that trains.
        pool: the replicas.
    """

    trainer: Monitor
    pool: SamplerPool

    def describe(self) -> Description:
        """Return what the trainer says; `sampling` is of all, `samplers` has each replica."""
        described = self.trainer.describe()
        sampling = summed(described.get("sampling", {}), self.pool.members, self.pool.rows)
        return described | {"sampling": sampling, "samplers": [member.described() for member in self.pool.members]}

    def usage(self) -> Usage:
        """Return what changes from step to step. Memory is the trainer's."""
        usage = self.trainer.usage()
        return {**usage, "sampling": summed(usage["sampling"], self.pool.members, self.pool.rows)}

    def compiled(self, since: int = 0) -> list[CompileRecord]:
        """Return the trainer's compiles so far, but for the first `since`."""
        return self.trainer.compiled(since)

    def health(self) -> Health:
        """Return how the trainer does, and what waits for the samplers."""
        health = self.trainer.health()
        reports = [member.report for member in self.pool.members if member.report is not None]
        compiling = [each for report in reports for each in report.compiling]
        waiting, state = len(self.pool), health["state"]
        if state == "idle" and waiting:
            state = "compiling" if compiling else "busy"
        return {
            "state": state,
            "waiting": health["waiting"] + waiting,
            "stalled_seconds": health["stalled_seconds"],
            "compiling": [*health["compiling"], *compiling],
            "hosts": [*health.get("hosts", []), *(member.described() for member in self.pool.members)],
        }


def summed(trainer: Counts, members: Sequence[Member], rows: int) -> Counts:
    """Return the counts of the trainer's sampler and of all replicas, under the same names.

    Args:
        trainer: as `SamplingLoop.describe` returns them.
        members: the replicas.
        rows: without an answer, in the pool; those that it gave to the trainer count here, not there.
    """
    total = dict(trainer)
    for member in members:
        for name, value in member.sampled().items():
            # A replica that has nothing to do may not have said so yet.
            total[name] = total.get(name, 0) + (value if member.rows or name != "rows_running" else 0)
    total["rows_waiting"] = rows
    if "occupancy" in total:
        total["occupancy"] = total["decode_rows"] / total["decode_slots"] if total["decode_slots"] else 0.0
    return total
