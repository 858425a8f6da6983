"""Which sessions, models and samplers does a server have in memory, and how does it bring back those that it had?

An object that a client knows by its id is live, or was evicted for another, or belongs to an earlier server whose
records tell how to make it again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, NotFoundError
from jax_client.runs.lifecycle.base_models import BaseModels
from jax_client.runs.lifecycle.futures import settled
from jax_client.runs.lifecycle.run import Run, resume_run
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle, base_sampler, checkpoint_sampler
from jax_client.runs.lifecycle.session import Session, SessionInfo, Status
from jax_client.runs.paths import sampler_path
from jax_client.runs.results import api_records
from jax_client.server.session_use import SessionUse, size
from jax_client.server.state.evictable import Evictable, Served
from jax_client.server.state.eviction import IN_MEMORY, Eviction
from jax_client.server.state.pending import ModelQueues
from jax_client.server.state.tables import Fields, Records, Table
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.custom_losses import CustomLoss
from jax_client.values import CheckpointKey, Owner

logger = logging.getLogger(__name__)

# Where there are too many sessions, one is ended that holds nothing and gives no sign of life; the SDK gives one every
# ten seconds. One that holds samplers, which can be made again, may be silent for longer; one with a model stays.
IDLE_SECONDS = 15.0
SILENT_SECONDS = 120.0
# Samplers in memory; the longest unused are made again from their records.
MAX_SAMPLERS = 1_024


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientObjects:
    """The objects that clients of this process own. A server looks them up first, and neither evicts nor ends them.

    Attributes:
        sessions: by their ids.
        samplers: by their ids.
    """

    sessions: Mapping[str, Session]
    samplers: Mapping[str, SamplerHandle]


class LiveObjects:
    """The sessions, models, samplers and uploaded losses of a server. Thread-safe.

    Attributes:
        config: engine settings of every session.
        own: the session of the server itself.
        sessions, models, samplers, losses: the objects in memory, by their ids.
        peers: the evictions of all servers on the same devices, this one's among them.

    Args:
        config: engine settings of every session.
        records: what the next server will know.
        queues: the queue of every model, whose place in the order is part of a model's record.
        account: what counts the sessions and what they keep; None bounds them by default.
        clients: objects of this process's clients, None for a server of other processes only.
        base_models: where base models are loaded; None shares those of the process.
        owner: whose objects these are; None is for all clients.
        peers: those of other servers on the same devices, to which this one's is added; None is for no others.
    """

    def __init__(
        self,
        config: EngineConfig,
        records: Records,
        queues: ModelQueues,
        account: Account | None = None,
        clients: ClientObjects | None = None,
        base_models: BaseModels | None = None,
        owner: Owner | None = None,
        peers: list[Eviction] | None = None,
    ) -> None:
        self.config = config
        self.own = Session(config, models=base_models, owner=owner)
        self.sessions: Table[Session] = Table("session", records, "; make a new ServiceClient.")
        self.models: Table[Served[Run]] = Table("model", records, ". Make one, or go on from a checkpoint of its run.")
        self.samplers: Table[Served[SamplerHandle]] = Table("sampler", records, "; make one again.")
        self.losses: Table[CustomLoss] = Table("custom loss", records, "; create it again.")
        self._records = records
        self._queues = queues
        self._clients = clients
        self._closing = False
        self.peers = [] if peers is None else peers
        self._use = SessionUse(account or Account(), self._end_idle_session)
        self._eviction = Eviction(
            self.own,
            self.sessions,
            self.models,
            self.samplers,
            self._use.last_sign,
            self._end_and_wait,
            self.peers,
        )

    # Sessions

    def add_session(self, info: SessionInfo) -> Session:
        """Begin a session.

        Raises:
            BusyError: there are too many, and none that could be ended.
        """
        fields = info.to_json()
        counted = {"sessions": 1, "record_bytes": size(fields)}
        self._use.take(**counted)
        session = Session(self.config, info, models=self.own.models, owner=self.own.owner)
        self._use.keep(session.session_id, counted)
        self.sessions.add(session.session_id, session)
        self.sessions.record(session.session_id, fields)
        self.note_sign(session.session_id)
        logger.info(
            "client %s connected%s", session.session_id, f" ({info.display_name!r})" if info.display_name else ""
        )
        return session

    def session(self, session_id: str) -> Session:
        """Return a session, also one of an earlier server; this is a sign of life of its client.

        Raises:
            NotFoundError: this server does not know the id.
        """
        session = None if self._clients is None else self._clients.sessions.get(session_id)
        if session is not None:
            self.note_sign(session_id)
            return session

        def remake(fields: Fields) -> Session:
            info = SessionInfo.from_json(fields)
            made = Session(self.config, info, session_id, models=self.own.models, owner=self.own.owner)
            # What it keeps is in the records of an earlier server, and is counted as it is used.
            self._use.keep(session_id, {"sessions": 1, "record_bytes": size(fields)}, taken=False)
            return made

        session = self.sessions.get(session_id, remake)
        self.note_sign(session_id)
        return session

    def note_sign(self, session_id: str) -> None:
        """Note a sign of life of a session's client; of one that is not known, nothing is noted."""
        clients = self._clients
        known = self.sessions.in_memory(session_id) or (clients is not None and clients.sessions.get(session_id))
        if known and not known.closed:
            self._use.note_sign(session_id)

    def last_sign(self, session_id: str) -> float:
        """Return the monotonic time of the last sign of life of a session's client, 0 for none."""
        return self._use.last_sign(session_id)

    def check_room(self) -> None:
        """Raise BusyError unless there is room for one model more."""
        self._use.check(records=1, loads=1)

    def _end_idle_session(self) -> bool:
        """End the session whose client has been silent for the longest, if it keeps nothing that is lost with it."""
        holding = {model.session_id for model in self.models.values()}
        sampling = {sampler.session_id for sampler in self.samplers.values()}
        for session_id, seconds in self._use.silent(IDLE_SECONDS):
            if session_id in holding or (session_id in sampling and seconds < SILENT_SECONDS):
                continue
            session = self.sessions.in_memory(session_id)
            if session is not None:
                detail = f"its client was silent for {seconds:.0f} s, and others had no room"
                self.end_session(session_id, session, "interrupted", detail)
                self.forget_session(session_id)
                return True
        return False

    def end_session(self, session_id: str, session: Session, status: Status, detail: str | None) -> Future[None]:
        """End a session; its runs are saved and its memory is freed in the background."""
        logger.info("client %s ended: %s%s", session_id, status, f", {detail!r:.200}" if detail else "")
        closing = session.close(status, detail)
        closing.add_done_callback(lambda _: self.forget_session(session_id))
        return closing

    def _end_and_wait(self, session_id: str, detail: str) -> None:
        session = self.sessions.in_memory(session_id)
        if session is None:
            return
        logger.warning("session %s is ended: %s", session_id, detail)
        self.end_session(session_id, session, "interrupted", detail).result()
        self.forget_session(session_id)  # the callback may run later

    def forget_session(self, session_id: str) -> None:
        """Forget the models, samplers and losses of an ended session; its answers stay."""
        known, oldest = self._use.forget(session_id)
        # The client is told that the session is closed; what it said of the session is not needed for that.
        if known and (session := self.sessions.in_memory(session_id)) is not None:
            session.info = SessionInfo()
        if oldest is not None:
            self.sessions.remove(oldest)
        for table in (self.models, self.samplers, self.losses):
            for key, each in table.items():
                if each.session_id == session_id:
                    table.remove(key)
        self._queues.forget(session_id)
        self._records.forget_session(session_id)

    # Models

    def add_model(self, run_id: str, session_id: str, base_model: str | None, make: Callable[[], Run]) -> Served[Run]:
        """Add a model that `make() -> run` loads when it is pinned; `check_room` was asked before."""
        self._use.keep(session_id, {"records": 1, "record_bytes": size(run_id)}, taken=False)
        model = self._model(run_id, session_id, base_model, make)
        self.models.put(run_id, model)
        self._record_unsaved(run_id, session_id)
        return model

    def model(self, model_id: str) -> Served[Run]:
        """Return a model.

        Raises:
            NotFoundError: this server does not know the id, or the model was lost with an earlier server.
        """

        def remake(fields: Fields) -> Served[Run]:
            if fields["path"] is None:
                advice = self.resume_advice(model_id)
                raise NotFoundError(f"model {model_id!r} is not in memory, the server was restarted. {advice}")
            self._queues.of(model_id, fields["following"])
            make = partial(self._resume, model_id, fields)
            return self._model(model_id, fields["session_id"], fields["base_model"], make)

        return self.models.get(model_id, remake)

    def _model(self, run_id: str, session_id: str, base_model: str | None, make: Callable[[], Run]) -> Served[Run]:
        free = partial(self._free_run, run_id, session_id)
        evictable = Evictable(lambda: self._eviction.make_fit(make), free, "model")
        return Served(session_id=session_id, evictable=evictable, base_model=base_model)

    def _record_unsaved(self, run_id: str, session_id: str) -> None:
        # Without a path: what is only in memory ends with the server.
        self.models.record(run_id, {"session_id": session_id, "path": None})

    def _resume(self, run_id: str, fields: Fields) -> Run:
        path = CheckpointKey.parse(fields["path"])
        session = self.session(fields["session_id"])
        run = resume_run(session, run_id, path, fields["base_model"], None, optimizer=True)
        # From now on the checkpoint is older than the run.
        self._record_unsaved(run_id, fields["session_id"])
        return run

    def _free_run(self, run_id: str, session_id: str, run: Run) -> Callable[[], Run] | None:
        """Save a run and free its memory; return what loads it again, None if it has to stay."""
        try:
            path = run.evict(announce=self._closing)
        except Exception as error:
            logger.warning("model %s could not be saved, so it stays in memory: %s", run_id, error)
            return None
        if path is None:
            return None
        fields = {
            "session_id": session_id,
            "path": str(path),
            "base_model": run.model_ref.name,
            "following": self._queues.of(run_id).next_number,
        }
        self.models.record(run_id, fields)
        published = run.published

        def resume() -> Run:
            resumed = self._resume(run_id, fields)
            resumed.published = published
            return resumed

        return lambda: self._eviction.make_fit(resume)

    def resume_advice(self, run_id: str) -> str:
        """Return the sentence that names the newest checkpoint of a run that is gone."""
        try:
            saved = [record for record in self.own.store.list(run_id) if record.kind == "weights"]
        except Exception:
            logger.warning("the checkpoints of %s could not be listed", run_id, exc_info=True)
            saved = []
        if not saved:
            return "Its run has no checkpoint; begin again."
        newest = max(saved, key=lambda record: (record.step, record.created))
        return f'Go on from step {newest.step}: create_training_client_from_state_with_optimizer("{newest.key}").'

    # Samplers

    def add_sampler(self, sampler_id: str, session_id: str, base_model: str | None, model_path: str | None) -> None:
        """Add a sampler of a base model or of saved weights, if the id is new; it loads in the background.

        Raises:
            NotFoundError: there is no such session or checkpoint.
            BadRequestError: not exactly one of base_model and model_path is given.
        """
        if self.samplers.in_memory(sampler_id) is not None:
            return
        fields: Fields = {"session_id": session_id, "base_model": base_model, "model_path": model_path}
        made = self._remade_sampler(sampler_id, fields)
        counted = {"records": 1, "record_bytes": size(fields)}
        self._use.take(**counted)
        self._use.keep(session_id, counted)
        loaded = self._use.take_load()
        try:
            sampler = self.samplers.add(sampler_id, made)
            self.samplers.record(sampler_id, fields)
            sampler.evictable.pin().add_done_callback(loaded)
        except BaseException as error:
            loaded(error)
            raise
        self._drop_unused_samplers()

    def _drop_unused_samplers(self) -> None:
        """Drop the samplers that were not used for the longest; they are made again when they are asked for."""
        too_many = len(self.samplers) - MAX_SAMPLERS
        if too_many <= 0:
            return
        unused = [
            (each.evictable.last_used, key)
            for key, each in self.samplers.items()
            if each.remakable and not each.evictable.pinned and each.evictable.state != "loading"
        ]
        for _, key in sorted(unused)[: too_many + MAX_SAMPLERS // 16]:
            self.samplers.remove(key)

    def add_run_sampler(self, sampler_id: str, run: Run, made: Future[SamplerHandle], *, ephemeral: bool) -> None:
        """Add a sampler of a run's weights in memory, as the newest of its session.

        Args:
            sampler_id: its id.
            run: whose weights it has.
            made: the sampler, which is loading.
            ephemeral: whether the sampler has weights of its own, which newer samplers push out.
        """
        session_id = run.session.session_id
        if not ephemeral:
            counted = {"records": 1, "record_bytes": size(sampler_id)}
            self._use.take(**counted)
            self._use.keep(session_id, counted)
        self._add_newest(sampler_id, session_id, made, run.model_ref.name, ephemeral=ephemeral)
        self.samplers.record(sampler_id, {"session_id": session_id, "of": run.run_id})
        self._eviction.evict_superseded(session_id)
        oldest = self._use.note_unsaved(session_id, sampler_id) if ephemeral else None
        if oldest is not None and self.samplers.in_memory(oldest) is None:
            self.samplers.forget_record(oldest)

    def adopt(self, sampler: SamplerHandle) -> None:
        """Serve a sampler of this process's own client, as the newest of its session."""
        session_id, base_model = sampler.session.session_id, sampler.model_ref.name
        self._add_newest(sampler.sampler_id, session_id, settled(sampler), base_model, ephemeral=True)
        self._eviction.evict_superseded(session_id)

    def _add_newest(
        self, sampler_id: str, session_id: str, made: Future[SamplerHandle], base_model: str, *, ephemeral: bool
    ) -> None:
        served = _served_sampler(session_id, made, base_model, ephemeral=ephemeral)
        self.samplers.put(sampler_id, served)

    def sampler(self, sampler_id: str) -> Served[SamplerHandle]:
        """Return a sampler.

        Raises:
            NotFoundError: this server does not know the id, or not any more.
        """
        remake = partial(self._remade_sampler, sampler_id)
        if self._clients is None:
            return self.samplers.get(sampler_id, remake)
        owned = self._clients.samplers.get(sampler_id)
        if owned is not None:
            session_id, base_model = owned.session.session_id, owned.model_ref.name
            return _served_sampler(session_id, settled(owned), base_model, ephemeral=True)
        try:
            return self.samplers.get(sampler_id, remake)
        except NotFoundError:
            raise NotFoundError(
                f"process {os.getpid()} has no sampler {sampler_id!r} any more: its session is closed, or its "
                f"SamplingClient is gone and {IN_MEMORY} newer ones have handles. Keep the client for as long as "
                "others sample with it."
            ) from None

    def _remade_sampler(self, sampler_id: str, fields: Fields) -> Served[SamplerHandle]:
        if "of" in fields:
            raise NotFoundError(
                f"sampler {sampler_id!r} had weights of {fields['of']} that were never saved, and they are gone: "
                f"{IN_MEMORY} newer ones were made in its session, or the server was restarted. Make a sampler of the "
                "model as it is now, or of a checkpoint."
            )
        session, base_model, model_path = self.session(fields["session_id"]), fields["base_model"], fields["model_path"]
        if (base_model is None) == (model_path is None):
            raise BadRequestError("give one of base_model and model_path.")
        if model_path is None:
            make = lambda: base_sampler(session, base_model, sampler_id=sampler_id)  # noqa: E731
        else:
            path = sampler_path(model_path, "create_sampling_client")
            # Read in the call, so that a wrong path fails the call that gave it.
            base_model = api_records.base_model(session.store.record(path).metadata)
            make = lambda: checkpoint_sampler(session, path, sampler_id=sampler_id)  # noqa: E731
        evictable = Evictable(lambda: self._eviction.make_fit(make), SamplerHandle.park, "sampler")
        return Served(session_id=session.session_id, evictable=evictable, base_model=base_model, remakable=True)

    def make_fit(self, make: Callable[[], SamplerHandle]) -> SamplerHandle:
        """Return what `make()` loads, evicting idle objects until it fits. Raises DoesNotFitError."""
        return self._eviction.make_fit(make)

    def close(self, deadline: float) -> None:
        """Save every model and end every session.

        Models that are idle, and hold no gradients, continue with the next server if it knows this one's records.

        Args:
            deadline: the monotonic time until which this waits.
        """
        self._closing = True
        sessions = [*self.sessions.values(), self.own]
        if self._records.kept:
            for model in self.models.values():
                model.evictable.evict()
        closing = [session.close("interrupted", "the server was stopped") for session in sessions]
        if wait(closing, max(0.0, deadline - time.monotonic())).not_done:
            logger.warning("some sessions had not ended when the time to stop was over")


def _served_sampler(
    session_id: str, made: Future[SamplerHandle], base_model: str, *, ephemeral: bool
) -> Served[SamplerHandle]:
    # Only an eviction returns what loads the sampler again; nothing else can make it.
    evictable = Evictable(made.result, SamplerHandle.park, "sampler", made)
    return Served(session_id=session_id, evictable=evictable, base_model=base_model, ephemeral=ephemeral)


def new_sampler_id(session_id: str, number: int | None) -> str:
    """Return the id of a session's sampler, as the SDK computes it. Raises BadRequestError for a negative number."""
    if number is None or number < 0:
        raise BadRequestError(f"sampling_session_seq_id is {number!r}; give a number from 0 on.")
    return f"{session_id}:sample:{number}"
