"""What is a training run? One adapter on one engine, and the requests that change it, in order."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tinker import types

from jax_client.engine.core.requests import AdapterState, CustomLoss, LoraSpec, Sequence
from jax_client.errors import NotFoundError, RequestFailedError
from jax_client.runs import checks
from jax_client.runs.lifecycle import autosave
from jax_client.runs.lifecycle.base_models import Lease
from jax_client.runs.lifecycle.futures import then
from jax_client.runs.lifecycle.order import RequestOrder
from jax_client.runs.lifecycle.run_checkpointer import Keeper
from jax_client.runs.lifecycle.sampler_handle import Published, Sampler
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.paths import TinkerPath, training_path
from jax_client.runs.results import api_records, convert, run_metrics
from jax_client.runs.results.graph_loss import GraphCall

if TYPE_CHECKING:
    from jax_client.checkpoint.disk.run_lock import Claim
    from jax_client.checkpoint.store import Record
    from jax_client.engine.core.adapters import Held, Version
    from jax_client.torch_graph.program import GraphProgram

logger = logging.getLogger(__name__)
T = TypeVar("T")
# The runs whose loss function is running in this context.
_inside_loss: ContextVar[frozenset[str]] = ContextVar("jax_client_inside_loss", default=frozenset())


class Run:
    """One LoRA adapter in training.

    Every method checks its arguments in the call, so that a rejected call changes nothing, then returns the future of
    the API's response without waiting for the device. Requests take effect in the order in which they are submitted.

    Args:
        session: whose run this is.
        lease: the base model.
        lane: the engine's queue for this run.
        adapter: the engine's handle.
        keeper: writes this run's checkpoints, also after the run itself is forgotten.
    """

    def __init__(self, session: Session, lease: Lease, lane: Any, adapter: Any, keeper: Keeper) -> None:
        self.session = session
        self.lease = lease
        self.spec = keeper.spec
        self.run_id = keeper.run_id
        self._keeper = keeper
        self._engine = lease.model.engine
        self._lane = lane
        self._adapter = adapter
        self._order = RequestOrder()
        self.published = Published()
        weakref.finalize(self, autosave.forget, keeper).atexit = False

    def _request(self, start: Callable[[], Future[Any]], *, after: Future[Any] | None = None) -> Future[Any]:
        """Submit to the engine in order, unless the session is closed or the caller is this run's own loss function."""
        self._check_usable()
        return self._order.submit(start, after=after)

    def _check_usable(self) -> None:
        if self.run_id in _inside_loss.get():
            raise RuntimeError(
                "re-entrant call: a loss function cannot use the TrainingClient that is running it, which would wait "
                "for itself. Compute what the loss needs before forward_backward_custom, or use another client."
            )
        self.session.check_open()

    def _answer(self, source: Future[Any], show: Callable[[Any], Any]) -> Future[Any]:
        return self.session.track(then(source, show, owner=self))

    def forward(self, data: Any, loss_fn: Any, loss_fn_config: Any) -> Future[types.ForwardBackwardOutput]:
        """Compute logprobs and the loss; gradients stay as they are."""
        self._check_usable()
        sequences, loss = self._training_data(data, loss_fn, loss_fn_config)
        source = self._request(lambda: self._engine.forward(self._lane, self._adapter, sequences, loss))
        return self._answer(source, self._noting(convert.training_output, self._keeper.observed.scored))

    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Any) -> Future[types.ForwardBackwardOutput]:
        """Compute logprobs and the loss, and add its gradient to the accumulated ones."""
        self._check_usable()
        sequences, loss = self._training_data(data, loss_fn, loss_fn_config)
        source = self._request(lambda: self._engine.forward_backward(self._lane, self._adapter, sequences, loss))
        return self._answer(source, self._noting(convert.training_output, self._keeper.observed.passed))

    @staticmethod
    def _noting(show: Callable[[Any], T], note: Callable[[Any], None]) -> Callable[[Any], T]:
        def noted(result: Any) -> T:
            shown: Any = show(result)
            note(shown.metrics)
            return shown

        return noted

    def _training_data(self, data: Any, loss_fn: Any, loss_fn_config: Any) -> Any:
        model = self._engine.model
        return checks.training_data(
            data, loss_fn, loss_fn_config, vocab_size=model.vocab_size, max_context=self._engine.max_context
        )

    def forward_backward_custom(
        self, data: Any, loss: CustomLoss, extra: Callable[[], Mapping[str, float]]
    ) -> Future[types.ForwardBackwardOutput]:
        """Run `loss` between a forward and a backward pass, and add the gradient to the accumulated ones.

        Args:
            data: a list of Datum, of which the engine needs the tokens and the targets.
            loss: from logprobs to loss, gradients and metrics; called on a thread of the engine's.
            extra: the metrics of the user's own, called after the loss.
        """
        self._check_usable()
        return self._custom(self._custom_data(data), loss, extra)

    def forward_backward_graph(self, data: Any, program: GraphProgram) -> Future[types.ForwardBackwardOutput]:
        """Run an uploaded loss, as `forward_backward_custom` runs the user's function."""
        self._check_usable()
        sequences = self._custom_data(data)
        return self._custom(sequences, GraphCall(program, data, sequences).run, dict)

    def _custom_data(self, data: Any) -> list[Sequence]:
        return checks.custom_data(data, vocab_size=self._engine.model.vocab_size, max_context=self._engine.max_context)

    def _custom(
        self, sequences: list[Sequence], loss: CustomLoss, extra: Callable[[], Mapping[str, float]]
    ) -> Future[types.ForwardBackwardOutput]:
        def guarded(logprobs: Any) -> Any:
            with self._inside_loss():
                return loss(logprobs)

        def show(result: Any) -> types.ForwardBackwardOutput:
            own = extra()
            engine_metrics = {key: value for key, value in result.metrics.items() if key not in own}
            return convert.training_output(replace(result, metrics=engine_metrics), own)

        source = self._request(
            lambda: self._engine.forward_backward_custom(self._lane, self._adapter, sequences, guarded)
        )
        return self._answer(source, self._noting(show, self._keeper.observed.passed))

    @contextlib.contextmanager
    def _inside_loss(self) -> Iterator[None]:
        token = _inside_loss.set(_inside_loss.get() | {self.run_id})
        try:
            yield
        finally:
            _inside_loss.reset(token)

    def optim_step(self, optim_params: Any, adam_params: Any) -> Future[types.OptimStepResponse]:
        """Take one AdamW step with the accumulated gradients, and clear them."""
        self._check_usable()
        settings = checks.adam_settings(optim_params, adam_params)
        self._keeper.optimizer_config = settings
        source = self._request(lambda: self._engine.optim_step(self._lane, self._adapter, settings))
        show = lambda metrics: types.OptimStepResponse(metrics=convert.metrics(metrics))  # noqa: E731
        return self._answer(source, self._noting(show, self._keeper.observed.stepped))

    def save(
        self,
        kind: Literal["weights", "sampler_weights"],
        name: Any,
        ttl_seconds: Any,
        user_metadata: Any,
        overwrite: bool = False,
    ) -> Future[Any]:
        """Write a checkpoint; the future resolves after it is durable."""
        self._check_usable()
        path = TinkerPath(run_id=self.run_id, kind=kind, name=checks.checkpoint_name(name))
        ttl, about = checks.ttl(ttl_seconds), checks.user_metadata_or_none(user_metadata)
        optimizer, keeper = kind == "weights", self._keeper
        held = self._request(lambda: self._engine.hold_state(self._lane, self._adapter, optimizer))

        def write(held: Held) -> Any:
            keeper.write(
                held,
                kind,
                path.name,
                ttl_seconds=ttl,
                user_metadata=about,
                overwrite=overwrite,
            )
            if optimizer:
                return types.SaveWeightsResponse(path=str(path), type="save_weights")
            return types.SaveWeightsForSamplerResponse(path=str(path), type="save_weights_for_sampler")

        return self.session.track(self.session.save(str(path), held, write))

    def export(self, name: Any, ttl_seconds: Any) -> Future[types.SaveWeightsExternalResponse]:
        """Write the adapter in the form that peft reads; the future resolves after it is durable and checked."""
        self._check_usable()
        path = TinkerPath(run_id=self.run_id, kind="external_weights", name=checks.checkpoint_name(name))
        ttl, keeper = checks.ttl(ttl_seconds), self._keeper
        held = self._request(lambda: self._engine.hold_state(self._lane, self._adapter, False))

        def write(held: Held) -> Any:
            keeper.export(held.fetch(), path.name, ttl_seconds=ttl)
            return types.SaveWeightsExternalResponse(path=str(path))

        return self.session.track(self.session.save(str(path), held, write))

    def load(self, text: Any, *, optimizer: bool, method: str) -> Future[types.LoadWeightsResponse]:
        """Replace the adapter's weights, and its optimizer state if asked for; drop the accumulated gradients."""
        self._check_usable()
        path = training_path(text, method)
        if not self.session.is_saving(str(path)):
            self._check_fits(self.session.store.record(path.run_id, path.kind, path.name), optimizer)

        def read() -> AdapterState:
            state, record = self.session.store.load(path.run_id, path.kind, path.name)
            self._check_fits(record, optimizer)
            return state if optimizer else replace(state, step=0, mu=None, nu=None)

        reading = self.session.read(str(path), read)
        source = self._request(
            lambda: self._engine.restore_state(self._lane, self._adapter, reading.result()), after=reading
        )

        def show(version: Version) -> types.LoadWeightsResponse:
            self._keeper.loaded(version)
            self._keeper.observed.event("load", reading.result().step, path=str(path))
            return types.LoadWeightsResponse(path=str(path), model_id=self.run_id, type="load_weights")

        return self._answer(source, show)

    def _check_fits(self, record: Record, optimizer: bool) -> None:
        api_records.check_adapter(record, self.lease, self.spec)
        if optimizer:
            api_records.check_optimizer(record)

    def sampler(self, kind: types.SamplingClientKind, *, sampler_id: str | None = None) -> Future[Sampler]:
        """Return the future of a sampler of the current weights; nothing is written to disk.

        "snapshot" keeps these weights. "inflight" samplers of one run all follow the newest published weights.
        """
        source = self._request(lambda: self._engine.snapshot(self._lane, self._adapter))

        def show(snapshot: Any) -> Sampler:
            published = Published(snapshot) if kind == "snapshot" else self.published.publish(snapshot)
            return Sampler(self.session, self.lease, published, model_path=None, sampler_id=sampler_id)

        return self._answer(source, show)

    def park(self, *, aloud: bool = False) -> TinkerPath | None:
        """Save the run with its optimizer, give back its memory and return from where `resume_run` goes on exactly.

        None, and the run stays, if it holds gradients. No request of it may be in flight. `aloud` prints how to go on
        from what nobody had saved.

        Raises:
            RequestFailedError: the disk failed; the run stays.
        """
        parked = self._keeper.park()
        if parked is None:
            return None
        path, step = parked
        autosave.unwatch(self._keeper)
        self._keeper.end()
        if aloud and step is not None:
            autosave.announce(self.run_id, path, step)
        return path

    def info(self) -> types.GetInfoResponse:
        """Describe the run."""
        return types.GetInfoResponse(
            type="get_info",
            model_data=types.ModelData(
                arch=self._engine.model.family, model_name=self.lease.name, tokenizer_id=self.lease.name
            ),
            model_id=self.run_id,
            is_lora=True,
            lora_rank=self.spec.rank,
            model_name=self.lease.name,
        )


