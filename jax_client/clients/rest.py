"""How are runs, checkpoints and sessions listed and deleted? From the state directory; no model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeVar

import tinker
from tinker import types

from jax_client.clients.futures import LocalFuture
from jax_client.clients.sdk_errors import StaysInProcess, register_as_sdk_class, sdk_errors, translate
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.runs import checks
from jax_client.runs.lifecycle.futures import background
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.listings import NOT_SERVED, Listings, check_page, destination_project, not_served
from jax_client.runs.paths import external_path
from jax_client.values import CheckpointKey

Scope = Literal["owned", "accessible"]
T = TypeVar("T")


@sdk_errors
class RestClient(StaysInProcess):
    """Client for the runs and checkpoints on disk. It needs no ServiceClient and never touches a device.

    Args:
        _holder: a session of this process, as `ServiceClient.create_rest_client` gives it.
        base_url: of a Tinker server: the SDK's own RestClient is returned.
        api_key: for `base_url`.
        config: its `state_dir` is read; the other settings do not matter here.
    """

    def __new__(
        cls,
        _holder: Session | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        config: EngineConfig | None = None,
    ) -> Any:
        """Return a client of this machine, or the SDK's for `base_url`."""
        if base_url is None:
            return super().__new__(cls)
        if config is not None:
            raise translate(BadRequestError("config sets up this process; leave it out with base_url."))
        return tinker.RestClient(base_url=base_url, api_key=api_key)

    def __init__(
        self,
        _holder: Session | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self._listings = Listings(_holder or Session(config))

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anyone."""

    def get_server_capabilities(self) -> tinker.APIFuture[types.GetServerCapabilitiesResponse]:
        """Give the models that are known on this machine; others load by their hub name."""
        return _future(self._listings.capabilities)

    def get_training_run(
        self, training_run_id: types.ModelID, access_scope: Scope = "owned"
    ) -> tinker.APIFuture[types.TrainingRun]:
        """Give a run and its newest checkpoints."""
        return _future(lambda: self._listings.training_run(training_run_id))

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: Scope = "owned"
    ) -> tinker.APIFuture[types.TrainingRun]:
        """Give the run that saved a checkpoint."""
        return self.get_training_run(CheckpointKey.parse(tinker_path).run_id, access_scope)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> tinker.APIFuture[types.WeightsInfoResponse]:
        """Give the base model and the LoRA configuration of a checkpoint."""
        key = CheckpointKey.parse(tinker_path)
        return _future(lambda: self._listings.weights_info(key))

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> tinker.APIFuture[types.TrainingRunsResponse]:
        """Give the runs, newest first."""
        check_page(limit, offset)
        return _future(lambda: self._listings.training_runs(limit, offset, project_id))

    def list_checkpoints(self, training_run_id: types.ModelID) -> tinker.APIFuture[types.CheckpointsListResponse]:
        """Give the checkpoints of a run, newest first."""
        return _future(lambda: self._listings.checkpoints(training_run_id))

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> tinker.APIFuture[types.CheckpointsListResponse]:
        """Give the checkpoints of all runs, newest first."""
        check_page(limit, offset)
        return _future(lambda: self._listings.all_checkpoints(limit, offset))

    def delete_checkpoint(self, training_run_id: types.ModelID, checkpoint_id: str) -> tinker.APIFuture[None]:
        """Delete a checkpoint, given as `weights/NAME` or `sampler_weights/NAME`."""
        return self._delete(CheckpointKey.of_run(training_run_id, checkpoint_id))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> tinker.APIFuture[None]:
        """Delete a checkpoint."""
        return self._delete(CheckpointKey.parse(tinker_path))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> tinker.APIFuture[None]:
        """Mark a checkpoint as public: a note in listings, since read access to the disk is enough to load it."""
        return self._set_public(tinker_path, True)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> tinker.APIFuture[None]:
        """Take back `publish_checkpoint_from_tinker_path`."""
        return self._set_public(tinker_path, False)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> tinker.APIFuture[None]:
        """Let a checkpoint end `ttl_seconds` from now; None keeps it for ever.

        Args:
            tinker_path: of any kind.
            ttl_seconds: an hour to ten years.
        """
        key, ttl = CheckpointKey.parse(tinker_path), checks.ttl(ttl_seconds)
        return _future(lambda: self._listings.set_ttl(key, ttl))

    def get_external_weights_urls(self, tinker_path: str) -> tinker.APIFuture[types.ExternalWeightsUrlsResponse]:
        """Give a file:// URL for each file of an export, by its name; they hold for as long as the export does.

        Args:
            tinker_path: of `save_weights_external`.
        """
        key = external_path(tinker_path, "get_external_weights_urls")
        return _future(lambda: self._listings.exported_urls(key))

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> tinker.APIFuture[str]:
        """Copy a checkpoint into a project, as the only one of a new run that has no client; no bytes are copied.

        Args:
            path: of any kind.
            destination_project_id: default `$TINKER_PROJECT_ID`.
            ttl_seconds: of the copy, an hour to ten years; None keeps it for ever.
            weights_access_token: not needed for checkpoints of this machine.

        Returns:
            The future of the copy's path.

        Raises:
            BadRequestError: no project is given, or the path or the lifetime is malformed.
        """
        project = destination_project(destination_project_id)
        source, ttl = CheckpointKey.parse(path), checks.ttl(ttl_seconds)
        return _future(lambda: self._listings.copy(source, project, ttl))

    def assign_session_project(self, session_id: str, project_id: str) -> tinker.APIFuture[None]:
        """Put all runs of a session, later ones included, into a project."""
        return _future(lambda: self._listings.assign_project(session_id, project_id))

    def get_session(self, session_id: str, access_scope: Scope = "owned") -> tinker.APIFuture[types.GetSessionResponse]:
        """Give a session's runs, and its samplers if it lives in this process."""
        return _future(lambda: self._listings.session(session_id))

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned"
    ) -> tinker.APIFuture[types.ListSessionsResponse]:
        """Give the ids of sessions: first those that only sample now, then those that trained, newest first."""
        check_page(limit, offset)
        return _future(lambda: self._listings.sessions(limit, offset))

    def get_sampler(self, sampler_id: str) -> tinker.APIFuture[types.GetSamplerResponse]:
        """Give the base model and the path of a sampler of this process."""
        return _future(lambda: self._listings.sampler(sampler_id))

    def _delete(self, key: CheckpointKey) -> LocalFuture[None]:
        return _future(lambda: self._listings.delete(key))

    def _set_public(self, tinker_path: str, public: bool) -> LocalFuture[None]:
        key = CheckpointKey.parse(tinker_path)
        return _future(lambda: self._listings.set_public(key, public))

    # The twins of the methods above, in the same order.

    async def get_training_run_async(
        self, training_run_id: types.ModelID, access_scope: Scope = "owned"
    ) -> types.TrainingRun:
        """Await `get_training_run`."""
        return await self.get_training_run(training_run_id, access_scope)

    async def get_training_run_by_tinker_path_async(
        self, tinker_path: str, access_scope: Scope = "owned"
    ) -> types.TrainingRun:
        """Await `get_training_run_by_tinker_path`."""
        return await self.get_training_run_by_tinker_path(tinker_path, access_scope)

    async def list_training_runs_async(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> types.TrainingRunsResponse:
        """Await `list_training_runs`."""
        return await self.list_training_runs(limit, offset, access_scope, project_id)

    async def list_checkpoints_async(self, training_run_id: types.ModelID) -> types.CheckpointsListResponse:
        """Await `list_checkpoints`."""
        return await self.list_checkpoints(training_run_id)

    async def list_user_checkpoints_async(self, limit: int = 100, offset: int = 0) -> types.CheckpointsListResponse:
        """Await `list_user_checkpoints`."""
        return await self.list_user_checkpoints(limit, offset)

    async def delete_checkpoint_async(self, training_run_id: types.ModelID, checkpoint_id: str) -> None:
        """Await `delete_checkpoint`."""
        return await self.delete_checkpoint(training_run_id, checkpoint_id)

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Await `delete_checkpoint_from_tinker_path`."""
        return await self.delete_checkpoint_from_tinker_path(tinker_path)

    async def publish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Await `publish_checkpoint_from_tinker_path`."""
        return await self.publish_checkpoint_from_tinker_path(tinker_path)

    async def unpublish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Await `unpublish_checkpoint_from_tinker_path`."""
        return await self.unpublish_checkpoint_from_tinker_path(tinker_path)

    async def set_checkpoint_ttl_from_tinker_path_async(self, tinker_path: str, ttl_seconds: int | None) -> None:
        """Await `set_checkpoint_ttl_from_tinker_path`."""
        return await self.set_checkpoint_ttl_from_tinker_path(tinker_path, ttl_seconds)

    async def get_external_weights_urls_async(self, tinker_path: str) -> types.ExternalWeightsUrlsResponse:
        """Await `get_external_weights_urls`."""
        return await self.get_external_weights_urls(tinker_path)

    async def copy_weights_async(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> str:
        """Await `copy_weights`."""
        return await self.copy_weights(
            path, destination_project_id, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token
        )

    async def assign_session_project_async(self, session_id: str, project_id: str) -> None:
        """Await `assign_session_project`."""
        return await self.assign_session_project(session_id, project_id)

    async def get_session_async(self, session_id: str, access_scope: Scope = "owned") -> types.GetSessionResponse:
        """Await `get_session`."""
        return await self.get_session(session_id, access_scope)

    async def list_sessions_async(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned"
    ) -> types.ListSessionsResponse:
        """Await `list_sessions`."""
        return await self.list_sessions(limit, offset, access_scope)

    async def get_sampler_async(self, sampler_id: str) -> types.GetSamplerResponse:
        """Await `get_sampler`."""
        return await self.get_sampler(sampler_id)


def _future(work: Callable[[], T]) -> LocalFuture[T]:
    return LocalFuture(background(work, "rest"))


def _refusal(name: str) -> Callable[..., object]:
    """Return a method with the SDK's signature that raises UnsupportedError."""
    template = getattr(tinker.RestClient, name)
    method_name = name.removesuffix("_async")

    def refuse(self: RestClient, *args: object, **kwargs: object) -> NoReturn:
        raise translate(not_served(method_name))

    async def refuse_async(self: RestClient, *args: object, **kwargs: object) -> NoReturn:
        raise translate(not_served(method_name))

    method: Any = refuse_async if inspect.iscoroutinefunction(inspect.unwrap(template)) else refuse
    method.__name__, method.__qualname__ = name, f"RestClient.{name}"
    method.__doc__ = f"Refuse: {NOT_SERVED[method_name]}."
    method.__signature__ = inspect.signature(template)
    return method


for _name in NOT_SERVED:
    for _method in (_name, f"{_name}_async"):
        if hasattr(tinker.RestClient, _method):
            setattr(RestClient, _method, _refusal(_method))

register_as_sdk_class(tinker.RestClient, RestClient)


class AdminClient:
    """The SDK's AdminClient for a `base_url`. Without one it is refused: this machine has no organisation.

    Raises:
        UnsupportedError: no `base_url`.
    """

    def __new__(cls, _holder: object = None, *, base_url: str | None = None, api_key: str | None = None) -> Any:
        """Return the SDK's client, or refuse."""
        if base_url is not None:
            return tinker.AdminClient(base_url=base_url, api_key=api_key)
        raise translate(
            UnsupportedError(
                "AdminClient (billing, audit log) is not served in-process: there is no organisation on this machine. "
                "Give base_url= for a Tinker server, or use RestClient for runs and checkpoints."
            )
        )


register_as_sdk_class(tinker.AdminClient, AdminClient)
