"""What does a user sample with? A SamplingClient in the process that has the weights, a RemoteSamplingClient elsewhere.

A process that unpickles a client imports this module and needs no jax: jax is imported only to make a client from
weights.
"""

from __future__ import annotations

import functools
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, cast

import tinker
from tinker import types

from jax_client import process
from jax_client.clients.futures import ClientFuture, SampleFuture
from jax_client.clients.hints import NamesTheOwner
from jax_client.clients.remote import connection
from jax_client.clients.sdk_errors import register_as_sdk_class, sdk_errors
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.runs.lifecycle.futures import background
from jax_client.runs.paths import sampler_path
from jax_client.runs.sampler_address import SamplerAddress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
    from jax_client.runs.lifecycle.session import Session

# The samplers of this process that have handles, by id: here a handle leads back to the sampler itself.
_with_handles: weakref.WeakValueDictionary[str, SamplerHandle] = weakref.WeakValueDictionary()
process.register("handles", "the samplers of this process that have handles", after_fork=_with_handles.clear)


@sdk_errors
class SamplingClient(NamesTheOwner):
    """Client for text generation, from a base model or from trained weights.

    Made by `ServiceClient.create_sampling_client` or `TrainingClient.save_weights_and_get_sampling_client`. It can be
    pickled: in another process of this machine the copy asks this one to sample.

    Args:
        sampler: the loaded weights.
    """

    def __init__(self, sampler: SamplerHandle) -> None:
        self._loaded = sampler
        self._process = os.getpid()

    @property
    def _sampler(self) -> SamplerHandle:
        # A forked process has no thread that drives the device: a request would wait for ever.
        if os.getpid() != self._process:
            raise UnsupportedError(
                f"this SamplingClient came from process {self._process} by a fork, where its engine does not run. "
                "Pickle it: give it to the pool with each task, or take get_sampler_handle() before the fork and "
                "SamplingClient.from_sampler_handle() after it."
            )
        return self._loaded

    async def _ready(self) -> SamplingClient:
        return self

    def sample(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleFuture[types.SampleResponse]:
        """Generate continuations of a prompt; many calls may be in flight and are batched.

        Args:
            prompt: tokens to continue.
            num_samples: how many independent continuations.
            sampling_params: temperature (0 = greedy), top_k, top_p, max_tokens, stop, seed.
            include_prompt_logprobs: score the prompt's own tokens.
            topk_prompt_logprobs: report the k most likely tokens at each prompt position.
            topk_sample_logprobs: report the k most likely tokens at each sampled position.
            target_prompt_logprobs: int64 ids (len(prompt) - 1, K) to score at the prompt positions.
            prompt_alt_tokens_k: draw k alternatives at each prompt position.
            prompt_logprobs_last_n: score only the last n prompt tokens; needs `include_prompt_logprobs`.

        Raises:
            BadRequestError: a value is wrong or not supported; nothing was started.
        """
        return SampleFuture(
            self._sampler.sample(
                prompt,
                num_samples,
                sampling_params,
                last_n=prompt_logprobs_last_n,
                include_prompt_logprobs=include_prompt_logprobs,
                topk_prompt_logprobs=topk_prompt_logprobs,
                topk_sample_logprobs=topk_sample_logprobs,
                target_prompt_logprobs=target_prompt_logprobs,
                prompt_alt_tokens_k=prompt_alt_tokens_k,
            )
        )

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> SampleFuture[list[float | None]]:
        """Score a prompt: log p of each token given those before it, in nats; None where there is none.

        Args:
            prompt: tokens to score.
            prompt_logprobs_last_n: score only the last n.
        """
        return SampleFuture(self._sampler.compute_logprobs(prompt, prompt_logprobs_last_n))

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base model's tokenizer."""
        return self._sampler.model_ref.model.tokenizer()

    def get_base_model(self) -> str:
        """Return the base model's name."""
        return self._sampler.model_ref.name

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anyone."""

    def on_queue_state_change(self, queue_state: object, queue_state_reason: str | None) -> None:
        """Ignore the queue states of a hosted service; there are none in-process."""

    def get_sampler_handle(self) -> str:
        """Return a string from which `from_sampler_handle` makes a client of these weights, on this machine.

        From the first handle on, this process serves its samplers on a Unix socket that only its user can open. The
        handle holds for as long as this client lives, and while it is among the newest 16 of an open session.

        Raises:
            NotFoundError: the session is closed.
        """
        sampler = self._sampler
        # Imported here: only a process that shares its samplers needs the server.
        from jax_client.server.sharing import share

        address = share(sampler)
        _with_handles[address.sampler_id] = sampler
        return address.encode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> tinker.SamplingClient:
        """Make a client from a handle; the client sends nothing before its first request.

        Args:
            handle: of `get_sampler_handle`.
            api_key: not needed on the machine of the handle.

        Returns:
            In the process that has the weights, a client like any other; elsewhere a client that asks that process.

        Raises:
            BadRequestError: the text is no handle.
        """
        address = SamplerAddress.decode(handle)
        sampler = _with_handles.get(address.sampler_id)
        if sampler is None:
            return RemoteSamplingClient(address)
        return cast(tinker.SamplingClient, SamplingClient(sampler))

    def __reduce__(self) -> tuple[object, ...]:
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)

    def __copy__(self) -> SamplingClient:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> SamplingClient:
        return self

    # The twins of the methods above, in the same order.

    async def sample_async(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> types.SampleResponse:
        """Await `sample`: gives the response, not a future of it. Cancelling the task ends the sampling."""
        client = await self._ready()
        future = client.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
        )
        return await future

    async def compute_logprobs_async(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> list[float | None]:
        """Await `compute_logprobs`: gives the list, not a future of it."""
        client = await self._ready()
        return await client.compute_logprobs(prompt, prompt_logprobs_last_n)

    async def get_base_model_async(self) -> str:
        """Return the base model's name."""
        return (await self._ready()).get_base_model()


@sdk_errors
class RemoteSamplingClient(tinker.SamplingClient):
    """A sampling client whose weights are in another process of this machine; both processes get the same numbers.

    Made by unpickling a SamplingClient, or by `SamplingClient.from_sampler_handle`. It can be pickled again. Its
    requests fail within seconds once the other process has ended or closed its session.

    Args:
        address: of the sampler.
    """

    def __init__(self, address: SamplerAddress) -> None:
        super().__init__(
            connection(address), sampling_session_id=address.sampler_id, base_model=address.base_model, shadow=True
        )
        self._address = address

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base model's tokenizer, from the files that the other process loaded."""
        return _tokenizer(self._address.model_path, self._address.model_kind)

    def get_sampler_handle(self) -> str:
        """Return the handle from which this client was made."""
        return self._address.encode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> tinker.SamplingClient:
        """Make a client from a handle, as `jax_client.SamplingClient.from_sampler_handle`."""
        return SamplingClient.from_sampler_handle(handle, api_key=api_key)

    def __reduce__(self) -> tuple[object, ...]:
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)