def create_run(
    session: Session, run_id: str, base_model: str, spec: LoraSpec, user_metadata: Mapping[str, str] | None
) -> Run:
    """Load the base model if need be and make a fresh adapter; waits for both."""
    lease = session.base_model(base_model).result()
    lane = lease.model.engine.open_lane()
    adapter = lease.model.engine.create_adapter(lane, spec).result()
    return _open(session, run_id, lease, lane, adapter, spec, user_metadata, step=0)


def _user_metadata(session: Session, run_id: str) -> Mapping[str, str] | None:
    """Return what the user said about a run; None if nobody knows any more, which is no reason not to go on from it."""
    try:
        return session.store.run(run_id).get("user_metadata")
    except NotFoundError:
        return None
    except RequestFailedError as error:
        logger.warning("%s", error)
        return None


def resume_run(
    session: Session,
    run_id: str,
    path: TinkerPath,
    base_model: str | None,
    user_metadata: Mapping[str, str] | None,
    *,
    optimizer: bool,
) -> Run:
    """Make a new run from a checkpoint, with the configuration it was saved with; waits for it."""
    record = session.read(str(path), lambda: session.store.record(path.run_id, path.kind, path.name)).result()
    if optimizer:
        api_records.check_optimizer(record)
    lease = session.base_model(base_model or record.metadata["base_model"]).result()
    api_records.check_base_model(record, lease)
    state, record = session.store.load(path.run_id, path.kind, path.name)
    if not optimizer:
        state = replace(state, step=0, mu=None, nu=None)
    if user_metadata is None:
        user_metadata = _user_metadata(session, path.run_id)
    lane = lease.model.engine.open_lane()
    adapter = lease.model.engine.load_adapter(lane, state).result()
    spec = api_records.saved_spec(record)
    return _open(session, run_id, lease, lane, adapter, spec, user_metadata, step=state.step, source=path)


