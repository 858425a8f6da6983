"""What does a user train with? A TrainingClient, whose requests take effect in the order of the calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import tinker
from tinker import types

from jax_client.clients.custom_loss import CustomCall, check_loss_type_input
from jax_client.clients.futures import ClientFuture, LocalFuture
from jax_client.clients.hints import NamesTheOwner
from jax_client.clients.sampling import (
    BackcompatSamplingClientFuture,
    SamplingClient,
    open_sampling_client,
)
from jax_client.clients.sdk_errors import StaysInProcess, register_as_sdk_class, sdk_errors, warn_caller
from jax_client.errors import BadRequestError
from jax_client.runs.lifecycle.run import Run
from jax_client.runs.sdk import RetryConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    LossFunction = Callable[[list[types.Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, Any]]]

logger = logging.getLogger(__name__)


@sdk_errors
class TrainingClient(StaysInProcess, NamesTheOwner):
    """Client for one LoRA adapter in training, made by `ServiceClient.create_lora_training_client`.

    Every request returns a future at once and takes effect in the order of the calls, so that `forward_backward`,
    `optim_step` and the next `forward_backward` can all be in flight. A call with a wrong argument raises and changes
    nothing. The `_async` twins give the future (`fut = await x_async(...)`, then `await fut`), as the SDK's do.

    Attributes:
        model_id: the training run, `SESSION:train:N`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.model_id: types.ModelID = run.run_id

    async def _ready(self) -> TrainingClient:
        return self

    def forward(
        self,
        data: list[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        """Compute logprobs and the loss, without a gradient. Arguments as `forward_backward`."""
        return LocalFuture(self._run.forward(data, loss_fn, loss_fn_config))

    def forward_backward(
        self,
        data: list[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        """Compute the loss, summed over tokens and datums, and add its gradient to the accumulated ones.

        Args:
            data: target i of a datum is scored by the model after token i; there is no shift.
            loss_fn: cross_entropy, importance_sampling, ppo, cispo, dro or gspo.
            loss_fn_config: the loss's settings.

        Returns:
            The future of `logprobs` per datum (float32, in nats, in the shape of its targets) and metrics.

        Raises:
            BadRequestError: a datum or a setting is wrong; the message has its index and field.
        """
        return LocalFuture(self._run.forward_backward(data, loss_fn, loss_fn_config))

    def forward_backward_custom(
        self,
        data: list[types.Datum],
        loss_fn: LossFunction | tinker.LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        """Add the gradient of a loss written in torch: one forward pass, your function, one backward pass.

        A failing function fails the future with its own exception; nothing is accumulated and the client stays usable.

        Args:
            data: as for cross_entropy; other keys of `loss_fn_inputs` reach the function only.
            loss_fn: `fn(data, logprobs) -> (loss, metrics)` with one leaf tensor of logprobs per datum, called on
                another thread, or a handle from `create_custom_loss`.
            loss_type_input: deprecated; only "logprobs".

        Returns:
            The future of an output whose `loss:sum` is your loss, with your metrics.

        Raises:
            ImportError: torch is not installed.
            BadRequestError: as `forward_backward`.
        """
        check_loss_type_input(loss_type_input)
        call = CustomCall(data, loss_fn, self._run.session.session_id)
        return LocalFuture(self._run.forward_backward_custom(data, call.loss, call.metrics))

    def optim_step(
        self, optim_params: types.OptimParams | None = None, *, adam_params: types.AdamParams | None = None
    ) -> tinker.APIFuture[types.OptimStepResponse]:
        """Take one AdamW step with the accumulated gradients, as torch.optim.AdamW does, and clear them.

        Args:
            optim_params: AdamParams.
            adam_params: the older name of the same argument.

        A step that would leave float32's range fails, through the future, and changes nothing: the error names the
        setting, and the gradients stay for another call.

        Raises:
            BadRequestError: both, or a value out of its range.
            BadTypeError: neither, or another type.
        """
        return LocalFuture(self._run.optim_step(optim_params, adam_params))

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> tinker.APIFuture[types.SaveWeightsResponse]:
        """Save weights and optimizer state; the future resolves when they are durable.

        Args:
            name: becomes `tinker://RUN/weights/NAME`.
            ttl_seconds: delete it after this time; None keeps it.
            overwrite: replace a checkpoint of this name, which otherwise fails the future.
            user_metadata: kept with it.
        """
        return LocalFuture(self._run.save("weights", name, ttl_seconds, user_metadata, overwrite))

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> tinker.APIFuture[types.LoadWeightsResponse]:
        """Load weights into this client, with a fresh optimizer; accumulated gradients are dropped.

        Args:
            path: of `save_state`, from any run of the same base model and LoRA configuration.
            weights_access_token: not needed for checkpoints of this machine.
        """
        note_access_token(weights_access_token)
        return LocalFuture(self._run.load(path, optimizer=False, method="load_state"))

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> tinker.APIFuture[types.LoadWeightsResponse]:
        """Load weights and optimizer state into this client. Arguments as `load_state`."""
        note_access_token(weights_access_token)
        return LocalFuture(self._run.load(path, optimizer=True, method="load_state_with_optimizer"))

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> tinker.APIFuture[types.SaveWeightsForSamplerResponse]:
        """Save weights to sample from, as `tinker://RUN/sampler_weights/NAME`. Arguments as `save_state`."""
        return LocalFuture(self._run.save("sampler_weights", name, ttl_seconds, user_metadata))

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> tinker.APIFuture[types.SaveWeightsExternalResponse]:
        """Save the adapter as peft does, as `tinker://RUN/external_weights/NAME`.

        `RestClient.get_external_weights_urls` says where its files are: adapter_config.json and
        adapter_model.safetensors, which `peft.PeftModel.from_pretrained`, vLLM and SGLang load. Before the future
        resolves the files are read back and compared with the live adapter.

        Args:
            name: of the export.
            ttl_seconds: delete it after this time; None keeps it.
            age_encryption_recipients: X25519 public keys of age ("age1..."), for which every file is encrypted as
                NAME.age; None leaves them readable.

        Raises:
            BadRequestError: a recipient is no such key.
        """
        return LocalFuture(self._run.export(name, ttl_seconds, age_encryption_recipients))

    def get_info(self) -> types.GetInfoResponse:
        """Return the base model's name and architecture, and the rank."""
        return self._run.info()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base model's tokenizer."""
        return self._run.model_ref.model.tokenizer()

    def get_console_url(self) -> str:
        """Return where the run's checkpoints live; there is no web console in-process."""
        return self._run.session.state_dir.as_uri()

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anyone."""

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> BackcompatSamplingClientFuture:
        """Make a sampling client from a path of `save_weights_for_sampler`.

        Args:
            model_path: `tinker://RUN/sampler_weights/NAME`.
            retry_config: not needed in-process.
            record_stability_info: must be False, unless `EngineConfig.map_loss` has a loss for stable_reinforce.
        """
        return open_sampling_client(self._run.session, model_path, None, record_stability_info)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
    ) -> BackcompatSamplingClientFuture:
        """Make a sampling client of the weights as they are after the requests so far; nothing is written to disk.

        Args:
            name: deprecated, without effect.
            retry_config: not needed in-process.
            record_stability_info: must be False, unless `EngineConfig.map_loss` has a loss for stable_reinforce.
            kind: "snapshot" keeps these weights; all "inflight" clients of this run follow the newest ones published
                by such a call.
        """
        if name is not None:
            warn_caller(
                "the name given to save_weights_and_get_sampling_client has no effect, its weights are not kept; use "
                "save_weights_for_sampler(name) and create_sampling_client(model_path) to keep them.",
                DeprecationWarning,
            )
        self._run.session.config.check_stability_info(record_stability_info)
        if kind not in ("snapshot", "inflight"):
            raise BadRequestError(f"kind is {kind!r}; choose 'snapshot' or 'inflight'.")
        return BackcompatSamplingClientFuture(self._run.sampler(kind), SamplingClient)

    # The twins of the methods above, in the same order.

    async def forward_async(
        self,
        data: list[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        """Give the future of `forward`."""
        return (await self._ready()).forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self,
        data: list[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        """Give the future of `forward_backward`."""
        return (await self._ready()).forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self,
        data: list[types.Datum],
        loss_fn: LossFunction | tinker.LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        """Give the future of `forward_backward_custom`."""
        return (await self._ready()).forward_backward_custom(data, loss_fn, loss_type_input=loss_type_input)

    async def optim_step_async(
        self, optim_params: types.OptimParams | None = None, *, adam_params: types.AdamParams | None = None
    ) -> tinker.APIFuture[types.OptimStepResponse]:
        """Give the future of `optim_step`."""
        return (await self._ready()).optim_step(optim_params, adam_params=adam_params)

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> tinker.APIFuture[types.SaveWeightsResponse]:
        """Give the future of `save_state`."""
        return (await self._ready()).save_state(name, ttl_seconds, overwrite, user_metadata)

    async def load_state_async(
        self, path: str, weights_access_token: str | None = None
    ) -> tinker.APIFuture[types.LoadWeightsResponse]:
        """Give the future of `load_state`."""
        return (await self._ready()).load_state(path, weights_access_token)

    async def load_state_with_optimizer_async(
        self, path: str, weights_access_token: str | None = None
    ) -> tinker.APIFuture[types.LoadWeightsResponse]:
        """Give the future of `load_state_with_optimizer`."""
        return (await self._ready()).load_state_with_optimizer(path, weights_access_token)

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> tinker.APIFuture[types.SaveWeightsForSamplerResponse]:
        """Give the future of `save_weights_for_sampler`."""
        return (await self._ready()).save_weights_for_sampler(name, ttl_seconds, user_metadata)

    async def save_weights_external_async(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> tinker.APIFuture[types.SaveWeightsExternalResponse]:
        """Give the future of `save_weights_external`."""
        return (await self._ready()).save_weights_external(name, ttl_seconds, age_encryption_recipients)

    async def get_info_async(self) -> types.GetInfoResponse:
        """Return `get_info()`."""
        return (await self._ready()).get_info()

    async def create_sampling_client_async(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """Await `create_sampling_client`: gives the client."""
        return await (await self._ready()).create_sampling_client(model_path, retry_config, record_stability_info)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """Await `save_weights_and_get_sampling_client`: gives the client."""
        client = await self._ready()
        return await client.save_weights_and_get_sampling_client(name, retry_config, record_stability_info, kind)


class BackcompatTrainingClientFuture(ClientFuture[TrainingClient], TrainingClient):
    """The future of a TrainingClient, which can be used as the client at once."""


register_as_sdk_class(tinker.TrainingClient, TrainingClient)
register_as_sdk_class(tinker.BackcompatTrainingClientFuture, BackcompatTrainingClientFuture)


def note_access_token(weights_access_token: str | None) -> None:
    """Warn that a token is not used."""
    if weights_access_token is not None:
        logger.warning("weights_access_token is not used: checkpoints of this machine need none.")
