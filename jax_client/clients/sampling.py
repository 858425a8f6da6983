"""What does a user sample with?"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tinker
from tinker import types

from jax_client.clients.binding import sdk_errors, stands_for
from jax_client.clients.futures import ClientFuture, LocalFuture
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.runs.catalogue import lasting_name
from jax_client.runs.futures import background
from jax_client.runs.paths import sampler_path
from jax_client.runs.sampler import Sampler, base_sampler, checkpoint_sampler
from jax_client.runs.session import Session, state_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@sdk_errors
class SamplingClient:
    """Client for text generation, from a base model or from trained weights.

    Made by `ServiceClient.create_sampling_client` or `TrainingClient.save_weights_and_get_sampling_client`. One made
    from a saved path or a base model can be pickled: the copy loads the weights when it is first used.

    Args:
        sampler: the loaded weights, or None to load them from `origin` on first use.
        origin: where the weights can be found again, None for weights that were never saved.
    """

    def __init__(self, sampler: Sampler | None, origin: Mapping[str, Any] | None) -> None:
        self._loaded = sampler
        self._origin = origin
        self._lock = threading.Lock()

    @property
    def _sampler(self) -> Sampler:
        with self._lock:
            if self._loaded is None:
                self._loaded = _open(self._origin or {})
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
    ) -> tinker.APIFuture[types.SampleResponse]:
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
        return LocalFuture(
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
        """Await `sample`: gives the response, not a future of it."""
        client = await self._ready()
        return await client.sample(
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

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> tinker.APIFuture[list[float | None]]:
        """Score a prompt: log p of each token given those before it, in nats; None where there is none.

        Args:
            prompt: tokens to score.
            prompt_logprobs_last_n: score only the last n.
        """
        return LocalFuture(self._sampler.compute_logprobs(prompt, prompt_logprobs_last_n))

    async def compute_logprobs_async(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> list[float | None]:
        """Await `compute_logprobs`: gives the list, not a future of it."""
        return await (await self._ready()).compute_logprobs(prompt, prompt_logprobs_last_n)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base model's tokenizer."""
        return self._sampler.lease.model.tokenizer()

    def get_base_model(self) -> str:
        """Return the base model's name."""
        if self._loaded is None and self._origin is not None:
            return self._origin["base_model"]
        return self._sampler.lease.name

    async def get_base_model_async(self) -> str:
        """Return the base model's name."""
        return (await self._ready()).get_base_model()

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anyone."""

    def on_queue_state_change(self, queue_state: Any, queue_state_reason: str | None) -> None:
        """Ignore the queue states of a hosted service; there are none in-process."""

    def get_sampler_handle(self) -> str:
        """Return a string from which `from_sampler_handle` makes this client again, in any process of this machine.

        Raises:
            UnsupportedError: the weights were never saved.
        """
        if self._origin is None:
            raise UnsupportedError(
                "this sampler's weights exist only in this process, so it cannot be pickled or handed to another one. "
                "Use save_weights_for_sampler(name) and create_sampling_client(model_path)."
            )
        return base64.urlsafe_b64encode(json.dumps(self._origin).encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """Make a client from a handle. Loads nothing: the weights are loaded by the first request.

        Args:
            handle: of `get_sampler_handle`.
            api_key: not needed in-process.
        """
        try:
            origin = json.loads(base64.urlsafe_b64decode(handle))
            EngineConfig(**origin["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequestError(f"not a sampler handle ({error}); take one from get_sampler_handle().") from error
        return SamplingClient(None, origin)

    def __reduce__(self) -> tuple[Any, ...]:
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)

    def __copy__(self) -> SamplingClient:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplingClient:
        return self


class BackcompatSamplingClientFuture(ClientFuture[SamplingClient], SamplingClient):
    """The future of a SamplingClient, which can be used as the client at once."""


stands_for(tinker.SamplingClient, SamplingClient)
stands_for(tinker.BackcompatSamplingClientFuture, BackcompatSamplingClientFuture)


def refuse_stability_info(record_stability_info: bool) -> None:
    """Raise UnsupportedError if stability information was asked for: its loss is not public."""
    if record_stability_info:
        raise UnsupportedError(
            "record_stability_info=True is not supported: the stable_reinforce loss is not public. Leave it out."
        )


def open_sampling_client(
    session: Session, model_path: str | None, base_model: str | None, record_stability_info: bool
) -> BackcompatSamplingClientFuture:
    """Check the arguments in the call, then load the weights in the background.

    Raises:
        BadRequestError: not exactly one of the two is given, or the path is not one of sampler weights.
    """
    session.check_open()
    refuse_stability_info(record_stability_info)
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

    def client(sampler: Sampler) -> SamplingClient:
        return SamplingClient(sampler, _origin(session.config, model_path, sampler.lease.name))

    return BackcompatSamplingClientFuture(session.track(loading), client)


def _origin(config: EngineConfig, model_path: str | None, base_model: str) -> dict[str, Any]:
    cache = config.compilation_cache_dir
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {
        "mesh": dict(config.mesh) if isinstance(config.mesh, Mapping) else config.mesh,
        "state_dir": str(state_dir(config)),
        "compilation_cache_dir": None if cache is None else str(cache),
    }
    return {
        "model_path": model_path,
        "base_model": base_model,
        "source": lasting_name(base_model),
        "config": settings,
    }


@functools.cache
def _session(config: str) -> Session:
    """One session per engine configuration for all clients that came into this process as handles."""
    return Session(EngineConfig(**json.loads(config)))


def _open(origin: Mapping[str, Any]) -> Sampler:
    session = _session(json.dumps(origin["config"], sort_keys=True))
    if origin["model_path"] is None:
        return base_sampler(session, origin["source"])
    return checkpoint_sampler(session, sampler_path(origin["model_path"], "create_sampling_client"))
