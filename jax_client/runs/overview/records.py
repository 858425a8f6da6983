"""What does an overview say of a run, a checkpoint, an alert and a series? Frozen records, each with its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from jax_client.values import JsonObject

State = Literal["live", "idle", "done", "unloaded", "crashed", "unknown"]
OPEN: tuple[State, ...] = ("live", "idle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """Something of a run that a person should look at.

    Attributes:
        kind: "nonfinite", "loss", "reward", "kl", "silent" or "disk".
        text: one sentence.
        step: where it was seen; None for what has no step.
        time: unix seconds of that, None where it is not known.
    """

    kind: str
    text: str
    step: int | None = None
    time: float | None = None

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One run in a list; None is what is not known, times are unix seconds.

    Attributes:
        run: its id, "log:NAME" of a log directory.
        source: "run" of the state directory, "log" of a log directory.
        name, script: as people know it; the program that made it.
        state, reason: how it is, and why as far as that is known.
        created, updated, ended: its first and newest sign of life, and its end.
        step, loss, reward: the newest; the loss is the mean of a token.
        tokens: with a loss, trained on so far.
        tokens_per_second: of the newest step.
        wall_seconds: from its beginning to its end, or until now.
        disk_bytes, checkpoints, last_checkpoint, last_saved: what it has saved.
        resumed_from, parent, children: the checkpoint that it was made from, that one's run, and runs made from it.
        pid, host: the process that has it open, or had it open last.
        key: the name of the server's key whose run it is.
        spark, spark_name: at most 61 values of the reward, else of the loss.
        alerts, note, tags, archived, user_metadata: see `alerts` and `notes`.
    """

    run: str
    source: Literal["run", "log"]
    name: str
    script: str | None = None
    model: str | None = None
    rank: int | None = None
    state: State = "unknown"
    reason: str | None = None
    created: float | None = None
    updated: float | None = None
    ended: float | None = None
    step: int | None = None
    loss: float | None = None
    reward: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    wall_seconds: float | None = None
    disk_bytes: int = 0
    checkpoints: int = 0
    last_checkpoint: str | None = None
    last_saved: float | None = None
    resumed_from: str | None = None
    parent: str | None = None
    children: Sequence[str] = ()
    pid: int | None = None
    host: str | None = None
    key: str | None = None
    spark: Sequence[float] = ()
    spark_name: str | None = None
    alerts: Sequence[Alert] = ()
    note: str = ""
    tags: Sequence[str] = ()
    archived: bool = False
    user_metadata: Mapping[str, str] | None = None

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRow:
    """One checkpoint in a list.

    Attributes:
        path: its tinker:// path.
        run, name, kind: whose it is; an autosave can be trained on as "training" can.
        step, loss, reward: at the save; None where that is not known.
        size_bytes, created, expires_at, public: as the store has them.
        verified: {"time", "ok", "error"} of the newest check since it was written.
        parent: the checkpoint that its run was made from.
        resume: one line of Python that uses it.
    """

    path: str
    run: str
    kind: Literal["training", "sampler", "autosave", "export"]
    name: str
    step: int
    loss: float | None = None
    reward: float | None = None
    size_bytes: int = 0
    created: float = 0.0
    expires_at: float | None = None
    public: bool = False
    verified: JsonObject | None = None
    parent: str | None = None
    resume: str = ""

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The points of a run after a cursor, thinned.

    Attributes:
        run: its id.
        series: by name {"kind", "step", "time", "tokens", "value"}, lists of one length; a time may be None. A thinned
            one also has "count", of the finite values after the point before up to this one, and "mean", theirs.
        names: all that the run has.
        events: {"kind", "step", "time", "details"} in their order.
        next: the cursor from which the next read continues.
        live: whether more is to be expected.
        reset: this is everything, for the cursor that was given is not one of this file: what was read before is void.
    """

    run: str
    series: Mapping[str, JsonObject] = field(default_factory=dict)
    names: Sequence[str] = ()
    events: Sequence[JsonObject] = ()
    next: str = ""
    live: bool = False
    reset: bool = False

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them; "reset" only where it is so."""
        # Not asdict, which copies every number.
        shown = {each.name: getattr(self, each.name) for each in fields(self)}
        return shown if self.reset else {name: value for name, value in shown.items() if name != "reset"}
