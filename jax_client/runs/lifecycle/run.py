"""What is a training run? One adapter on one engine, and the requests that change it, in order."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from tinker import types

from jax_client.engine.core.requests import CustomLoss, TrainResult
from jax_client.runs import checks
from jax_client.runs.lifecycle import autosave
from jax_client.runs.lifecycle.base_models import ModelRef
from jax_client.runs.lifecycle.futures import then
from jax_client.runs.lifecycle.order import RequestOrder
from jax_client.runs.lifecycle.run_checkpointer import RunCheckpointer
from jax_client.runs.lifecycle.run_record import record_of, reporting_of, user_metadata_of
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle, WeightsFeed
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.paths import training_path
from jax_client.runs.results import api_records, convert, run_metrics
from jax_client.runs.results.graph_loss import GraphCall
from jax_client.values import AdapterState, CheckpointKey, LoraSpec, TrainExample
from jax_client.weights.write.age import check_recipients

if TYPE_CHECKING:
    import numpy as np

    from jax_client.checkpoint.disk.run_lock import RunLock
    from jax_client.checkpoint.record import Record
    from jax_client.engine.core.adapters import Adapter, Snapshot, Version
    from jax_client.engine.core.requests import LossSpec, TrainResult
    from jax_client.engine.core.turns import Lane
    from jax_client.torch_graph.program import GraphProgram

A = TypeVar("A")
T = TypeVar("T")
P = ParamSpec("P")
# The runs whose loss function is running in this context.
_inside_loss: ContextVar[frozenset[str]] = ContextVar("jax_client_inside_loss", default=frozenset())


class _WithMetrics(Protocol):
    @property
    def metrics(self) -> Mapping[str, float] | None: ...


Shown = TypeVar("Shown", bound=_WithMetrics)


def _while_usable(method: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """Refuse a call on a closed session, or from the run's own loss function, before its arguments are looked at."""

    @functools.wraps(method)
    def checked(self: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.check_usable()
        return method(self, *args, **kwargs)

    return checked


class Run:
    """One LoRA adapter in training.

    Every method checks its arguments in the call, so that a rejected call changes nothing, then returns the future of
    the API's response without waiting for the device. Requests take effect in the order in which they are submitted.

    Args:
        session: whose run this is.
        model_ref: the base model.
        lane: the engine's queue for this run.
        adapter: the engine's handle.
        checkpointer: writes this run's checkpoints, also after the run itself is forgotten.
    """

    def __init__(
        self, session: Session, model_ref: ModelRef, lane: Lane, adapter: Adapter, checkpointer: RunCheckpointer
    ) -> None:
        self.session = session
        self.model_ref = model_ref
        self.spec = checkpointer.spec
        self.run_id = checkpointer.run_id
        self._checkpointer = checkpointer
        self._engine = model_ref.model.engine
        self._lane = lane
        self._adapter = adapter
        self._order = RequestOrder()
        self._warned: set[str] = set()
        self.published = WeightsFeed()
        weakref.finalize(self, autosave.forget, checkpointer).atexit = False

    def _request(self, start: Callable[[], Future[T]], *, after: Future[A] | None = None) -> Future[T]:
        """Submit to the engine in order, unless the session was closed while the arguments were checked."""
        self.check_usable()
        return self._order.submit(start, after=after)

    def check_usable(self) -> None:
        """Raise if the session is closed, or the caller is this run's own loss function."""
        if self.run_id in _inside_loss.get():
            raise RuntimeError(
                "re-entrant call: a loss function cannot use the TrainingClient that is running it, which would wait "
                "for itself. Compute what the loss needs before forward_backward_custom, or use another client."
            )
        self.session.check_open()

    def _answer(self, source: Future[A], show: Callable[[A], T]) -> Future[T]:
        return self.session.track(then(source, show, owner=self))

    @_while_usable
    def forward(self, data: object, loss_fn: object, loss_fn_config: object) -> Future[types.ForwardBackwardOutput]:
        """Compute logprobs and the loss; gradients stay as they are."""
        examples, loss = self._training_data(data, loss_fn, loss_fn_config)
        source = self._request(lambda: self._engine.score_batch(self._lane, self._adapter, examples, loss))
        return self._answer(source, self._noting(self._show(loss_fn), self._checkpointer.observed.scored))

    @_while_usable
    def forward_backward(
        self, data: object, loss_fn: object, loss_fn_config: object
    ) -> Future[types.ForwardBackwardOutput]:
        """Compute logprobs and the loss, and add its gradient to the accumulated ones."""
        examples, loss = self._training_data(data, loss_fn, loss_fn_config)
        source = self._request(lambda: self._engine.train_batch(self._lane, self._adapter, examples, loss))
        return self._answer(source, self._noting(self._show(loss_fn), self._checkpointer.observed.passed))

    def _show(self, loss_fn: object) -> Callable[[TrainResult], types.ForwardBackwardOutput]:
        """Return the conversion of an answer, whose metrics say so where another loss stood in for `loss_fn`."""
        other = self.session.config.map_loss.get(str(loss_fn))
        extra = {} if other is None else {f"{loss_fn}_as_{other}:max": 1.0}
        return lambda result: convert.training_output(result, extra)

    @staticmethod
    def _noting(show: Callable[[A], Shown], note: Callable[[Mapping[str, float]], None]) -> Callable[[A], Shown]:
        """Return `show`, which also gives the metrics of what it returns to `note`."""

        def noted(result: A) -> Shown:
            shown = show(result)
            note(shown.metrics or {})
            return shown

        return noted

    def _training_data(
        self, data: object, loss_fn: object, loss_fn_config: object
    ) -> tuple[list[TrainExample], LossSpec]:
        model = self._engine.model
        return checks.training_data(
            data,
            loss_fn,
            loss_fn_config,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            warned=self._warned,
            mapped=self.session.config.map_loss,
        )

    @_while_usable
    def forward_backward_custom(
        self, data: object, loss: CustomLoss, extra: Callable[[], Mapping[str, float]]
    ) -> Future[types.ForwardBackwardOutput]:
        """Run `loss` between a forward and a backward pass, and add the gradient to the accumulated ones.

        Args:
            data: a list of Datum, of which the engine needs the tokens and the targets.
            loss: `f(logprobs) -> (loss, gradients, metrics)`, called on a thread of the engine's.
            extra: `f() -> metrics` of the user's own, called after the loss.
        """
        return self._custom(self._custom_data(data), loss, extra)

    @_while_usable
    def forward_backward_graph(
        self, data: list[types.Datum], program: GraphProgram
    ) -> Future[types.ForwardBackwardOutput]:
        """Run an uploaded loss, as `forward_backward_custom` runs the user's function, once it is compiled."""
        examples = self._custom_data(data)
        call = GraphCall(program, data, examples)
        return self._custom(examples, call.run, dict, after=call.prepared)

    def _custom_data(self, data: object) -> list[TrainExample]:
        model = self._engine.model
        return checks.custom_data(data, vocab_size=model.vocab_size, max_context=model.max_context)

    def _custom(
        self,
        examples: list[TrainExample],
        loss: CustomLoss,
        extra: Callable[[], Mapping[str, float]],
        after: Future[A] | None = None,
    ) -> Future[types.ForwardBackwardOutput]:
        def guarded(logprobs: list[np.ndarray]) -> tuple[float, list[np.ndarray], dict[str, float]]:
            with self._inside_loss():
                return loss(logprobs)

        def show(result: TrainResult) -> types.ForwardBackwardOutput:
            own = extra()
            engine_metrics = {key: value for key, value in result.metrics.items() if key not in own}
            return convert.training_output(replace(result, metrics=engine_metrics), own)

        # The user gets their own metrics as they are, with NaN; what is recorded is finite.
        note = lambda metrics: self._checkpointer.observed.passed(convert.metrics(metrics))  # noqa: E731

        def start() -> Future[TrainResult]:
            if after is not None:
                after.result()  # raises why there is nothing to run
            return self._engine.train_batch(self._lane, self._adapter, examples, guarded)

        source = self._request(start, after=after)
        if after is not None:
            source.add_done_callback(lambda done: done.cancelled() and after.cancel())
        return self._answer(source, self._noting(show, note))

    @contextlib.contextmanager
    def _inside_loss(self) -> Iterator[None]:
        token = _inside_loss.set(_inside_loss.get() | {self.run_id})
        try:
            yield
        finally:
            _inside_loss.reset(token)

    @_while_usable
    def optim_step(self, optim_params: object, adam_params: object) -> Future[types.OptimStepResponse]:
        """Take one AdamW step with the accumulated gradients, and clear them."""
        settings = checks.adam_settings(optim_params, adam_params)
        self._checkpointer.optimizer_config = settings
        source = self._request(lambda: self._engine.optim_step(self._lane, self._adapter, settings))

        def show(metrics: dict[str, float]) -> types.OptimStepResponse:
            return types.OptimStepResponse(metrics=convert.metrics(metrics))

        return self._answer(source, self._noting(show, self._checkpointer.observed.stepped))

    @_while_usable
    def save(
        self,
        kind: Literal["weights", "sampler_weights"],
        name: object,
        ttl_seconds: object,
        user_metadata: object,
        overwrite: bool = False,
    ) -> Future[types.SaveWeightsResponse | types.SaveWeightsForSamplerResponse]:
        """Write a checkpoint; the future resolves after it is durable."""
        path = CheckpointKey(self.run_id, kind, checks.checkpoint_name(name))
        ttl, metadata = checks.ttl(ttl_seconds), checks.user_metadata_or_none(user_metadata)
        optimizer, checkpointer = kind == "weights", self._checkpointer
        held = self._request(lambda: self._engine.snapshot(self._lane, self._adapter, optimizer=optimizer))

        def write(held: Snapshot) -> types.SaveWeightsResponse | types.SaveWeightsForSamplerResponse:
            checkpointer.write(held, kind, path.name, ttl_seconds=ttl, user_metadata=metadata, overwrite=overwrite)
            if optimizer:
                return types.SaveWeightsResponse(path=str(path), type="save_weights")
            return types.SaveWeightsForSamplerResponse(path=str(path), type="save_weights_for_sampler")

        return self.session.track(self.session.save(str(path), held, write))

    @_while_usable
    def export(
        self, name: object, ttl_seconds: object, age_recipients: object
    ) -> Future[types.SaveWeightsExternalResponse]:
        """Write the adapter in the form that peft reads; the future resolves after it is durable and checked."""
        recipients = check_recipients(age_recipients)
        path = CheckpointKey(self.run_id, "external_weights", checks.checkpoint_name(name))
        ttl, checkpointer = checks.ttl(ttl_seconds), self._checkpointer
        held = self._request(lambda: self._engine.snapshot(self._lane, self._adapter))

        def write(held: Snapshot) -> types.SaveWeightsExternalResponse:
            checkpointer.export(held.fetch(), path.name, ttl_seconds=ttl, recipients=recipients)
            return types.SaveWeightsExternalResponse(path=str(path))

        return self.session.track(self.session.save(str(path), held, write))

    @_while_usable
    def load(self, text: object, *, optimizer: bool, method: str) -> Future[types.LoadWeightsResponse]:
        """Replace the adapter's weights, and its optimizer state if asked for; drop the accumulated gradients."""
        path = training_path(text, method)
        if not self.session.is_saving(str(path)):
            self._check_fits(self.session.store.record(path), optimizer)

        def read() -> AdapterState:
            state, record = self.session.store.load(path)
            self._check_fits(record, optimizer)
            return state if optimizer else replace(state, step=0, mu=None, nu=None)

        reading = self.session.read(str(path), read)
        source = self._request(lambda: self._engine.restore(self._lane, self._adapter, reading.result()), after=reading)

        def show(version: Version) -> types.LoadWeightsResponse:
            self._checkpointer.loaded(version)
            self._checkpointer.observed.event("load", reading.result().step, path=str(path))
            return types.LoadWeightsResponse(path=str(path), model_id=self.run_id, type="load_weights")

        return self._answer(source, show)

    def _check_fits(self, record: Record, optimizer: bool) -> None:
        api_records.check_adapter(record, self.model_ref.source, self.model_ref.model.fingerprint, self.spec)
        if optimizer:
            api_records.check_optimizer(record)

    def sampler(self, kind: types.SamplingClientKind, *, sampler_id: str | None = None) -> Future[SamplerHandle]:
        """Return the future of a sampler of the current weights; nothing is written to disk.

        "snapshot" keeps these weights. "inflight" samplers of one run all follow the newest published weights.
        """
        source = self._request(lambda: self._engine.snapshot(self._lane, self._adapter))

        def show(snapshot: Snapshot) -> SamplerHandle:
            published = WeightsFeed(snapshot) if kind == "snapshot" else self.published.publish(snapshot)
            return SamplerHandle(self.session, self.model_ref, published, model_path=None, sampler_id=sampler_id)

        return self._answer(source, show)

    def evict(self, *, announce: bool = False) -> CheckpointKey | None:
        """Save the run with its optimizer, free its memory and return the checkpoint from which `resume_run` continues.

        None, and the run stays, if it holds gradients. No request of it may be in flight. `announce` prints how to
        continue from steps that no one had saved.

        Raises:
            RequestFailedError: the disk failed; the run stays.
        """
        saved = self._checkpointer.save_for_eviction()
        if saved is None:
            return None
        path, step = saved
        autosave.unwatch(self._checkpointer)
        self._checkpointer.end("unloaded")
        if announce and step is not None:
            autosave.announce(self.run_id, path, step)
        return path

    def info(self) -> types.GetInfoResponse:
        """Describe the run."""
        return types.GetInfoResponse(
            type="get_info",
            model_data=types.ModelData(
                arch=self._engine.model.family, model_name=self.model_ref.name, tokenizer_id=self.model_ref.name
            ),
            model_id=self.run_id,
            is_lora=True,
            lora_rank=self.spec.rank,
            model_name=self.model_ref.name,
        )


def create_run(
    session: Session, run_id: str, base_model: str, spec: LoraSpec, user_metadata: Mapping[str, str] | None
) -> Run:
    """Load the base model if need be and make a fresh adapter; waits for both."""
    model_ref = session.base_model(base_model).result()
    lane = model_ref.model.engine.open_lane(session.owner_name)
    adapter = model_ref.model.engine.open_adapter(lane, spec).result()
    return _open(session, run_id, model_ref, lane, adapter, spec, user_metadata, step=0)


def resume_run(
    session: Session,
    run_id: str,
    path: CheckpointKey,
    base_model: str | None,
    user_metadata: Mapping[str, str] | None,
    *,
    optimizer: bool,
) -> Run:
    """Make a new run from a checkpoint, with the configuration it was saved with; waits for it."""
    record = session.read(str(path), lambda: session.store.record(path)).result()
    if optimizer:
        api_records.check_optimizer(record)
    model_ref = session.base_model(base_model or api_records.base_model(record.metadata)).result()
    api_records.check_base_model(record, model_ref.source, model_ref.model.fingerprint)
    state, record = session.store.load(path)
    if not optimizer:
        state = replace(state, step=0, mu=None, nu=None)
    if user_metadata is None:
        user_metadata = user_metadata_of(session, path.run_id)
    lane = model_ref.model.engine.open_lane(session.owner_name)
    adapter = model_ref.model.engine.open_adapter(lane, state).result()
    spec = api_records.saved_spec(record)
    return _open(session, run_id, model_ref, lane, adapter, spec, user_metadata, step=state.step, source=path)


def _open(
    session: Session,
    run_id: str,
    model_ref: ModelRef,
    lane: Lane,
    adapter: Adapter,
    spec: LoraSpec,
    user_metadata: Mapping[str, str] | None,
    *,
    step: int,
    source: CheckpointKey | None = None,
) -> Run:
    def record() -> RunLock:
        claim = session.store.lock_run(run_id)
        try:
            name = model_ref.source.lasting_name
            session.store.put_run(run_id, record_of(session, run_id, name, spec, user_metadata, source))
        except BaseException:
            claim.release()
            raise
        return claim

    engine = model_ref.model.engine
    try:
        claim = session.on_disk(record).result()
    except BaseException:
        engine.release(adapter)
        raise
    observed = run_metrics.observe(
        run_id,
        engine.monitor,
        session.state_dir,
        step,
        on=session.config.record_metrics,
        reporting=reporting_of(session, run_id),
    )
    observed.event("start", step, base_model=model_ref.name, rank=spec.rank, origin=source and str(source))
    checkpointer = RunCheckpointer(
        store=session.store,
        model_ref=model_ref,
        adapter=adapter,
        spec=spec,
        run_id=run_id,
        claim=claim,
        step=step,
        observed=observed,
        owner=session.owner_name,
        source=source,
    )
    session.keep(checkpointer)
    return Run(session, model_ref, lane, adapter, checkpointer)
