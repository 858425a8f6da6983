"""What does a server hold in memory, and what can it bring back: sessions, models and samplers?

What a client knows by its id is in memory, or was unloaded for something else, or is of an earlier server whose journal
tells how to make it again.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, DoesNotFitError, NotFoundError
from jax_client.runs.lifecycle.futures import settled
from jax_client.runs.lifecycle.run import Run, resume_run
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle, base_sampler, checkpoint_sampler
from jax_client.runs.lifecycle.session import Session, SessionInfo, Status
from jax_client.runs.paths import sampler_path
from jax_client.server.state import custom_losses
from jax_client.server.state.evictable import Evictable
from jax_client.server.state.ledger import Sequence
from jax_client.server.state.request_log import RequestLog
from jax_client.values import CheckpointKey

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", Run, SamplerHandle)

# What was not used for so long may be unloaded when something else needs its memory.
IDLE_SECONDS = 60.0
# Of the samplers that a session made of weights in memory: so many of the newest stay on the device, and so many are
# kept at all. A loop makes one with every step, and uses the newest few.
ON_DEVICE, IN_MEMORY = 4, 16
# The SDK gives a sign of life every ten seconds. A session without one for so long is ended where memory is needed.
SILENT_SECONDS = 120.0


@dataclass(slots=True, eq=False, kw_only=True)
class _Served(Generic[R]):
    """A run or a sampler that is in memory, or can be again.

    Attributes:
        base_model: as its session calls it, as far as the request told.
    """

    session_id: str
    resident: Evictable[R]
    base_model: str | None

    @property
    def name(self) -> str | None:
        """What its session calls the base model."""
        there = self.resident.there
        return self.base_model if there is None else there.model_ref.name


@dataclass(slots=True, eq=False, kw_only=True)
class Model(_Served[Run]):
    """A run, and the order of its requests."""

    order: Sequence = field(default_factory=Sequence)


@dataclass(slots=True, eq=False, kw_only=True)
class Sampling(_Served[SamplerHandle]):
    """A sampler.

    Attributes:
        ephemeral: whether it has weights of its own that were never saved: they end with the server, or when newer ones
            push them out. One that follows its run has none.
    """

    ephemeral: bool = False

    @classmethod
    def of(cls, sampler: SamplerHandle) -> Sampling:
        """Return a sampler of this process as one that is served."""
        return cls(
            session_id=sampler.session.session_id,
            resident=Evictable(lambda: sampler, "sampler", settled(sampler)),
            base_model=sampler.model_ref.name,
            ephemeral=True,
        )


class Holdings:
    """The sessions, models and samplers of a server. Thread-safe.

    Args:
        config: engine settings, of every session.
        journal: tells over a restart what there was; None keeps it in memory.
    """

    def __init__(self, config: EngineConfig, journal: RequestLog | None) -> None:
        self.config = config
        self.own = Session(config)
        self._journal = journal
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self._samplers: dict[str, Sampling] = {}
        self._losses: dict[str, custom_losses.CustomLoss] = {}
        self._seen: dict[str, float] = {}  # when a session gave its last sign of life, by the monotonic clock
        self._lock = threading.RLock()

    def session(self, session_id: str) -> Session:
        """Return a session; one of an earlier server goes on.

        Raises:
            NotFoundError: there is none of this id.
        """

        def again(about: dict[str, Any]) -> Session:
            return Session(self.config, SessionInfo(**about), session_id)

        session = self._known(self._sessions, "session", session_id, again, "; make a new ServiceClient.")
        self._seen[session_id] = time.monotonic()
        return session

    def _end(self, session_id: str, session: Session, status: Status, detail: str | None) -> Future[None]:
        """End a session; what it holds is saved and given back in the background."""
        closing = session.close(status, detail)
        closing.add_done_callback(lambda _: self._forget(session_id))
        return closing

    def _end_silent(self) -> bool:
        """End the sessions that hold memory and whose clients are gone, and wait; say whether there were any."""
        with self._lock:
            served = [*self._models.values(), *self._samplers.values()]
            sessions, seen = dict(self._sessions), dict(self._seen)
        for each in served:
            seen[each.session_id] = max(seen.get(each.session_id, 0.0), each.resident.used)
        holding = {each.session_id for each in served if each.resident.wanted}
        before = time.monotonic() - SILENT_SECONDS
        silent = [key for key in sorted(holding & sessions.keys()) if seen.get(key, 0.0) < before]
        for key in silent:
            why = f"its client was silent for {SILENT_SECONDS:g} s, and the memory was needed"
            logger.warning("session %s is ended: %s", key, why)
            self._end(key, sessions[key], "interrupted", why).result()
            self._forget(key)  # perhaps before the callback does
        return bool(silent)

    def _forget(self, session_id: str) -> None:
        with self._lock:
            self._seen.pop(session_id, None)
            for table in (self._models, self._samplers, self._losses):
                for key in [key for key, each in table.items() if each.session_id == session_id]:
                    del table[key]
        if self._journal is not None:
            self._journal.forget_session(session_id)

    def _model(self, model_id: str) -> Model:
        def again(about: dict[str, Any]) -> Model:
            if about["path"] is None:
                raise NotFoundError(
                    f"model {model_id!r} is not in memory, the server was restarted. {self._way_on(model_id)}"
                )
            path = CheckpointKey.parse(about["path"])
            resident = Evictable(lambda: self._with_room(lambda: self._revive(model_id, about, path)), "resume")
            return Model(
                session_id=about["session_id"],
                resident=resident,
                base_model=about["base_model"],
                order=Sequence(about["following"]),
            )

        advice = ". Make one, or go on from a checkpoint of its run."
        return self._known(self._models, "model", model_id, again, advice)

    def _revive(self, run_id: str, about: dict[str, Any], path: CheckpointKey) -> Run:
        session = self.session(about["session_id"])
        run = resume_run(session, run_id, path, about["base_model"], None, optimizer=True)
        # From now on the checkpoint is not all that there is.
        self._note("model", run_id, {"session_id": about["session_id"], "path": None})
        return run

    def _park(self, run_id: str, model: Model, aloud: bool, run: Run) -> Callable[[], Run] | None:
        path = run.park(aloud=aloud)
        if path is None:
            return None
        about = {
            "session_id": model.session_id,
            "path": str(path),
            "base_model": run.model_ref.name,
            "following": model.order.following,
        }
        self._note("model", run_id, about)
        published = run.published

        def again() -> Run:
            revived = self._revive(run_id, about, path)
            revived.published = published
            return revived

        return lambda: self._with_room(again)

    def _way_on(self, run_id: str) -> str:
        """Say from which checkpoint a run that is gone can be continued."""
        try:
            saved = [record for record in self.own.store.list(run_id) if record.kind == "weights"]
        except Exception:
            logger.warning("the checkpoints of %s could not be listed", run_id, exc_info=True)
            saved = []
        if not saved:
            return "Its run has no checkpoint; begin again."
        newest = max(saved, key=lambda record: (record.step, record.created))
        path = newest.key
        return f'Go on from step {newest.step}: create_training_client_from_state_with_optimizer("{path}").'

    def sampler(self, sampler_id: str) -> Future[SamplerHandle]:
        """Return a sampler that is there or on its way.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self.sampling(sampler_id).resident.use()

    def sampling(self, sampler_id: str) -> Sampling:
        """Return a sampler that can be used. Raises as `sampler`."""
        again = lambda about: self._sampling(sampler_id, about)  # noqa: E731
        return self._known(self._samplers, "sampler", sampler_id, again, "; make one again.")

    def _sampling(self, sampler_id: str, about: dict[str, Any]) -> Sampling:
        if "of" in about:
            raise NotFoundError(
                f"sampler {sampler_id!r} had weights of {about['of']} that were never saved, and they are gone: "
                f"{IN_MEMORY} newer ones were made in its session, or the server was restarted. Make a sampler of the "
                "model as it is now, or of a checkpoint."
            )
        session, base_model, model_path = self.session(about["session_id"]), about["base_model"], about["model_path"]
        if (base_model is None) == (model_path is None):
            raise BadRequestError("give one of base_model and model_path.")
        if model_path is None:
            make = lambda: base_sampler(session, base_model, sampler_id=sampler_id)  # noqa: E731
        else:
            path = sampler_path(model_path, "create_sampling_client")
            # Now, so that a wrong path fails the call that gave it.
            base_model = session.store.record(path).metadata["base_model"]
            make = lambda: checkpoint_sampler(session, path, sampler_id=sampler_id)  # noqa: E731
        resident = Evictable(lambda: self._with_room(make), "sampler")
        return Sampling(session_id=session.session_id, resident=resident, base_model=base_model)

    def adopt(self, sampler: SamplerHandle) -> None:
        """Serve a sampler of this process."""
        with self._lock:
            self._samplers[sampler.sampler_id] = Sampling.of(sampler)

    def _with_room(self, make: Callable[[], T]) -> T:
        """Make something, unloading what nobody used for a while as long as there is no room for it."""
        while True:
            try:
                return make()
            except DoesNotFitError:
                if not self.unload_idlest():
                    raise
                # What is left of it may hang together in cycles.
                gc.collect()

    def unload_idlest(self) -> bool:
        """Unload the model or sampler that was not used for the longest time; say whether anything was freed."""
        with self._lock:
            models, samplings = dict(self._models), list(self._samplers.values())
        idle: list[tuple[float, Callable[[], bool]]] = []
        for run_id, model in models.items():
            if (since := model.resident.idle_since()) is not None:
                idle.append((since, partial(self._unload_model, run_id, model)))
        for sampling in samplings:
            if (since := sampling.resident.idle_since()) is not None:
                idle.append((since, partial(sampling.resident.unload, SamplerHandle.park)))
        idle.sort(key=lambda each: each[0])
        for since, unload in idle:
            if time.monotonic() - since >= IDLE_SECONDS and unload():
                self._let_go()
                return True
        return self._let_go() or self._end_silent()

    def _unload_model(self, run_id: str, model: Model, aloud: bool = False) -> bool:
        try:
            return model.resident.unload(partial(self._park, run_id, model, aloud))
        except Exception as error:
            logger.warning("model %s could not be saved, so it stays in memory: %s", run_id, error)
            return False

    def _let_go(self) -> bool:
        """Give back the base models that sessions, and the server itself, hold and do not use."""
        with self._lock:
            served = [*self._models.values(), *self._samplers.values()]
            sessions = {**self._sessions, "": self.own}
        freed = False
        for session_id, session in sessions.items():
            used = {each.name for each in served if each.session_id == session_id and each.resident.wanted}
            # None: something is on its way there, of which only its checkpoint tells what it needs.
            if None not in used:
                freed |= session.release_unused(used)
        return freed

    def _tidy(self, session_id: str) -> None:
        """Move superseded samplers of unsaved weights off the device, and forget the oldest."""
        with self._lock:
            own = [(k, s) for k, s in self._samplers.items() if s.session_id == session_id and s.ephemeral]
        for _, sampling in own[:-ON_DEVICE]:
            sampling.resident.unload(SamplerHandle.park)
        for key, sampling in own[:-IN_MEMORY]:
            if not sampling.resident.busy:
                with self._lock:
                    self._samplers.pop(key, None)

    def _known(self, table: dict[str, T], what: str, key: str, again: Callable[[dict[str, Any]], T], advice: str) -> T:
        """Return an entry of a table, or make it again from the journal."""
        with self._lock:
            found = table.get(key)
        if found is None and self._journal is not None:
            about = self._journal.get(what, key)
            if about is not None:
                made = again(about)
                with self._lock:
                    found = table.setdefault(key, made)
        if found is None:
            raise NotFoundError(f"there is no {what} {key!r} on this server{advice}")
        return found

    def _note(self, what: str, key: str, about: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.put(what, key, about)
