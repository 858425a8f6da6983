"""How are runs, checkpoints and sessions listed and deleted? From the state directory; no model is loaded."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import tinker
from tinker import types

from jax_client.clients.futures import LocalFuture
from jax_client.clients.sdk_errors import bind, register_as_sdk_class, sdk_errors
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, UnsupportedError
from jax_client.runs import checks
from jax_client.runs.lifecycle.futures import background
from jax_client.runs.lifecycle.session import Session, live_sessions
from jax_client.runs.paths import external_path
from jax_client.runs.results import api_records
from jax_client.values import CheckpointKey
from jax_client.weights.read.source import known_models, local_models, resolve

Scope = Literal["owned", "accessible"]


@sdk_errors
class RestClient:
    """Client for what is on disk. Needs no ServiceClient and never touches a device.

    Args:
        _holder: a session of this process, as `ServiceClient.create_rest_client` gives it.
        base_url: of a Tinker server: the SDK's own RestClient is returned.
        api_key: for `base_url`.
        config: of which only `state_dir` matters here.
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
            raise bind(BadRequestError("config sets up this process; leave it out with base_url."))
        return tinker.RestClient(base_url=base_url, api_key=api_key)

    def __init__(
        self,
        _holder: Session | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self._session = _holder or Session(config)

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anyone."""

    def get_server_capabilities(self) -> tinker.APIFuture[types.GetServerCapabilitiesResponse]:
        """Give the models that are known on this machine; others load by their hub name."""

        def capabilities() -> types.GetServerCapabilitiesResponse:
            local = set(local_models())
            return types.GetServerCapabilitiesResponse(
                supported_models=[_model(name, name in local) for name in known_models()]
            )

        return _future(capabilities)

    def get_training_run(
        self, training_run_id: types.ModelID, access_scope: Scope = "owned"
    ) -> tinker.APIFuture[types.TrainingRun]:
        """Give a run and its newest checkpoints."""
        return _future(lambda: self._run(training_run_id))

    async def get_training_run_async(
        self, training_run_id: types.ModelID, access_scope: Scope = "owned"
    ) -> types.TrainingRun:
        """Await `get_training_run`."""
        return await self.get_training_run(training_run_id, access_scope)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: Scope = "owned"
    ) -> tinker.APIFuture[types.TrainingRun]:
        """Give the run that saved a checkpoint."""
        return self.get_training_run(CheckpointKey.parse(tinker_path).run_id, access_scope)

    async def get_training_run_by_tinker_path_async(
        self, tinker_path: str, access_scope: Scope = "owned"
    ) -> types.TrainingRun:
        """Await `get_training_run_by_tinker_path`."""
        return await self.get_training_run_by_tinker_path(tinker_path, access_scope)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> tinker.APIFuture[types.WeightsInfoResponse]:
        """Give the base model and the LoRA configuration of a checkpoint."""
        path = CheckpointKey.parse(tinker_path)

        def info() -> types.WeightsInfoResponse:
            record = self._session.store.record(path)
            spec = api_records.saved_spec(record)
            return types.WeightsInfoResponse(
                base_model=record.metadata["base_model"],
                is_lora=True,
                lora_rank=spec.rank,
                train_unembed=spec.train_unembed,
                train_mlp=spec.train_mlp,
                train_attn=spec.train_attn,
            )

        return _future(info)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> tinker.APIFuture[types.TrainingRunsResponse]:
        """Give the runs, newest first."""
        _check_page(limit, offset)

        def runs() -> types.TrainingRunsResponse:
            known = [item for item in self._runs() if project_id in (None, item[1].get("project_id"))]
            store = self._session.store
            page = [api_records.training_run(run, fields, store.list(run)) for run, fields in known[offset:][:limit]]
            return types.TrainingRunsResponse(training_runs=page, cursor=_cursor(limit, offset, len(known)))

        return _future(runs)

    async def list_training_runs_async(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> types.TrainingRunsResponse:
        """Await `list_training_runs`."""
        return await self.list_training_runs(limit, offset, access_scope, project_id)

    def list_checkpoints(self, training_run_id: types.ModelID) -> tinker.APIFuture[types.CheckpointsListResponse]:
        """Give the checkpoints of a run, newest first."""

        def checkpoints() -> types.CheckpointsListResponse:
            self._session.store.run(training_run_id)
            return types.CheckpointsListResponse(checkpoints=self._checkpoints(training_run_id))

        return _future(checkpoints)

    async def list_checkpoints_async(self, training_run_id: types.ModelID) -> types.CheckpointsListResponse:
        """Await `list_checkpoints`."""
        return await self.list_checkpoints(training_run_id)

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> tinker.APIFuture[types.CheckpointsListResponse]:
        """Give the checkpoints of all runs, newest first."""
        _check_page(limit, offset)

        def checkpoints() -> types.CheckpointsListResponse:
            known = self._checkpoints(None)
            page = known[offset:][:limit]
            return types.CheckpointsListResponse(checkpoints=page, cursor=_cursor(limit, offset, len(known)))

        return _future(checkpoints)

    async def list_user_checkpoints_async(self, limit: int = 100, offset: int = 0) -> types.CheckpointsListResponse:
        """Await `list_user_checkpoints`."""
        return await self.list_user_checkpoints(limit, offset)

    def delete_checkpoint(self, training_run_id: types.ModelID, checkpoint_id: str) -> tinker.APIFuture[None]:
        """Delete a checkpoint, given as `weights/NAME` or `sampler_weights/NAME`."""
        return self._delete(CheckpointKey.of_run(training_run_id, checkpoint_id))

    async def delete_checkpoint_async(self, training_run_id: types.ModelID, checkpoint_id: str) -> None:
        """Await `delete_checkpoint`."""
        return await self.delete_checkpoint(training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> tinker.APIFuture[None]:
        """Delete a checkpoint."""
        return self._delete(CheckpointKey.parse(tinker_path))

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Await `delete_checkpoint_from_tinker_path`."""
        return await self.delete_checkpoint_from_tinker_path(tinker_path)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> tinker.APIFuture[None]:
        """Mark a checkpoint as public: a note in listings, since read access to the disk is enough to load it."""
        return self._set_public(tinker_path, True)

    async def publish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Await `publish_checkpoint_from_tinker_path`."""
        return await self.publish_checkpoint_from_tinker_path(tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> tinker.APIFuture[None]:
        """Take back `publish_checkpoint_from_tinker_path`."""
        return self._set_public(tinker_path, False)

    async def unpublish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Await `unpublish_checkpoint_from_tinker_path`."""
        return await self.unpublish_checkpoint_from_tinker_path(tinker_path)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> tinker.APIFuture[None]:
        """Let a checkpoint end `ttl_seconds` from now; None keeps it for ever.

        Args:
            tinker_path: of any kind.
            ttl_seconds: an hour to ten years.
        """
        path, ttl = CheckpointKey.parse(tinker_path), checks.ttl(ttl_seconds)

        def work() -> None:
            self._session.store.set_ttl(path, ttl)

        return _future(work)

    async def set_checkpoint_ttl_from_tinker_path_async(self, tinker_path: str, ttl_seconds: int | None) -> None:
        """Await `set_checkpoint_ttl_from_tinker_path`."""
        return await self.set_checkpoint_ttl_from_tinker_path(tinker_path, ttl_seconds)

    def get_external_weights_urls(self, tinker_path: str) -> tinker.APIFuture[types.ExternalWeightsUrlsResponse]:
        """Give a file:// URL for each file of an export, by its name; they hold for as long as the export does.

        Args:
            tinker_path: of `save_weights_external`.
        """
        path = external_path(tinker_path, "get_external_weights_urls")

        def urls() -> types.ExternalWeightsUrlsResponse:
            store = self._session.store
            found = store.exported_files(path)
            ends = store.record(path).expires_at
            return types.ExternalWeightsUrlsResponse(
                urls={name: file.as_uri() for name, file in found.items()},
                expires=datetime.max.replace(tzinfo=UTC) if ends is None else datetime.fromtimestamp(ends, UTC),
            )

        return _future(urls)

    async def get_external_weights_urls_async(self, tinker_path: str) -> types.ExternalWeightsUrlsResponse:
        """Await `get_external_weights_urls`."""
        return await self.get_external_weights_urls(tinker_path)

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
        project = destination_project_id or os.environ.get("TINKER_PROJECT_ID")
        if not project:
            raise BadRequestError("copy_weights: give destination_project_id, or set TINKER_PROJECT_ID.")
        source, ttl = CheckpointKey.parse(path), checks.ttl(ttl_seconds)
        return _future(lambda: str(api_records.copy_into_project(self._session.store, source, project, ttl)))

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

    def assign_session_project(self, session_id: str, project_id: str) -> tinker.APIFuture[None]:
        """Put every run of a session, and those that it will make, into a project."""

        def assign() -> None:
            runs = [(run, fields) for run, fields in self._runs() if fields["session_id"] == session_id]
            live = self._live().get(session_id)
            if live is None and not runs:
                raise _no_session(session_id)
            if live is not None:
                live.info = replace(live.info, project_id=project_id)
            for run, fields in runs:
                self._session.store.put_run(run, {**fields, "project_id": project_id})

        return _future(assign)

    async def assign_session_project_async(self, session_id: str, project_id: str) -> None:
        """Await `assign_session_project`."""
        return await self.assign_session_project(session_id, project_id)

    def get_session(self, session_id: str, access_scope: Scope = "owned") -> tinker.APIFuture[types.GetSessionResponse]:
        """Give a session's runs, and its samplers if it lives in this process."""

        def session() -> types.GetSessionResponse:
            runs = [(run, fields) for run, fields in self._runs() if fields["session_id"] == session_id]
            live = self._live().get(session_id)
            if live is None and not runs:
                raise _no_session(session_id)
            fields = runs[0][1] if runs else {}
            return types.GetSessionResponse(
                training_run_ids=[run for run, _ in runs],
                sampler_ids=list(live.samplers) if live else [],
                user_metadata=dict(live.info.user_metadata or {}) if live else fields.get("session_metadata"),
                display_name=live.info.display_name if live else fields.get("display_name"),
            )

        return _future(session)

    async def get_session_async(self, session_id: str, access_scope: Scope = "owned") -> types.GetSessionResponse:
        """Await `get_session`."""
        return await self.get_session(session_id, access_scope)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned"
    ) -> tinker.APIFuture[types.ListSessionsResponse]:
        """Give the ids of the sessions that trained something, newest first, after those that only sample now."""
        _check_page(limit, offset)

        def sessions() -> types.ListSessionsResponse:
            live = [key for key, session in self._live().items() if session.samplers]
            known = dict.fromkeys([*live, *(fields["session_id"] for _, fields in self._runs())])
            return types.ListSessionsResponse(sessions=list(known)[offset:][:limit])

        return _future(sessions)

    async def list_sessions_async(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned"
    ) -> types.ListSessionsResponse:
        """Await `list_sessions`."""
        return await self.list_sessions(limit, offset, access_scope)

    def get_sampler(self, sampler_id: str) -> tinker.APIFuture[types.GetSamplerResponse]:
        """Give what a sampler of this process serves."""

        def sampler() -> types.GetSamplerResponse:
            for session in self._live().values():
                if (info := session.samplers.get(sampler_id)) is not None:
                    return types.GetSamplerResponse(
                        sampler_id=sampler_id, base_model=info.base_model, model_path=info.model_path
                    )
            raise NotFoundError(f"there is no sampler {sampler_id!r} in this process; make one again from its path.")

        return _future(sampler)

    async def get_sampler_async(self, sampler_id: str) -> types.GetSamplerResponse:
        """Await `get_sampler`."""
        return await self.get_sampler(sampler_id)

    def _delete(self, key: CheckpointKey) -> LocalFuture[None]:
        def delete() -> None:
            store = self._session.store
            store.record(key)
            store.delete(key)

        return _future(delete)

    def _set_public(self, tinker_path: str, public: bool) -> LocalFuture[None]:
        path = CheckpointKey.parse(tinker_path)

        def work() -> None:
            self._session.store.set_public(path, public)

        return _future(work)

    def _run(self, run_id: str) -> types.TrainingRun:
        store = self._session.store
        return api_records.training_run(run_id, store.run(run_id), store.list(run_id))

    def _runs(self) -> list[tuple[str, dict[str, Any]]]:
        return sorted(self._session.store.runs(), key=lambda item: item[1]["created"], reverse=True)

    def _checkpoints(self, run_id: str | None) -> list[types.Checkpoint]:
        records = sorted(self._session.store.list(run_id), key=lambda record: record.created, reverse=True)
        return [api_records.checkpoint(record) for record in records]

    def _live(self) -> dict[str, Session]:
        home: Path = self._session.state_dir
        return {key: session for key, session in live_sessions.items() if session.state_dir == home}


