"""What does a server hold, and how does a request of the protocol become one of a session, a run or a sampler?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from jax_client.clients.rest import RestClient
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.runs import validation
from jax_client.runs.futures import background, then
from jax_client.runs.paths import sampler_path, training_path
from jax_client.runs.run import Run, create_run, resume_run
from jax_client.runs.sampler import Sampler, base_sampler, checkpoint_sampler
from jax_client.runs.session import Session, SessionInfo
from jax_client.server import wire
from jax_client.server.promises import Promise, Promises, Sequence, Start

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Model:
    """A run that is there or being made, and the order of its requests."""

    run: Future[Run]
    order: Sequence = field(default_factory=Sequence)


class Server:
    """The sessions, models and samplers of a server. Thread-safe; every method returns without waiting for a device.

    Args:
        config: engine settings, of every session.
        aliases: names of models that stand for others.
    """

    def __init__(self, config: EngineConfig, aliases: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.promises = Promises()
        self.own = Session(config)
        self.rest = RestClient(self.own)
        self._aliases = dict(aliases or {})
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self._samplers: dict[str, Future[Sampler]] = {}
        self._lock = threading.Lock()

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
        return types.CreateSessionResponse(session_id=session.session_id)

    def session(self, session_id: str) -> Session:
        """Return a session.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self._known(self._sessions, session_id, "session", "; make a new ServiceClient.")

    def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; what it holds is saved and given back in the background."""
        status = reason if reason in ("success", "errored", "interrupted") else "success"
        self.session(session_id).close(status, detail)

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
            digest,
            lambda: resume_run(session, run_id, path, base_model, about, optimizer=request.optimizer),
            lambda run: types.LoadWeightsResponse(path=request.path, model_id=run.run_id, type="load_weights"),
        )

    def _open(self, run_id: str, digest: bytes, make: Callable[[], Run], show: Callable[[Run], Any]) -> Promise:
        promise, new = self.promises.make(run_id, digest)
        if new:
            model = Model(background(make, "create"))
            with self._lock:
                self._models[run_id] = model
            promise.begin(lambda: then(model.run, show))
        return promise

    def run(self, model_id: str) -> Run:
        """Return a run that has been made.

        Raises:
            NotFoundError: there is none, or it could not be made.
        """
        model = self._model(model_id)
        if not model.run.done() or model.run.exception() is not None:
            raise NotFoundError(f"model {model_id!r} is not there yet, or could not be made; await its creation.")
        return model.run.result()

    def forward_backward(self, message: pb.ForwardBackwardRequest, digest: bytes) -> Promise:
        """Compute logprobs and the loss, with the gradient unless the request is forward only."""

        def work(run: Run) -> Future[Any]:
            call = run.forward if message.forward_only else run.forward_backward
            return call(wire.read_datums(message), message.loss_fn, wire.loss_config(message))

        return self._on_model(message.model_id, message.seq_id, digest, work)

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
            sampler_id = self._sampler_id(run.session.session_id, request.sampling_session_seq_id)
            made = run.sampler(request.kind, sampler_id=sampler_id)
            with self._lock:
                self._samplers[sampler_id] = made
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
        model = self._model(model_id)
        promise, new = self.promises.make(f"{model_id}:{number}", digest)
        if new:
            # Not before the model is there; and then in order, whatever comes first.
            start: Start = lambda: work(model.run.result())  # noqa: E731
            model.run.add_done_callback(lambda _: model.order.submit(number, promise, start))
        return promise

    def _model(self, model_id: str) -> Model:
        advice = ". Make one, or go on from a checkpoint of its run."
        return self._known(self._models, model_id, "model", advice)

    def give_up_on_gaps(self, request_id: str) -> None:
        """Fail a request of a model that waits for one that never came."""
        model_id, _, number = request_id.rpartition(":")
        with self._lock:
            model = self._models.get(model_id)
        if model is not None and number.isdigit():
            model.order.give_up()

    def create_sampling_session(
        self, request: types.CreateSamplingSessionRequest
    ) -> types.CreateSamplingSessionResponse:
        """Make a sampler of a base model or of saved weights; it loads in the background."""
        session = self.session(request.session_id)
        session.check_open()
        sampler_id = self._sampler_id(request.session_id, request.sampling_session_seq_id)
        make = self._sampler_maker(session, request.base_model, request.model_path, sampler_id)
        with self._lock:
            if sampler_id not in self._samplers:
                self._samplers[sampler_id] = background(make, "sampler")
        return types.CreateSamplingSessionResponse(sampling_session_id=sampler_id)

    def _sampler_maker(
        self, session: Session, base_model: str | None, model_path: str | None, sampler_id: str
    ) -> Callable[[], Sampler]:
        if (base_model is None) == (model_path is None):
            raise BadRequestError("give one of base_model and model_path.")
        if model_path is None:
            name = self.model_name(base_model or "")
            return lambda: base_sampler(session, name, sampler_id=sampler_id)
        path = sampler_path(model_path, "create_sampling_client")
        # Now, so that a wrong path fails the call that gave it.
        session.store.record(path.run_id, path.kind, path.name)
        return lambda: checkpoint_sampler(session, path, sampler_id=sampler_id)

    def sampler(self, sampler_id: str) -> Future[Sampler]:
        """Return a sampler that is there or on its way.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self._known(self._samplers, sampler_id, "sampler", "; make one again.")

    def _known(self, table: Mapping[str, T], key: str, what: str, advice: str) -> T:
        with self._lock:
            found = table.get(key)
        if found is None:
            raise NotFoundError(f"there is no {what} {key!r} on this server{advice}")
        return found

    def sample(self, request: types.SampleRequest, digest: bytes) -> Promise:
        """Sample from, or score, a prompt."""
        if request.sampling_session_id is None or request.seq_id is None:
            raise BadRequestError("sampling_session_id and seq_id are needed; make a sampling session first.")
        if request.record_stability_info:
            raise UnsupportedError("record_stability_info is not supported; leave it False.")
        made = self.sampler(request.sampling_session_id)
        promise, new = self.promises.make(f"{request.sampling_session_id}:{request.seq_id}", digest)
        if not new:
            return promise

        def start(sampler: Sampler) -> Future[types.SampleResponse]:
            targets = request.target_prompt_logprobs
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

        made.add_done_callback(lambda done: promise.begin(lambda: start(done.result())))
        return promise

    def _sampler_id(self, session_id: str, number: int | None) -> str:
        if number is None or number < 0:
            raise BadRequestError(f"sampling_session_seq_id is {number!r}; give a number from 0 on.")
        return f"{session_id}:sample:{number}"

    def close(self) -> list[Future[None]]:
        """End every session; what was trained and not saved is saved."""
        with self._lock:
            sessions = [*self._sessions.values(), self.own]
        return [session.close("interrupted", "the server was stopped") for session in sessions]
