"""Where does a user begin? With a ServiceClient, which makes the training and sampling clients of one session."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal, Self

import tinker
from tinker import types

from jax_client import torch_bridge
from jax_client.clients.custom_loss import register
from jax_client.clients.futures import LocalFuture
from jax_client.clients.hints import NamesTheOwner
from jax_client.clients.rest import RestClient
from jax_client.clients.sampling import BackcompatSamplingClientFuture, SamplingClient, open_sampling_client
from jax_client.clients.sdk_errors import StaysInProcess, register_as_sdk_class, sdk_errors, translate, warn_caller
from jax_client.clients.training import BackcompatTrainingClientFuture, TrainingClient, note_access_token
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, BadTypeError
from jax_client.host.program import error_in_words, program_name
from jax_client.runs import checks, progress
from jax_client.runs.lifecycle import autosave
from jax_client.runs.lifecycle.base_models import BaseModels
from jax_client.runs.lifecycle.futures import background
from jax_client.runs.lifecycle.run import create_run, resume_run
from jax_client.runs.lifecycle.session import Session, SessionInfo
from jax_client.runs.paths import training_path
from jax_client.runs.sdk import RetryConfig, trace_loss

logger = logging.getLogger(__name__)


@sdk_errors
class ServiceClient(StaysInProcess, NamesTheOwner):
    """The entry point: makes training and sampling clients on the devices of this machine.

    Constructing it does no work; models are loaded in the background by the first client that needs them, once per
    process. As a context manager it closes its session at the end of the block.

    Args:
        user_metadata: kept with every run of this session.
        project_id: kept with every run, default `$TINKER_PROJECT_ID`.
        display_name: kept with every run.
        base_url: of a Tinker server: the SDK's own ServiceClient for that URL is returned. Without this argument the
            work is done in this process, whatever the environment says.
        api_key: for `base_url`; not needed in-process.
        default_headers_overrides: for `base_url`; not used in-process.
        config: engine settings.
        _models: for this package's tests, whose base models need no device; None shares those of the process.

    Raises:
        BadRequestError: `config` together with `base_url`; metadata that are not strings.
    """

    def __new__(
        cls,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        config: EngineConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a client of this process, or the SDK's for `base_url`."""
        if base_url is None:
            return super().__new__(cls)
        if config is not None:
            raise translate(BadRequestError("config sets up the engine of this process; leave it out with base_url."))
        return tinker.ServiceClient(
            user_metadata,
            project_id,
            display_name=display_name,
            base_url=base_url,
            api_key=api_key,
            default_headers_overrides=default_headers_overrides,
            **kwargs,
        )

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        config: EngineConfig | None = None,
        _models: BaseModels | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            warn_caller(f"ServiceClient ignores {', '.join(sorted(kwargs))}.", FutureWarning)
        if config is not None and not isinstance(config, EngineConfig):
            raise BadTypeError(f"config is {type(config).__name__}; give a jax_client.EngineConfig.")
        if api_key is not None or default_headers_overrides is not None:
            logger.info("api_key and default_headers_overrides are not used in-process; they belong to base_url.")
        info = SessionInfo(
            user_metadata=checks.user_metadata_or_none(user_metadata),
            project_id=checks.text_or_none("project_id", project_id or os.environ.get("TINKER_PROJECT_ID") or None),
            display_name=checks.text_or_none("display_name", display_name),
            script=program_name(),
        )
        self._session = Session(config, info, models=_models, tells=progress.wanted(config or EngineConfig()))
        self._process = os.getpid()
        if self._session.config.autosave_minutes is not None:
            autosave.handle_sigterm()

    def __enter__(self) -> Self:
        self._session.check_open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.close("success").result()
        else:
            status = "errored" if issubclass(exc_type, Exception) else "interrupted"
            self.close(status, None if exc_value is None else error_in_words(exc_value)).result()

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> BackcompatTrainingClientFuture:
        """Make a fresh LoRA adapter to train.

        Args:
            base_model: a hub name, a directory, or a GGUF file.
            rank: 1 to 512.
            seed: of the initial weights; None draws one.
            train_mlp: adapt gate, up and down.
            train_attn: adapt q, k, v and o.
            train_unembed: adapt the output projection.
            user_metadata: kept with the run.
            optimizer: AdamOptimizerConfig or None; others are refused.

        Returns:
            The future of the client, usable as the client itself.
        """
        self._session.check_open()
        spec = checks.lora_spec(base_model, rank, seed, train_mlp, train_attn, train_unembed)
        checks.refuse_optimizer(optimizer)
        metadata = checks.user_metadata_or_none(user_metadata)
        session, run_id = self._session, self._session.new_id("train")
        creating = background(lambda: create_run(session, run_id, base_model, spec, metadata), "create")
        return BackcompatTrainingClientFuture(session.track(creating), TrainingClient)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> BackcompatTrainingClientFuture:
        """Make a new run from saved weights, with the checkpoint's configuration and a fresh optimizer.

        Args:
            path: of `save_state`.
            base_model: another name of the same weights, None takes the checkpoint's.
            user_metadata: kept with the run, None takes the saved run's.
            weights_access_token: not needed for checkpoints of this machine.
            optimizer: AdamOptimizerConfig or None; others are refused.
        """
        checks.refuse_optimizer(optimizer)
        method = "create_training_client_from_state"
        return self._resume(path, base_model, user_metadata, weights_access_token, optimizer=False, method=method)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> BackcompatTrainingClientFuture:
        """Make a new run that continues exactly where `save_state` was called, optimizer included.

        Arguments as `create_training_client_from_state`.
        """
        method = "create_training_client_from_state_with_optimizer"
        return self._resume(path, base_model, user_metadata, weights_access_token, optimizer=True, method=method)

    def _resume(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        token: str | None,
        *,
        optimizer: bool,
        method: str,
    ) -> BackcompatTrainingClientFuture:
        self._session.check_open()
        note_access_token(token)
        saved, metadata = training_path(path, method), checks.user_metadata_or_none(user_metadata)
        if base_model is not None and not (isinstance(base_model, str) and base_model.strip()):
            raise BadRequestError(f"base_model is {base_model!r}; give a name, or None for the checkpoint's own.")
        session, run_id = self._session, self._session.new_id("train")
        creating = background(
            lambda: resume_run(session, run_id, saved, base_model, metadata, optimizer=optimizer), "resume"
        )
        return BackcompatTrainingClientFuture(session.track(creating), TrainingClient)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> BackcompatSamplingClientFuture:
        """Make a client to sample from saved weights or from a base model; give one of the two.

        Args:
            model_path: `tinker://RUN/sampler_weights/NAME`, of `save_weights_for_sampler`.
            base_model: a hub name, a directory, or a GGUF file.
            retry_config: not needed in-process.
            record_stability_info: must be False, unless `EngineConfig.map_loss` has a loss for stable_reinforce.
        """
        return open_sampling_client(self._session, model_path, base_model, record_stability_info)

    def create_custom_loss(
        self, fn: tinker.PerDatumLossFn, input_ranks: Mapping[str, types.CustomLossInputRank]
    ) -> tinker.APIFuture[tinker.LossHandle]:
        """Trace a per-datum torch loss for `forward_backward_custom`; it runs on this machine.

        Args:
            fn: `fn(logprobs, **loss_fn_inputs) -> (loss, {"custom/NAME:sum" or ":mean": tensor})`.
            input_ranks: the rank of each parameter, `logprobs` included.

        Raises:
            ImportError: torch is not installed.
            ValueError: torch.fx cannot trace it, or this session has the same loss already.
        """
        self._session.check_open()
        torch_bridge.require_torch()
        handle = register(trace_loss(fn, input_ranks, self._session.session_id), self._session.loss_keys)
        return LocalFuture.of(handle)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> tinker.APIFuture[str]:
        """Copy a checkpoint into this client's project. Arguments as `RestClient.copy_weights`."""
        return self.create_rest_client().copy_weights(
            path, self._session.info.project_id, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token
        )

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """Return the models that are known on this machine; others load by their hub name."""
        return self.create_rest_client().get_server_capabilities().result()

    def create_rest_client(self) -> RestClient:
        """Return a client for listing and deleting runs and checkpoints of this session's state directory."""
        self._session.check_open()
        return RestClient(self._session)

    def describe(self) -> dict[str, Any]:
        """Return what "auto" chose and what is loaded: model, mesh, dtype, memory by kind, compiled programs.

        `engines` has one entry for each model that has finished loading; the newest one's are also at the top level.
        """
        return self._session.describe()

    def warmup(
        self,
        lengths: Sequence[int],
        *,
        base_model: str,
        rank: int = 32,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        targets_per_position: int = 1,
        sampling: bool = False,
    ) -> tinker.APIFuture[list[dict[str, Any]]]:
        """Compile ahead the programs of `forward_backward` over data of these lengths, and of `optim_step`.

        Not in the SDK. Programs are kept between processes, so this pays once per machine and setting. Other clients'
        requests continue meanwhile.

        Args:
            lengths: tokens of the datums of a typical call, such as `[len(tokens) for tokens in first_batch]`.
            base_model: as in `create_lora_training_client`, like the arguments after it.
            rank: of the adapter.
            train_mlp: adapt gate, up and down.
            train_attn: adapt q, k, v and o.
            train_unembed: adapt the output projection.
            targets_per_position: K of `[N, K]` targets.
            sampling: compile what sampling from such an adapter needs, too; its cache is made for that.

        Returns:
            The future of the records of these programs, in the form of `describe()["compiled"]`.
        """
        self._session.check_open()
        spec = checks.lora_spec(base_model, rank, 0, train_mlp, train_attn, train_unembed)
        sizes, width = checks.warmup_lengths(lengths, targets_per_position)
        session = self._session

        def work() -> list[dict[str, Any]]:
            engine = session.base_model(base_model).result().model.engine
            if max(sizes) > (most := engine.model.max_context):
                raise BadRequestError(
                    f"lengths holds {max(sizes)}, but the model's context is {most} tokens; leave it out."
                )
            return [asdict(record) for record in engine.warmup(spec, sizes, width, sampling=bool(sampling)).result()]

        return LocalFuture(session.track(background(work, "warmup")))

    def get_console_url(self) -> str:
        """Return where this session's checkpoints live; there is no web console in-process."""
        return self._session.state_dir.as_uri()

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anyone."""

    def close(
        self, status: Literal["success", "errored", "interrupted"], detail: str | None = None
    ) -> tinker.APIFuture[None]:
        """Finish the requests in flight, then unload the models. Later calls raise; closing again does nothing.

        In a fork of the process that made the client, closing does nothing either.

        Args:
            status: "success", "errored" or "interrupted".
            detail: shown where the session is used later.
        """
        if status not in ("success", "errored", "interrupted"):
            raise BadRequestError(f"status is {status!r}; choose 'success', 'errored' or 'interrupted'.")
        if os.getpid() != self._process:  # its requests, models and runs are the parent's to finish
            return LocalFuture.of(None)
        return LocalFuture(self._session.close(status, detail))

    # The twins of the methods above, in the same order.

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Await `create_lora_training_client`: gives the client."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Await `create_training_client_from_state`: gives the client."""
        return await self.create_training_client_from_state(
            path, base_model, user_metadata, weights_access_token, optimizer
        )

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Await `create_training_client_from_state_with_optimizer`: gives the client."""
        return await self.create_training_client_from_state_with_optimizer(
            path, base_model, user_metadata, weights_access_token
        )

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Await `create_sampling_client`: gives the client."""
        return await self.create_sampling_client(model_path, base_model, retry_config, record_stability_info)

    async def get_server_capabilities_async(self) -> types.GetServerCapabilitiesResponse:
        """Return `get_server_capabilities()`."""
        return await self.create_rest_client().get_server_capabilities()


register_as_sdk_class(tinker.ServiceClient, ServiceClient)
