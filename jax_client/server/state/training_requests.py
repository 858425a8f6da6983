"""What does a training request of the protocol become? A call of a `Run`, in the order of the model's numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from tinker import types

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError
from jax_client.runs import checks
from jax_client.runs.lifecycle.futures import then
from jax_client.runs.lifecycle.run import Run, create_run, resume_run
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.paths import training_path
from jax_client.server.state.ledger import RequestLedger
from jax_client.server.state.live_objects import LiveObjects, new_sampler_id
from jax_client.server.state.pending import PendingRequest, Start
from jax_client.server.state.tables import Fields
from jax_client.server.wire import custom_losses, protocol
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.custom_losses import CustomLoss
from jax_client.torch_graph.program import GraphProgram

T = TypeVar("T")


class TrainingRequests:
    """The requests that make, train, save and load models. Thread-safe; no method waits for a device.

    Every method takes the digest of the request's body and returns the pending request.

    Args:
        live: where the models are.
        ledger: where the requests are.
        model_name: `model_name(name) -> name` of the base model that an alias stands for.
        account: where the tokens that were trained on are noted.
    """

    def __init__(
        self, live: LiveObjects, ledger: RequestLedger, model_name: Callable[[str], str], account: Account
    ) -> None:
        self._live = live
        self._account = account
        self._ledger = ledger
        self._model_name = model_name

    def create_model(self, request: types.CreateModelRequest, digest: bytes) -> PendingRequest:
        """Make a fresh adapter."""
        session = self._live.session(request.session_id)
        session.check_open()
        lora = request.lora_config or types.LoraConfig(rank=32)
        base_model = self._model_name(request.base_model)
        spec = checks.lora_spec(base_model, lora.rank, lora.seed, lora.train_mlp, lora.train_attn, lora.train_unembed)
        checks.refuse_optimizer(request.optimizer_config)
        user_metadata = checks.user_metadata_or_none(request.user_metadata)
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        return self._open(
            run_id,
            session,
            base_model,
            digest,
            lambda: create_run(session, run_id, base_model, spec, user_metadata),
            lambda run: types.CreateModelResponse(model_id=run.run_id),
        )

    def load_weights(self, request: types.LoadWeightsRequest, digest: bytes) -> PendingRequest:
        """Load a checkpoint into a model, or make a model from one."""
        method = "load_state_with_optimizer" if request.optimizer else "load_state"
        checks.refuse_access_token(request.weights_access_token, self._live.own.owner)
        if request.session_id is None or request.model_seq_id is None:
            return self._on_model(
                request.model_id,
                request.seq_id,
                digest,
                lambda run: run.load(request.path, optimizer=request.optimizer, method=method),
            )
        session = self._live.session(request.session_id)
        session.check_open()
        path = training_path(request.path, method)
        checks.refuse_optimizer(request.optimizer_config)
        user_metadata = checks.user_metadata_or_none(request.user_metadata)
        base_model = None if request.base_model is None else self._model_name(request.base_model)
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        return self._open(
            run_id,
            session,
            base_model,
            digest,
            lambda: resume_run(session, run_id, path, base_model, user_metadata, optimizer=request.optimizer),
            lambda run: types.LoadWeightsResponse(path=request.path, model_id=run.run_id, type="load_weights"),
        )

    def _open(
        self,
        run_id: str,
        session: Session,
        base_model: str | None,
        digest: bytes,
        make: Callable[[], Run],
        response: Callable[[Run], types.CreateModelResponse | types.LoadWeightsResponse],
    ) -> PendingRequest:
        if self._ledger.find(run_id, digest) is None:
            self._live.check_room()
        pending, new = self._ledger.accept(run_id, digest, "train")
        if new:
            model = self._live.add_model(run_id, session.session_id, base_model, make)
            made = model.evictable.pin(pending.answer)
            pending.begin(lambda: then(made, response))
        return pending

    def run(self, model_id: str) -> Future[Run]:
        """Return the run of a model that was made; the future is done when it is loaded, if it was evicted.

        Raises:
            NotFoundError: there is no such model, it is not made yet, or it could not be made.
        """
        evictable = self._live.model(model_id).evictable
        if evictable.state in ("loading", "failed"):
            raise NotFoundError(f"model {model_id!r} is not there yet, or could not be made; await its creation.")
        return evictable.pin()

    def forward_backward(self, message: protocol.ForwardBackwardRequest, digest: bytes) -> PendingRequest:
        """Compute logprobs and the loss, with the gradient unless the request is forward only."""

        losses: list[GraphProgram] = []

        def work(run: Run) -> Future[Any]:
            data, config = protocol.read_datums(message), protocol.loss_config(message)
            if message.loss_fn == "custom" and not message.forward_only:
                losses.append(self._custom_loss(run.session, config))
                return self._noting(run.forward_backward_graph(data, losses[0]), data)
            if message.forward_only:
                return run.forward(data, message.loss_fn, config)
            return self._noting(run.forward_backward(data, message.loss_fn, config), data)

        waits_for = lambda: losses[0].progress() if losses else None  # noqa: E731
        return self._on_model(message.model_id, message.seq_id, digest, work, waits_for)

    def _noting(self, done: Future[T], data: Sequence[types.Datum]) -> Future[T]:
        """Return a future, after whose success the tokens of its data count as trained on."""
        tokens = sum(datum.model_input.length for datum in data)

        def note(done: Future[T]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._account.note(trained_tokens=tokens)

        done.add_done_callback(note)
        return done

    def create_custom_loss(self, request: types.CreateCustomLossRequest, digest: bytes) -> PendingRequest:
        """Take an uploaded loss and trace it. Raises BadRequestError for a graph that is refused."""
        session_id = request.session_id
        session = self._live.session(session_id)
        session.check_open()
        loss_id, fields = custom_losses.loss_id(request), custom_losses.fields(request)
        loss = custom_losses.custom_loss(fields, session.owner_name)
        others = [key for key, each in self._live.losses.items() if each.session_id == session_id and key != loss_id]
        if len(others) >= custom_losses.MAX_LOSSES:
            raise BadRequestError(
                f"session {session_id} has {len(others)} custom losses, the most it may have. Use one again by its "
                "handle, with what changes as an input."
            )
        pending, new = self._ledger.accept(loss_id, digest, "train")
        if new:
            self._live.losses.put(loss_id, loss)
            self._live.losses.record(loss_id, fields)
            session.when_closing(loss.program.close)
            pending.waits_for = loss.program.progress
            pending.begin(lambda: then(loss.program.trace(), lambda _: types.CreateCustomLossResponse(loss_id=loss_id)))
        return pending

    def _custom_loss(self, session: Session, config: Mapping[str, float | str] | None) -> GraphProgram:
        loss_id = custom_losses.requested_loss_id(session.session_id, config)

        def remake(fields: Fields) -> CustomLoss:
            loss = custom_losses.custom_loss(fields, session.owner_name)
            session.when_closing(loss.program.close)
            return loss

        return self._live.losses.get(loss_id, remake).program

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
            sampler_id = new_sampler_id(run.session.session_id, request.sampling_session_seq_id)
            made = run.sampler(request.kind, sampler_id=sampler_id)
            # A sampler of kind "inflight" follows its run, and has no weights of its own.
            self._live.add_run_sampler(sampler_id, run, made, ephemeral=request.kind != "inflight")
            return then(made, lambda _: {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"})

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def save_weights_external(self, request: types.SaveWeightsExternalRequest, digest: bytes) -> PendingRequest:
        """Save the adapter as peft does."""

        def work(run: Run) -> Future[Any]:
            return run.export(request.path, request.ttl_seconds, request.age_encryption_recipients)

        return self._on_model(request.model_id, request.seq_id, digest, work)

    def _on_model(
        self,
        model_id: str | None,
        number: int | None,
        digest: bytes,
        work: Callable[[Run], Future[Any]],
        waits_for: Callable[[], str | None] | None = None,
    ) -> PendingRequest:
        if model_id is None or number is None or number < 1:
            raise BadRequestError(f"model_id is {model_id!r} and seq_id {number!r}; give both, seq_id from 1 on.")
        # Before the model is looked for: an answer outlives its model.
        known = self._ledger.find(f"{model_id}:{number}", digest)
        if known is not None:
            return known
        model, queue = self._live.model(model_id), self._ledger.queues.of(model_id)
        pending, new = self._ledger.accept(f"{model_id}:{number}", digest, "train")
        if new:
            pending.waits_for = waits_for
            # The queue gets the request when the model is live, and begins it when its number has come.
            made = model.evictable.pin(pending.answer)
            start: Start = lambda: work(made.result())  # noqa: E731
            made.add_done_callback(lambda _: queue.submit(number, pending, start))
        return pending

    def refuse(self, body: bytes, digest: bytes, error: JaxClientError) -> PendingRequest | None:
        """Use up the number of a request that is refused for its form: the model's next requests would wait for it.

        Returns:
            What waits until the number is used up, None where there is no such number.
        """
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return None
        model_id, number = (
            (parsed.get(key) for key in ("model_id", "seq_id")) if isinstance(parsed, dict) else (None, None)
        )
        if isinstance(model_id, str) and type(number) is int:

            def work(_: Run) -> Future[Any]:
                raise error

            with contextlib.suppress(JaxClientError):
                return self._on_model(model_id, number, digest, work)
        return None