def _no_session(session_id: str) -> NotFoundError:
    return NotFoundError(f"there is no session {session_id!r}; list_sessions() lists them.")


def _future(work: Callable[[], Any]) -> LocalFuture[Any]:
    return LocalFuture(background(work, "rest"))


def _model(name: str, local: bool) -> types.SupportedModel:
    # Imported here: reading a config needs the model registry, and with it jax.
    from jax_client.weights.read.load import read_config

    context = None
    if local:  # to resolve any other name is to download the model
        # A model that cannot be read is listed all the same: creating a client says what is wrong with it.
        with contextlib.suppress(JaxClientError, OSError):
            context = read_config(resolve(name)).max_context
    return types.SupportedModel(model_name=name, max_context_length=context, trainable=True, sampleable=True)


def _cursor(limit: int, offset: int, total: int) -> types.Cursor:
    return types.Cursor(limit=limit, offset=offset, total_count=total)


def _check_page(limit: Any, offset: Any) -> None:
    for field, value, least in (("limit", limit, 1), ("offset", offset, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadRequestError(f"{field} is {value!r}; give an integer of at least {least}.")


# In-process and on a server; the SDK answers `whoami` itself.
_REFUSED = {
    "export_session_trace": "sessions are not traced",
    "search_sessions": "use list_sessions",
    "whoami": "there are no accounts on this machine",
    "get_audit_log": "there is no organisation on this machine",
    "get_billing_usage": "nothing is billed on this machine",
    "get_current_checkpoint_storage_usage": "use list_user_checkpoints, which gives size_bytes",
}


def _refusal(name: str, reason: str) -> Callable[..., Any]:
    """Return a method with the SDK's signature that raises UnsupportedError."""
    template = getattr(tinker.RestClient, name)
    message = f"{name.removesuffix('_async')} is not served: {reason}."

    def refuse(self: RestClient, *args: Any, **kwargs: Any) -> Any:
        raise bind(UnsupportedError(message))

    async def refuse_async(self: RestClient, *args: Any, **kwargs: Any) -> Any:
        raise bind(UnsupportedError(message))

    method: Any = refuse_async if inspect.iscoroutinefunction(inspect.unwrap(template)) else refuse
    method.__name__, method.__qualname__ = name, f"RestClient.{name}"
    method.__doc__ = f"Refuse: {reason}."
    method.__signature__ = inspect.signature(template)
    return method


for _name, _reason in _REFUSED.items():
    for _method in (_name, f"{_name}_async"):
        if hasattr(tinker.RestClient, _method):
            setattr(RestClient, _method, _refusal(_method, _reason))

register_as_sdk_class(tinker.RestClient, RestClient)