def _open(
    session: Session,
    run_id: str,
    lease: Lease,
    lane: Any,
    adapter: Any,
    spec: LoraSpec,
    user_metadata: Mapping[str, str] | None,
    *,
    step: int,
    source: TinkerPath | None = None,
) -> Run:
    metadata = api_records.run_metadata(
        session_id=session.session_id,
        base_model=api_records.lasting_name(lease.name),
        spec=spec,
        user_metadata=user_metadata,
        project_id=session.info.project_id,
        display_name=session.info.display_name,
        session_metadata=session.info.user_metadata,
    )

    def record() -> Claim:
        claim = session.store.claim(run_id)
        try:
            session.store.put_run(run_id, metadata)
        except BaseException:
            claim.release()
            raise
        return claim

    try:
        claim = session.on_disk(record).result()
    except BaseException:
        lease.model.engine.release(adapter)
        raise
    observed = run_metrics.watch(run_id, lease.model.engine, session.state_dir, step, on=session.config.record_metrics)
    observed.event("start", step, base_model=lease.name, rank=spec.rank, origin=source and str(source))
    keeper = Keeper(
        store=session.store,
        lease=lease,
        adapter=adapter,
        spec=spec,
        run_id=run_id,
        claim=claim,
        step=step,
        observed=observed,
        source=source,
    )
    session.keep(keeper)
    return Run(session, lease, lane, adapter, keeper)
