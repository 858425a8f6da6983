"""What does a server hold, and how does a request of the protocol become one of a session, a run or a sampler?"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from jax_client.clients.rest import RestClient
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, DoesNotFitError, NotFoundError, UnsupportedError
from jax_client.losses.graph_program import GraphProgram
from jax_client.runs import engines, validation
from jax_client.runs.futures import settled, then
from jax_client.runs.paths import TinkerPath, sampler_path, training_path
from jax_client.runs.run import Run, create_run, resume_run
from jax_client.runs.sampler import Sampler, base_sampler, checkpoint_sampler
from jax_client.runs.session import Session, SessionInfo
from jax_client.server import answers, custom_losses, wire
from jax_client.server.answers import Answer
from jax_client.server.completions import Completions
from jax_client.server.journal import Entry, Journal
from jax_client.server.promises import Promise, Promises, Sequence, Start
from jax_client.server.resident import Resident

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", Run, Sampler)

# What was not used for so long may be unloaded when something else needs its memory.
IDLE_SECONDS = 60.0
# Of the samplers that a session made of weights in memory: so many of the newest stay on the device, and so many are
# kept at all. A loop makes one with every step, and uses the newest few.
ON_DEVICE, IN_MEMORY = 4, 16


@dataclass(slots=True, eq=False, kw_only=True)
class _Served(Generic[R]):
    """A run or a sampler that is in memory, or can be again.

    Attributes:
        base_model: as its session calls it, as far as the request told.
    """

    session_id: str
    resident: Resident[R]
    base_model: str | None

    @property
    def name(self) -> str | None:
        """What its session calls the base model."""
        there = self.resident.there
        return self.base_model if there is None else there.lease.name


@dataclass(slots=True, eq=False, kw_only=True)
class Model(_Served[Run]):
    """A run, and the order of its requests."""

    order: Sequence = field(default_factory=Sequence)


@dataclass(slots=True, eq=False, kw_only=True)
class Sampling(_Served[Sampler]):
    """A sampler. Weights that were never saved are ephemeral: they end with the server."""

    ephemeral: bool = False


class Server:
    """The sessions, models and samplers of a server. Thread-safe; every method returns without waiting for a device.

    Args:
        config: engine settings, of every session.
        aliases: names of models that stand for others.
        journal: keeps sessions, promises and answers over a restart; None keeps them in memory.
    """

    def __init__(
        self, config: EngineConfig, aliases: Mapping[str, str] | None = None, journal: Journal | None = None
    ) -> None:
        self.config = config
        self.promises = Promises(journal, self._lost)
        self.completions = Completions(self.promises.answered_of)
        self.own = Session(config)
        self.rest = RestClient(self.own)
        self._journal = journal
        self._aliases = dict(aliases or {})
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self._samplers: dict[str, Sampling] = {}
        self._losses: dict[str, custom_losses.CustomLoss] = {}
        self._clones: dict[str, int] = {}
        self._lock = threading.RLock()

    def model_name(self, name: str) -> str:
        """Return what a name stands for."""
        return self._aliases.get(name, name)

    def create_session(self, request: types.CreateSessionRequest) -> types.CreateSessionResponse:
        """Begin a session."""
        about = validation.user_metadata_or_none(request.user_metadata)
        info = SessionInfo(user_metadata=about, project_id=request.project_id, display_name=request.display_name)
        session = Session(self.config, info)
        with self._lock:
            self._sessions[session.session_id] = session
        self._note(
            "session",
            session.session_id,
            {"user_metadata": about, "project_id": info.project_id, "display_name": info.display_name},
        )
        return types.CreateSessionResponse(session_id=session.session_id)

    def session(self, session_id: str) -> Session:
        """Return a session; one of an earlier server goes on.

        Raises:
            NotFoundError: there is none of this id.
        """

        def again(about: dict[str, Any]) -> Session:
            return Session(self.config, SessionInfo(**about), session_id)

        return self._known(self._sessions, "session", session_id, again, "; make a new ServiceClient.")

    def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; what it holds is saved and given back in the background."""
        status = reason if reason in ("success", "errored", "interrupted") else "success"
        closing = self.session(session_id).close(status, detail)
        closing.add_done_callback(lambda _: self._forget(session_id))

    def _forget(self, session_id: str) -> None:
        with self._lock:
            for table in (self._models, self._samplers, self._losses):
                for key in [key for key, each in table.items() if each.session_id == session_id]:
                    del table[key]
        self.completions.forget(session_id)
        if self._journal is not None:
            self._journal.forget_session(session_id)

    def create_model(self, request: types.CreateModelRequest, digest: bytes) -> Promise:
        """Make a fresh adapter."""
        session = self.session(request.session_id)
        session.check_open()
        lora = request.lora_config or types.LoraConfig(rank=32)
        base_model = self.model_name(request.base_model)
        spec = validation.lora_spec(
            base_model, lora.rank, lora.seed, lora.train_mlp, lora.train_attn, lora.train_unembed
        )
        validation.refuse_optimizer(request.optimizer_config)
        about = validation.user_metadata_or_none(request.user_metadata)
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        return self._open(
            run_id,
            session,
            base_model,
            digest,
            lambda: create_run(session, run_id, base_model, spec, about),
            lambda run: types.CreateModelResponse(model_id=run.run_id),
        )

    def load_weights(self, request: types.LoadWeightsRequest, digest: bytes) -> Promise:
        """Load a checkpoint into a model, or make a model from one."""
        method = "load_state_with_optimizer" if request.optimizer else "load_state"
        if request.session_id is None or request.model_seq_id is None:
            return self._on_model(
                request.model_id,
                request.seq_id,
                digest,
                lambda run: run.load(request.path, optimizer=request.optimizer, method=method),
            )
        session = self.session(request.session_id)
        session.check_open()
        path = training_path(request.path, method)
        validation.refuse_optimizer(request.optimizer_config)
        about = validation.user_metadata_or_none(request.user_metadata)
        base_model = None if request.base_model is None else self.model_name(request.base_model)
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        return self._open(
            run_id,
            session,
            base_model,
            digest,
            lambda: resume_run(session, run_id, path, base_model, about, optimizer=request.optimizer),
            lambda run: types.LoadWeightsResponse(path=request.path, model_id=run.run_id, type="load_weights"),
        )

    def _open(
        self,
        run_id: str,
        session: Session,
        base_model: str | None,
        digest: bytes,
        make: Callable[[], Run],
        show: Callable[[Run], Any],
    ) -> Promise:
        promise, new = self.promises.make(run_id, digest, "train")
        if new:
            resident = Resident(lambda: self._with_room(make), "create")
            with self._lock:
                self._models[run_id] = Model(session_id=session.session_id, resident=resident, base_model=base_model)
            # A run that is only in memory has no path, and so ends with the server.
            self._note("model", run_id, {"session_id": session.session_id, "path": None})
            made = resident.use(promise.answer)
            promise.begin(lambda: then(made, show))
        return promise

    def run(self, model_id: str) -> Run:
        """Return a run that has been made; waits for it if it was unloaded.

        Raises:
            NotFoundError: there is none, or it could not be made.
        """
        resident = self._model(model_id).resident
        if resident.loading or resident.failed:
            raise NotFoundError(f"model {model_id!r} is not there yet, or could not be made; await its creation.")
        return resident.use().result()

    def forward_backward(self, message: pb.ForwardBackwardRequest, digest: bytes) -> Promise:
        """Compute logprobs and the loss, with the gradient unless the request is forward only."""

        def work(run: Run) -> Future[Any]:
            data, config = wire.read_datums(message), wire.loss_config(message)
            if message.loss_fn == "custom" and not message.forward_only:
                return run.forward_backward_graph(data, self._custom_loss(run.session.session_id, config))
            call = run.forward if message.forward_only else run.forward_backward
            return call(data, message.loss_fn, config)

        return self._on_model(message.model_id, message.seq_id, digest, work)

    def create_custom_loss(self, request: types.CreateCustomLossRequest, digest: bytes) -> Promise:
        """Take a loss that was sent as a graph; what is refused is refused in this call."""
        self.session(request.session_id).check_open()
        loss_id, about = custom_losses.loss_id_of(request), custom_losses.written(request)
        loss = custom_losses.custom_loss(about)
        with self._lock:
            others = [k for k, each in self._losses.items() if each.session_id == request.session_id and k != loss_id]
        if len(others) >= custom_losses.MAX_LOSSES:
            raise BadRequestError(
                f"session {request.session_id} has {len(others)} custom losses, the most it may have. Use one again by "
                "its handle, with what changes as an input."
            )
        promise, new = self.promises.make(loss_id, digest, "train")
        if new:
            with self._lock:
                self._losses[loss_id] = loss
            self._note("custom loss", loss_id, about)
            promise.begin(lambda: settled(types.CreateCustomLossResponse(loss_id=loss_id)))
        return promise

    def _custom_loss(self, session_id: str, config: Mapping[str, float | str] | None) -> GraphProgram:
        loss_id = custom_losses.asked_for(session_id, config)
        again = custom_losses.custom_loss
        return self._known(self._losses, "custom loss", loss_id, again, "; create it again.").program

    def optim_step(self, request: types.OptimStepRequest, digest: bytes) -> Promise:
        """Take an optimizer step."""
        work = lambda run: run.optim_step(request.optim_params, None)  # noqa: E731
        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights(self, request: types.SaveWeightsRequest, digest: bytes) -> Promise:
        """Save weights and optimizer."""

        def work(run: Run) -> Future[Any]:
            return run.save("weights", request.path, request.ttl_seconds, request.user_metadata, request.overwrite)

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights_for_sampler(self, request: types.SaveWeightsForSamplerRequest, digest: bytes) -> Promise:
        """Save weights to sample from, or make a sampler of the weights as they are."""

        def work(run: Run) -> Future[Any]:
            if request.path is not None:
                return run.save("sampler_weights", request.path, request.ttl_seconds, request.user_metadata)
            session_id = run.session.session_id
            sampler_id = self._sampler_id(session_id, request.sampling_session_seq_id)
            made = run.sampler(request.kind, sampler_id=sampler_id)
            # It is there, or can be parked; nothing else makes it again.
            resident = Resident(made.result, "sampler", made)
            with self._lock:
                self._samplers[sampler_id] = Sampling(
                    session_id=session_id, resident=resident, base_model=run.lease.name, ephemeral=True
                )
            self._note("sampler", sampler_id, {"session_id": session_id, "of": run.run_id})
            self._tidy(session_id)
            return then(made, lambda _: {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"})

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights_external(self, request: types.SaveWeightsExternalRequest, digest: bytes) -> Promise:
        """Save the adapter as peft does."""
        if request.age_encryption_recipients is not None:
            raise UnsupportedError("age_encryption_recipients is not supported, exports are not encrypted.")
        return self._on_model(
            request.model_id, request.seq_id, digest, lambda run: run.export(request.path, request.ttl_seconds)
        )

    def _on_model(
        self, model_id: str | None, number: int | None, digest: bytes, work: Callable[[Run], Future[Any]]
    ) -> Promise:
        if model_id is None or number is None or number < 1:
            raise BadRequestError(f"model_id is {model_id!r} and seq_id {number!r}; give both, seq_id from 1 on.")
        # Before the model is looked for: an answer that was given outlives it.
        known = self.promises.find(f"{model_id}:{number}", digest)
        if known is not None:
            return known
        model = self._model(model_id)
        promise, new = self.promises.make(f"{model_id}:{number}", digest, "train")
        if new:
            # Not before the model is there; and then in order, whatever comes first.
            made = model.resident.use(promise.answer)
            start: Start = lambda: work(made.result())  # noqa: E731
            made.add_done_callback(lambda _: model.order.submit(number, promise, start))
        return promise

    def _model(self, model_id: str) -> Model:
        def again(about: dict[str, Any]) -> Model:
            if about["path"] is None:
                raise NotFoundError(
                    f"model {model_id!r} is not in memory, the server was restarted. {self._way_on(model_id)}"
                )
            path = TinkerPath.parse(about["path"])
            resident = Resident(lambda: self._with_room(lambda: self._revive(model_id, about, path)), "resume")
            return Model(
                session_id=about["session_id"],
                resident=resident,
                base_model=about["base_model"],
                order=Sequence(about["following"]),
            )

        advice = ". Make one, or go on from a checkpoint of its run."
        return self._known(self._models, "model", model_id, again, advice)

    def _revive(self, run_id: str, about: dict[str, Any], path: TinkerPath) -> Run:
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
            "base_model": run.lease.name,
            "following": model.order.following,
        }
        self._note("model", run_id, about)
        published = run.published

        def again() -> Run:
            revived = self._revive(run_id, about, path)
            revived.published = published
            return revived

        return lambda: self._with_room(again)

    def _lost(self, request_id: str, entry: Entry) -> Answer:
        if entry.kind == "sample":
            return answers.again("the server was restarted before it answered; send the request again.")
        owner, _, number = request_id.rpartition(":")
        if owner.endswith(":train"):
            owner, number = request_id, "that makes it"
        return answers.refusal(
            f"the server was restarted before request {number} of {owner} was answered. {self._way_on(owner)}", "server"
        )

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
        path = TinkerPath(run_id=run_id, kind="weights", name=newest.name)
        return f'Go on from step {newest.step}: create_training_client_from_state_with_optimizer("{path}").'

    def create_sampling_session(
        self, request: types.CreateSamplingSessionRequest
    ) -> types.CreateSamplingSessionResponse:
        """Make a sampler of a base model or of saved weights; it loads in the background."""
        session = self.session(request.session_id)
        session.check_open()
        sampler_id = self._sampler_id(request.session_id, request.sampling_session_seq_id)
        about = {
            "session_id": request.session_id,
            "base_model": None if request.base_model is None else self.model_name(request.base_model),
            "model_path": request.model_path,
        }
        with self._lock:
            known = sampler_id in self._samplers
        if not known:
            sampling = self._sampling(sampler_id, about)
            with self._lock:
                sampling = self._samplers.setdefault(sampler_id, sampling)
            self._note("sampler", sampler_id, about)
            sampling.resident.use()
        return types.CreateSamplingSessionResponse(sampling_session_id=sampler_id)

    def _sampling(self, sampler_id: str, about: dict[str, Any]) -> Sampling:
        if "of" in about:
            raise NotFoundError(
                f"sampler {sampler_id!r} had weights of {about['of']} that were never saved, and the server was "
                "restarted. Make a sampler of the model as it is now, or of a checkpoint."
            )
        session, base_model, model_path = self.session(about["session_id"]), about["base_model"], about["model_path"]
        if (base_model is None) == (model_path is None):
            raise BadRequestError("give one of base_model and model_path.")
        if model_path is None:
            make = lambda: base_sampler(session, base_model, sampler_id=sampler_id)  # noqa: E731
        else:
            path = sampler_path(model_path, "create_sampling_client")
            # Now, so that a wrong path fails the call that gave it.
            base_model = session.store.record(path.run_id, path.kind, path.name).metadata["base_model"]
            make = lambda: checkpoint_sampler(session, path, sampler_id=sampler_id)  # noqa: E731
        resident = Resident(lambda: self._with_room(make), "sampler")
        return Sampling(session_id=session.session_id, resident=resident, base_model=base_model)

    def adopt(self, sampler: Sampler) -> None:
        """Serve a sampler of this process."""
        resident = Resident(lambda: sampler, "sampler", settled(sampler))
        with self._lock:
            self._samplers[sampler.sampler_id] = Sampling(
                session_id=sampler.session.session_id,
                resident=resident,
                base_model=sampler.lease.name,
                ephemeral=True,
            )

    def sampler(self, sampler_id: str) -> Future[Sampler]:
        """Return a sampler that is there or on its way.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self.sampling(sampler_id).resident.use()

    def sampling(self, sampler_id: str) -> Sampling:
        """Return a sampler that can be used. Raises as `sampler`."""
        again = lambda about: self._sampling(sampler_id, about)  # noqa: E731
        return self._known(self._samplers, "sampler", sampler_id, again, "; make one again.")

    def join_sampling_session(self, sampler_id: str) -> int:
        """Return a number that no other client of this sampler has."""
        self.sampling(sampler_id)
        with self._lock:
            if sampler_id not in self._clones and self._journal is not None:
                self._clones[sampler_id] = (self._journal.get("clones", sampler_id) or {"count": 0})["count"]
            count = self._clones[sampler_id] = self._clones.get(sampler_id, 0) + 1
            self._note("clones", sampler_id, {"count": count})
        return count

    def sample(self, request: types.SampleRequest, digest: bytes) -> Promise:
        """Sample from, or score, a prompt."""
        if request.sampling_session_id is None or request.seq_id is None:
            raise BadRequestError("sampling_session_id and seq_id are needed; make a sampling session first.")
        if request.record_stability_info:
            raise UnsupportedError("record_stability_info is not supported; leave it False.")
        sampling = self.sampling(request.sampling_session_id)
        promise, new = self.promises.make(f"{request.sampling_session_id}:{request.seq_id}", digest, "sample")
        if not new:
            return promise

        # What was parsed from JSON is a class of its own with the same fields.
        parsed = request.target_prompt_logprobs
        targets = None if parsed is None else types.TensorData(**parsed.model_dump())

        def start(sampler: Sampler) -> Future[types.SampleResponse]:
            return sampler.sample(
                request.prompt,
                request.num_samples,
                request.sampling_params,
                last_n=request.prompt_logprobs_last_n,
                include_prompt_logprobs=bool(request.prompt_logprobs),
                topk_prompt_logprobs=request.topk_prompt_logprobs,
                topk_sample_logprobs=request.topk_sample_logprobs,
                target_prompt_logprobs=targets,
                prompt_alt_tokens_k=request.prompt_alt_tokens_k,
            )

        promise.answer.add_done_callback(lambda done: self.completions.add(promise.request_id, done.result().size))
        made = sampling.resident.use(promise.answer)
        made.add_done_callback(lambda done: promise.begin(lambda: start(done.result())))
        return promise

    def _sampler_id(self, session_id: str, number: int | None) -> str:
        if number is None or number < 0:
            raise BadRequestError(f"sampling_session_seq_id is {number!r}; give a number from 0 on.")
        return f"{session_id}:sample:{number}"

    def waiting_for(self, promise: Promise) -> str | None:
        """Say what a request that is not answered waits for, None while it is carried out.

        One that waits too long for an earlier request that never came is given up.
        """
        owner, _, _ = promise.request_id.rpartition(":")
        with self._lock:
            model = self._models.get(owner) or self._models.get(promise.request_id)
            found = model or self._samplers.get(owner)
        if found is None:
            return None
        if model is not None and not promise.begun:
            model.order.give_up()
            missing = model.order.waits()
            if missing is not None:
                return f"request {missing} of this model has not come"
        name = found.name
        doing = None if name is None else engines.progress(name, self.config)
        ahead = self.promises.ahead_of(promise)
        return doing or (f"{ahead} requests ahead" if ahead else None)

    def _with_room(self, make: Callable[[], T]) -> T:
        """Make something, unloading what nobody used for a while as long as there is no room for it."""
        while True:
            try:
                return make()
            except DoesNotFitError:
                if not self.unload_idlest():
                    raise

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
                idle.append((since, partial(sampling.resident.unload, Sampler.park)))
        idle.sort(key=lambda each: each[0])
        for since, unload in idle:
            if time.monotonic() - since >= IDLE_SECONDS and unload():
                self._let_go()
                return True
        return self._let_go()

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
                freed |= session.let_go_of_all_but(used)
        return freed

    def _tidy(self, session_id: str) -> None:
        """Move superseded samplers of unsaved weights off the device, and forget the oldest."""
        with self._lock:
            own = [(k, s) for k, s in self._samplers.items() if s.session_id == session_id and s.ephemeral]
        for _, sampling in own[:-ON_DEVICE]:
            sampling.resident.unload(Sampler.park)
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

    def close(self, seconds: float) -> None:
        """Finish what has begun, save every model, and end. Models that were idle by then can go on in a next server.

        Args:
            seconds: most that it takes; what is not saved by then is lost, as if the server had been killed.
        """
        end = time.monotonic() + seconds
        # Most of the time for what runs; saving takes its share of it too.
        self.promises.finish(0.6 * seconds)
        with self._lock:
            models, sessions = dict(self._models), [*self._sessions.values(), self.own]
        if self._journal is not None:
            for run_id, model in models.items():
                self._unload_model(run_id, model, aloud=True)
        closing = [session.close("interrupted", "the server was stopped") for session in sessions]
        if wait(closing, max(0.0, end - time.monotonic())).not_done:
            logger.warning("not everything had ended after %.0f s", seconds)
        if self._journal is not None:
            self._journal.close()
