"""What is a sampler? Fixed weights, or the newest published ones of a run, which continue and score prompts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from tinker import types

from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.runs import checks
from jax_client.runs.lifecycle.base_models import ModelRef
from jax_client.runs.lifecycle.futures import then
from jax_client.runs.lifecycle.session import SamplerInfo, Session
from jax_client.runs.results import api_records, convert
from jax_client.values import AdapterState, CheckpointKey

if TYPE_CHECKING:
    from jax_client.engine.core.adapters import Snapshot

T = TypeVar("T")


class WeightsFeed:
    """The newest snapshot of a run, which samplers follow; None is the base model."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._snapshot = snapshot
        self.followed = False
        self._lock = threading.Lock()

    def publish(self, snapshot: Snapshot) -> WeightsFeed:
        """Make `snapshot` the newest weights, for every sampler of this holder."""
        with self._lock:
            self._snapshot = snapshot
            self.followed = True
        return self

    def newest(self) -> Snapshot | None:
        """Return the newest weights."""
        with self._lock:
            return self._snapshot


class SamplerHandle:
    """Weights to sample from. Thread-safe; many requests may be in flight and are batched by the engine.

    Args:
        session: whose sampler this is.
        model_ref: the base model.
        published: the adapter's weights.
        model_path: the checkpoint they came from, None for the base model and for weights that were never saved.
        sampler_id: `SESSION:sample:N`, None takes the next one.
    """

    def __init__(
        self,
        session: Session,
        model_ref: ModelRef,
        published: WeightsFeed,
        *,
        model_path: str | None,
        sampler_id: str | None = None,
    ) -> None:
        self.session = session
        self.model_ref = model_ref
        self.sampler_id = sampler_id or session.new_id("sample")
        self._engine = model_ref.model.engine
        self._published = published
        self._count = itertools.count()
        session.samplers[self.sampler_id] = SamplerInfo(
            sampler_id=self.sampler_id, base_model=model_ref.name, model_path=model_path
        )

    def sample(
        self, prompt: object, num_samples: object, sampling_params: object, *, last_n: object = None, **scores: object
    ) -> Future[types.SampleResponse]:
        """Check the request in the call, then return the future of its answer.

        Args:
            prompt: a ModelInput.
            num_samples: how many continuations.
            sampling_params: SamplingParams; without a seed every request draws its own.
            last_n: score only the last n prompt tokens.
            scores: what else to score, as `checks.generation` names it.
        """
        self.session.check_open()
        request = self._request(prompt, num_samples, sampling_params, last_n, scores)
        targets = scores.get("target_prompt_logprobs")
        layout = targets if isinstance(targets, types.TensorData) else None
        request_id = f"{self.sampler_id}:{next(self._count)}"

        def show(result: GenerationResult) -> types.SampleResponse:
            return convert.sample_response(result, request_id=request_id, targets=layout)

        return self._answer(request, show)

    def compute_logprobs(self, prompt: object, last_n: object) -> Future[list[float | None]]:
        """Return the future of log p of each prompt token given those before it; None for the first."""
        self.session.check_open()
        scored = {"include_prompt_logprobs": True}
        # The API counts a scored prompt as one sampled token; here none is sampled.
        request = self._request(prompt, 1, types.SamplingParams(max_tokens=1), last_n, scored)
        request = replace(request, num_samples=0, max_tokens=0)

        def show(result: GenerationResult) -> list[float | None]:
            return convert.sample_response(result, request_id="").prompt_logprobs or []

        return self._answer(request, show)

    def park(self) -> Callable[[], SamplerHandle] | None:
        """Move the weights to the host and return what makes the same sampler of them again; waits for that.

        None, and nothing happens, for weights that others follow too. The caller forgets the sampler, and so frees
        its memory on the device.
        """
        session, model_ref, sampler_id = self.session, self.model_ref, self.sampler_id
        model_path = session.samplers[sampler_id].model_path
        snapshot = self._published.newest()
        if snapshot is None:
            return lambda: _base_sampler(session, session.same_base_model(model_ref), sampler_id)
        if self._published.followed:
            return None
        state = snapshot.fetch()

        def remake() -> SamplerHandle:
            loaded = session.same_base_model(model_ref).result()
            return _loaded(session, loaded, state, model_path=model_path, sampler_id=sampler_id)

        return remake

    def _request(
        self,
        prompt: object,
        num_samples: object,
        params: object,
        last_n: object,
        scores: Mapping[str, object],
    ) -> GenerationRequest:
        model = self._engine.model
        return checks.generation(
            prompt,
            num_samples,
            params,
            prompt_logprobs_last_n=last_n,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            eos_token_ids=model.eos_token_ids,
            decode=self.model_ref.model.decode,
            **scores,
        )

    def _answer(self, request: GenerationRequest, show: Callable[[GenerationResult], T]) -> Future[T]:
        if self.session.owner is not None:
            request = replace(request, owner=self.session.owner_name)
        source = self._engine.generate(self._published.newest(), request)
        return self.session.track(then(source, show, owner=self))


def base_sampler(session: Session, base_model: str, *, sampler_id: str | None = None) -> SamplerHandle:
    """Return a sampler of the base model; waits until it is loaded."""
    return _base_sampler(session, session.base_model(base_model), sampler_id)


def _base_sampler(session: Session, base_model: Future[ModelRef], sampler_id: str | None) -> SamplerHandle:
    return SamplerHandle(session, base_model.result(), WeightsFeed(), model_path=None, sampler_id=sampler_id)


def checkpoint_sampler(session: Session, path: CheckpointKey, *, sampler_id: str | None = None) -> SamplerHandle:
    """Return a sampler of saved weights; waits until they are loaded."""
    record = session.read(str(path), lambda: session.store.record(path)).result()
    model_ref = session.base_model(api_records.base_model(record.metadata)).result()
    api_records.check_base_model(record, model_ref.source, model_ref.model.fingerprint)
    state, _ = session.store.load(path)
    return _loaded(session, model_ref, state, model_path=str(path), sampler_id=sampler_id)


def _loaded(
    session: Session, model_ref: ModelRef, state: AdapterState, *, model_path: str | None, sampler_id: str | None
) -> SamplerHandle:
    engine = model_ref.model.engine
    snapshot = engine.snapshot(engine.open_lane(session.owner_name), state).result()
    return SamplerHandle(session, model_ref, WeightsFeed(snapshot), model_path=model_path, sampler_id=sampler_id)