@functools.cache
def _tokenizer(path: str, kind: str) -> PreTrainedTokenizerBase:
    from jax_client.weights.read.source import ModelSource
    from jax_client.weights.read.tokenizer import read_tokenizer

    return read_tokenizer(ModelSource(name=path, path=Path(path), kind="gguf" if kind == "gguf" else "hf"))


class BackcompatSamplingClientFuture(ClientFuture[SamplingClient], SamplingClient):
    """The future of a SamplingClient, which can be used as the client at once, and pickled as it."""

    def __reduce__(self) -> tuple[object, ...]:
        return SamplingClient.__reduce__(self)


register_as_sdk_class(tinker.SamplingClient, SamplingClient)
register_as_sdk_class(tinker.BackcompatSamplingClientFuture, BackcompatSamplingClientFuture)


def open_sampling_client(
    session: Session, model_path: str | None, base_model: str | None, record_stability_info: bool
) -> BackcompatSamplingClientFuture:
    """Check the arguments in the call, then load the weights in the background.

    Raises:
        BadRequestError: not exactly one of the two is given, or the path is not of sampler weights.
    """
    from jax_client.runs.lifecycle.sampler_handle import base_sampler, checkpoint_sampler

    session.check_open()
    session.config.check_stability_info(record_stability_info)
    if model_path is None and base_model is None:
        raise BadRequestError("Either model_path or base_model must be provided.")
    if model_path is not None and base_model is not None:
        raise BadRequestError(
            f"both model_path {model_path!r} and base_model {base_model!r} were given; give one of them. "
            "A saved path knows its base model."
        )
    if model_path is not None:
        path = sampler_path(model_path, "create_sampling_client")
        loading = background(lambda: checkpoint_sampler(session, path), "sampler")
    else:
        name = base_model or ""
        if not isinstance(base_model, str) or not name.strip():
            raise BadRequestError(
                f"base_model is {base_model!r}, a name is required; RestClient().get_server_capabilities() lists them."
            )
        loading = background(lambda: base_sampler(session, name), "sampler")
    return BackcompatSamplingClientFuture(session.track(loading), SamplingClient)
