"""What does the pool know of each replica, and which one takes a request?

The one that has computed the beginning of the prompt, unless its load is far above another's; else the least loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jax_client.engine.hosts.samplers.messages import Counts, Opened, Replica, Report
from jax_client.engine.hosts.samplers.prefixes import Chain, Prefixes

if TYPE_CHECKING:
    from jax_client.engine.core.adapters import Snapshot
    from jax_client.engine.core.requests import GenerationRequest, GenerationResult

State = Literal["starting", "ready", "restarting", "lost"]
# Before a replica has said how large its batches are.
SLOTS = 32


@dataclass(slots=True, eq=False)
class Flight:
    """A request without an answer.

    Attributes:
        number: tells it from every other of the pool.
        pages: the chain of its prompt, as `prefixes` has it.
        member: who computes it; None while it waits for one, or is the trainer's.
        attempt: how often it was given to someone; answers to earlier attempts are ignored.
        losses: how many of those were lost meanwhile.
        inner: the trainer's answer to it.
    """

    number: int
    snapshot: Snapshot | None
    request: GenerationRequest
    future: Future[GenerationResult]
    pages: Chain
    member: Member | None = None
    attempt: int = 0
    losses: int = 0
    inner: Future[GenerationResult] | None = None

    @property
    def rows(self) -> int:
        """Rows that it takes."""
        return max(1, self.request.num_samples)

    @property
    def version(self) -> int:
        """The number of its snapshot, 0 for the base model."""
        return 0 if self.snapshot is None else self.snapshot.number


@dataclass(slots=True, eq=False)
class Member:
    """A replica as the pool sees it. Only the pool's thread changes it.

    Attributes:
        starts: how often it was started: each time it is another process, with nothing in its cache.
        failures: losses and failed starts since it answered last.
        opened: what it is; None until it can sample for the first time.
        reason: why it was lost, "" if it was not.
        bound: by version, done once the adapter is there.
        flights: by number, what it computes.
        rows: of these.
        prefix_hits: requests that it got for the beginning of their prompt.
        counts: what this process of it has sampled, as it said last.
        past: the same of its earlier processes.
        report: how it did when it was asked last.
        asked: the ping that is not answered yet, and when that was sent.
        heard: whether this process has answered any ping.
        start_at: when it is to be started again; None if it is not.
    """

    replica: Replica
    index: int
    state: State = "starting"
    starts: int = 1
    failures: int = 0
    opened: Opened | None = None
    reason: str = ""
    bound: dict[int, Future[None]] = field(default_factory=dict)
    flights: dict[int, Flight] = field(default_factory=dict)
    rows: int = 0
    sent: int = 0
    prefix_hits: int = 0
    counts: Counts = field(default_factory=dict)
    past: Counts = field(default_factory=dict)
    report: Report | None = None
    asked: Future[Report] | None = None
    asked_at: float = 0.0
    heard: bool = False
    start_at: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Tells this process of it from all others."""
        return self.index, self.starts

    @property
    def slots(self) -> int:
        """Rows of its largest batch."""
        return SLOTS if self.opened is None else self.opened.slots

    def take(self, flight: Flight) -> None:
        """Count a request as this replica's."""
        flight.member = self
        self.flights[flight.number] = flight
        self.rows += flight.rows
        self.sent += 1

    def drop(self, flight: Flight) -> None:
        """Count it as this replica's no more."""
        if self.flights.pop(flight.number, None) is not None:
            self.rows -= flight.rows

    def end_process(self) -> list[Flight]:
        """Forget the process that is gone, but for what it has sampled; return what it computed."""
        flights = list(self.flights.values())
        self.past, self.counts = self.sampled(), {}
        self.flights, self.bound, self.rows = {}, {}, 0
        self.report, self.asked, self.heard = None, None, False
        return flights

    def sampled(self) -> Counts:
        """Return what all of its processes have sampled, and what the last one holds."""
        now = self.counts
        return now | {name: self.past.get(name, 0) + now.get(name, 0) for name in CUMULATIVE}

    def described(self) -> dict[str, object]:
        """Return it as JSON has it, for people."""
        opened, sampled = self.opened, self.sampled()
        return {
            "role": "sampler",
            "number": self.index,
            "state": self.state,
            "host": self.replica.host,
            "pid": None if opened is None or self.state != "ready" else opened.pid,
            "device": "" if opened is None else opened.device,
            "cores": 0 if opened is None else opened.cores,
            "starts": self.starts,
            "lost_because": self.reason,
            "requests": self.sent,
            "rows": self.rows,
            "versions": len(self.bound),
            "prefix_hits": self.prefix_hits,
            "sampled_tokens": sampled["sampled_tokens"],
            "prompt_tokens_cached": sampled["prompt_tokens_cached"],
            "memory_bytes": {} if self.report is None else self.report.memory_bytes,
            "logs": "" if opened is None else opened.logs,
        }


# Counts of `SamplingLoop.describe` that never fall.
CUMULATIVE = (
    "prompt_tokens",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "sampled_tokens",
    "decode_blocks",
    "decode_rows",
    "decode_slots",
)


def choose(ready: Sequence[Member], flight: Flight, prefixes: Prefixes) -> Member:
    """Return who takes a request, and note that the beginning of its prompt is there.

    The one that knows the longest beginning keeps it until it has half a decode batch more to do than the least loaded
    one. Up to there a further row runs in a batch that runs anyway, and costs less than computing the prompt a second
    time. Beyond that, the samples would wait for each other while another replica has room.
    """
    least = min(ready, key=lambda member: (member.rows, member.sent))
    chosen, by_key = least, {member.key: member for member in ready}
    if (key := prefixes.find(flight.pages, list(by_key))) is not None:
        known = by_key[key]
        if known.rows - least.rows < max(1, known.slots // 2):
            chosen = known
            chosen.prefix_hits += 1
    prefixes.note(flight.pages, chosen.key)
    return chosen
