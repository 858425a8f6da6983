"""What does a sampling request of the protocol become? A call of a `SamplerHandle`, in no order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from tinker import types

from jax_client.errors import BadRequestError, JaxClientError
from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
from jax_client.server.state.ledger import RequestLedger
from jax_client.server.state.live_objects import LiveObjects, new_sampler_id
from jax_client.server.state.pending import PendingRequest
from jax_client.server.state.tables import Records
from jax_client.server.wire.accounts import Account


class SamplingRequests:
    """The requests that make samplers and sample. Thread-safe; no method waits for a device.

    Args:
        live: where the samplers are.
        ledger: where the requests are.
        records: what the next server will know.
        model_name: `model_name(name) -> name` of the base model that an alias stands for.
        account: where samples and their tokens are noted.
    """

    def __init__(
        self,
        live: LiveObjects,
        ledger: RequestLedger,
        records: Records,
        model_name: Callable[[str], str],
        account: Account,
    ) -> None:
        self._live = live
        self._account = account
        self._ledger = ledger
        self._records = records
        self._model_name = model_name
        # How many clients joined samplers, of whatever session and server on this directory: a number given twice would
        # lead a new client to the answers of an old one.
        self._joined: int = (records.get("clones", "all") or {"count": 0})["count"]
        self._lock = threading.Lock()

    def create_sampling_session(
        self, request: types.CreateSamplingSessionRequest
    ) -> types.CreateSamplingSessionResponse:
        """Make a sampler of a base model or of saved weights; it loads in the background."""
        session_id = request.session_id
        self._live.session(session_id).check_open()
        sampler_id = new_sampler_id(session_id, request.sampling_session_seq_id)
        base_model = None if request.base_model is None else self._model_name(request.base_model)
        self._live.add_sampler(sampler_id, session_id, base_model, request.model_path)
        return types.CreateSamplingSessionResponse(sampling_session_id=sampler_id)

    def join_sampling_session(self, sampler_id: str) -> int:
        """Return a number that no other client of this sampler has."""
        self._live.sampler(sampler_id)
        # Earlier versions counted those of each sampler.
        earlier = (self._records.get("clones", sampler_id) or {"count": 0})["count"]
        with self._lock:
            self._joined = joined = max(self._joined, earlier) + 1
            self._records.put("clones", "all", {"count": joined})
        return joined

    def sampler(self, sampler_id: str) -> Future[SamplerHandle]:
        """Return the future of a sampler, loading it if need be. Raises NotFoundError."""
        return self._live.sampler(sampler_id).evictable.pin()

    def sample(self, request: types.SampleRequest, digest: bytes) -> PendingRequest:
        """Sample from, or score, a prompt."""
        if request.sampling_session_id is None or request.seq_id is None:
            raise BadRequestError("sampling_session_id and seq_id are needed; make a sampling session first.")
        self._live.config.check_stability_info(request.record_stability_info)
        served = self._live.sampler(request.sampling_session_id)
        pending, new = self._ledger.accept(f"{request.sampling_session_id}:{request.seq_id}", digest, "sample")
        if not new:
            return pending

        def start(sampler: SamplerHandle) -> Future[types.SampleResponse]:
            targets = _targets(request)
            sampled = sampler.sample(
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
            sampled.add_done_callback(self._note)
            return sampled

        made = served.evictable.pin(pending.answer)
        made.add_done_callback(lambda done: pending.begin(lambda: start(done.result())))
        return pending

    def _note(self, sampled: Future[types.SampleResponse]) -> None:
        if not sampled.cancelled() and sampled.exception() is None:
            sequences = sampled.result().sequences
            tokens = sum(0 if each.tokens_np is None else len(each.tokens_np) for each in sequences)
            self._account.note(samples=len(sequences), sampled_tokens=tokens)

    def is_immediate(self, sampler_id: str | None) -> bool:
        """Return whether `sample` waits for nothing, neither the disk nor a model that loads."""
        served = self._live.samplers.in_memory(sampler_id or "")
        return served is not None and served.evictable.value is not None

    def may_have_lost(self, request_id: str) -> bool:
        """Return whether a killed server may have accepted a request of this unknown id, and not yet logged it."""
        sampler_id, _, number = request_id.rpartition(":")
        if not (number.isascii() and number.isdigit()):
            return False
        try:
            self._live.sampler(sampler_id)
        except JaxClientError:
            return False
        return True


def _targets(request: types.SampleRequest) -> types.TensorData | None:
    """Return the targets; what pydantic parsed from JSON is a class of its own with the same fields."""
    parsed = request.target_prompt_logprobs
    if parsed is None:
        return None
    try:
        return types.TensorData(**parsed.model_dump())
    except (OverflowError, ValueError, TypeError) as error:
        raise BadRequestError(f"target_prompt_logprobs is no {parsed.dtype} tensor: {str(error)[:200]}.") from None
