"""How does a request of the protocol become one of a session, a run or a sampler?"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import Any

from tinker import types

from jax_client.clients.rest import RestClient
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, UnsupportedError
from jax_client.runs import checks
from jax_client.runs.lifecycle import base_models
from jax_client.runs.lifecycle.futures import settled, then
from jax_client.runs.lifecycle.run import Run, create_run, resume_run
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
from jax_client.runs.lifecycle.session import Session, SessionInfo
from jax_client.runs.paths import training_path
from jax_client.runs.sdk import tinker_public_pb2 as pb
from jax_client.server.state import custom_losses
from jax_client.server.state.evictable import Evictable
from jax_client.server.state.ledger import PendingRequest, RequestLedger, Start
from jax_client.server.state.live_objects import Holdings, Model, Sampling
from jax_client.server.state.request_log import Entry, RequestLog
from jax_client.server.wire import answers, protocol
from jax_client.server.wire.admission import AdmissionLimits
from jax_client.server.wire.answers import Answer
from jax_client.torch_graph.program import GraphProgram

logger = logging.getLogger(__name__)


class Server(Holdings):
    """A server without its HTTP. Thread-safe; every method returns without waiting for a device.

    Args:
        config: engine settings, of every session.
        aliases: names of models that stand for others.
        journal: keeps sessions, promises and answers over a restart; None keeps them in memory.
    """

    def __init__(
        self, config: EngineConfig, aliases: Mapping[str, str] | None = None, journal: RequestLog | None = None
    ) -> None:
        super().__init__(config, journal)
        self.promises = RequestLedger(journal, self._lost)
        self.room = AdmissionLimits(self._give_up_gaps)
        self.rest = RestClient(self.own)
        self._aliases = dict(aliases or {})
        # Outlive their session: a number given twice would lead a new client to the answers of an old one.
        self._clones: dict[str, int] = {}

    def model_name(self, name: str) -> str:
        """Return what a name stands for."""
        return self._aliases.get(name, name)

    def create_session(self, request: types.CreateSessionRequest) -> types.CreateSessionResponse:
        """Begin a session."""
        about = checks.user_metadata_or_none(request.user_metadata)
        info = SessionInfo(user_metadata=about, project_id=request.project_id, display_name=request.display_name)
        session = Session(self.config, info)
        with self._lock:
            self._sessions[session.session_id] = session
        self._note("session", session.session_id, asdict(info))
        return types.CreateSessionResponse(session_id=session.session_id)

    def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; what it holds is saved and given back in the background."""
        status = reason if reason in ("success", "errored", "interrupted") else "success"
        self._end(session_id, self.session(session_id), status, detail)

    def create_model(self, request: types.CreateModelRequest, digest: bytes) -> PendingRequest:
        """Make a fresh adapter."""
        session = self.session(request.session_id)
        session.check_open()
        lora = request.lora_config or types.LoraConfig(rank=32)
        base_model = self.model_name(request.base_model)
        spec = checks.lora_spec(base_model, lora.rank, lora.seed, lora.train_mlp, lora.train_attn, lora.train_unembed)
        checks.refuse_optimizer(request.optimizer_config)
        about = checks.user_metadata_or_none(request.user_metadata)
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        return self._open(
            run_id,
            session,
            base_model,
            digest,
            lambda: create_run(session, run_id, base_model, spec, about),
            lambda run: types.CreateModelResponse(model_id=run.run_id),
        )

    def load_weights(self, request: types.LoadWeightsRequest, digest: bytes) -> PendingRequest:
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
        checks.refuse_optimizer(request.optimizer_config)
        about = checks.user_metadata_or_none(request.user_metadata)
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
    ) -> PendingRequest:
        promise, new = self.promises.make(run_id, digest, "train")
        if new:
            resident = Evictable(lambda: self._with_room(make), "create")
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

    def forward_backward(self, message: pb.ForwardBackwardRequest, digest: bytes) -> PendingRequest:
        """Compute logprobs and the loss, with the gradient unless the request is forward only."""

        def work(run: Run) -> Future[Any]:
            data, config = protocol.read_datums(message), protocol.loss_config(message)
            if message.loss_fn == "custom" and not message.forward_only:
                return run.forward_backward_graph(data, self._custom_loss(run.session.session_id, config))
            call = run.forward if message.forward_only else run.forward_backward
            return call(data, message.loss_fn, config)

        return self._on_model(message.model_id, message.seq_id, digest, work)

    def create_custom_loss(self, request: types.CreateCustomLossRequest, digest: bytes) -> PendingRequest:
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

    def optim_step(self, request: types.OptimStepRequest, digest: bytes) -> PendingRequest:
        """Take an optimizer step."""
        work = lambda run: run.optim_step(request.optim_params, None)  # noqa: E731
        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights(self, request: types.SaveWeightsRequest, digest: bytes) -> PendingRequest:
        """Save weights and optimizer."""

        def work(run: Run) -> Future[Any]:
            return run.save("weights", request.path, request.ttl_seconds, request.user_metadata, request.overwrite)

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights_for_sampler(self, request: types.SaveWeightsForSamplerRequest, digest: bytes) -> PendingRequest:
        """Save weights to sample from, or make a sampler of the weights as they are."""

        def work(run: Run) -> Future[Any]:
            if request.path is not None:
                return run.save("sampler_weights", request.path, request.ttl_seconds, request.user_metadata)
            session_id = run.session.session_id
            sampler_id = self._sampler_id(session_id, request.sampling_session_seq_id)
            made = run.sampler(request.kind, sampler_id=sampler_id)
            # It is there, or can be parked; nothing else makes it again.
            resident = Evictable(made.result, "sampler", made)
            with self._lock:
                self._samplers[sampler_id] = Sampling(
                    session_id=session_id,
                    resident=resident,
                    base_model=run.model_ref.name,
                    ephemeral=request.kind != "inflight",
                )
            self._note("sampler", sampler_id, {"session_id": session_id, "of": run.run_id})
            self._tidy(session_id)
            return then(made, lambda _: {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"})

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights_external(self, request: types.SaveWeightsExternalRequest, digest: bytes) -> PendingRequest:
        """Save the adapter as peft does."""

        def work(run: Run) -> Future[Any]:
            # Refused in its turn: the requests after it wait for its number.
            if request.age_encryption_recipients is not None:
                raise UnsupportedError("age_encryption_recipients is not supported, exports are not encrypted.")
            return run.export(request.path, request.ttl_seconds)

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def _on_model(
        self, model_id: str | None, number: int | None, digest: bytes, work: Callable[[Run], Future[Any]]
    ) -> PendingRequest:
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

    def refuse(self, body: bytes, digest: bytes, error: JaxClientError) -> None:
        """Take the number of a request that is refused for its form: else the next ones of its model wait for it."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return
        model_id, number = (asked.get(key) for key in ("model_id", "seq_id")) if isinstance(asked, dict) else (0, 0)
        if isinstance(model_id, str) and type(number) is int:

            def work(_: Run) -> Future[Any]:
                raise error

            with contextlib.suppress(JaxClientError):
                self._on_model(model_id, number, digest, work)

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

    def join_sampling_session(self, sampler_id: str) -> int:
        """Return a number that no other client of this sampler has."""
        self.sampling(sampler_id)
        with self._lock:
            if sampler_id not in self._clones and self._journal is not None:
                self._clones[sampler_id] = (self._journal.get("clones", sampler_id) or {"count": 0})["count"]
            count = self._clones[sampler_id] = self._clones.get(sampler_id, 0) + 1
            self._note("clones", sampler_id, {"count": count})
        return count

    def sample(self, request: types.SampleRequest, digest: bytes) -> PendingRequest:
        """Sample from, or score, a prompt."""
        if request.sampling_session_id is None or request.seq_id is None:
            raise BadRequestError("sampling_session_id and seq_id are needed; make a sampling session first.")
        if request.record_stability_info:
            raise UnsupportedError("record_stability_info is not supported; leave it False.")
        sampling = self.sampling(request.sampling_session_id)
        promise, new = self.promises.make(f"{request.sampling_session_id}:{request.seq_id}", digest, "sample")
        if not new:
            return promise

        def start(sampler: SamplerHandle) -> Future[types.SampleResponse]:
            targets = _targets(request)
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

        made = sampling.resident.use(promise.answer)
        made.add_done_callback(lambda done: promise.begin(lambda: start(done.result())))
        return promise

    def samples_at_once(self, sampler_id: str | None) -> bool:
        """Say whether `sample` has nothing to wait for: no disk, no model on its way."""
        with self._lock:
            found = self._samplers.get(sampler_id or "")
        return found is not None and found.resident.there is not None

    def may_have_lost(self, request_id: str) -> bool:
        """Say whether an unknown id can be that of a request that a killed server had accepted and not yet noted."""
        owner, _, number = request_id.rpartition(":")
        if not (number.isascii() and number.isdigit()):
            return False
        try:
            self.sampling(owner)
        except JaxClientError:
            return False
        return True

    def _give_up_gaps(self) -> None:
        """End what waits too long for an earlier request: nobody may be polling for it."""
        with self._lock:
            models = list(self._models.values())
        for model in models:
            model.order.give_up()

    def _sampler_id(self, session_id: str, number: int | None) -> str:
        if number is None or number < 0:
            raise BadRequestError(f"sampling_session_seq_id is {number!r}; give a number from 0 on.")
        return f"{session_id}:sample:{number}"

    def waiting_for(self, promise: PendingRequest) -> str | None:
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
        doing = None if name is None else base_models.progress(name, self.config)
        ahead = self.promises.ahead_of(promise)
        return doing or (f"{ahead} requests ahead" if ahead else None)

    def _lost(self, request_id: str, entry: Entry) -> Answer:
        if entry.kind == "sample":
            return answers.again("the server was restarted before it answered; send the request again.")
        owner, _, number = request_id.rpartition(":")
        if owner.endswith(":train"):
            owner, number = request_id, "that makes it"
        return answers.refusal(
            f"the server was restarted before request {number} of {owner} was answered. {self._way_on(owner)}", "server"
        )

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


def _targets(request: types.SampleRequest) -> types.TensorData | None:
    """Return the targets; what was parsed from JSON is a class of its own with the same fields."""
    parsed = request.target_prompt_logprobs
    if parsed is None:
        return None
    try:
        return types.TensorData(**parsed.model_dump())
    except (OverflowError, ValueError, TypeError) as error:
        raise BadRequestError(f"target_prompt_logprobs is no {parsed.dtype} tensor: {str(error)[:200]}.") from None
