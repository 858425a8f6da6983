"""Which runs, checkpoints and sessions are there? They are read from the state directory; no model is loaded.

`Listings` answers in the API's types, for the clients of this process and for the server. Every method may wait for the
disk.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinker import types

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, UnsupportedError, shown
from jax_client.runs import checks
from jax_client.runs.lifecycle.session import Session, live_sessions
from jax_client.runs.results import api_records
from jax_client.values import CheckpointKey, Owner
from jax_client.weights.read.source import known_models, local_models, resolve

# Methods of the SDK's RestClient that only a hosted service can answer, each with the reason. The SDK answers `whoami`
# itself.
NOT_SERVED = {
    "export_session_trace": "sessions are not traced",
    "search_sessions": "use list_sessions",
    "whoami": "there are no accounts on this machine",
    "get_audit_log": "there is no organisation on this machine",
    "get_billing_usage": "nothing is billed on this machine",
    "get_current_checkpoint_storage_usage": "use list_user_checkpoints, which gives size_bytes",
}


class Listings:
    """The records of a state directory; with an owner, its own.

    Args:
        session: a session with that state directory, and that owner.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def owner(self) -> Owner | None:
        """Whose records these are, None for all."""
        return self._session.owner

    def capabilities(self) -> types.GetServerCapabilitiesResponse:
        """Return the models that are known on this machine; others load by their hub name."""
        local = set(local_models())
        models = [_supported_model(name, name in local) for name in known_models()]
        return types.GetServerCapabilitiesResponse(supported_models=models)

    def training_run(self, run_id: str) -> types.TrainingRun:
        """Return a run and its newest checkpoints. Raises NotFoundError."""
        store = self._session.store
        return api_records.training_run(run_id, store.run(run_id), store.list(run_id))

    def training_runs(self, limit: int, offset: int, project_id: str | None) -> types.TrainingRunsResponse:
        """Return a page of the runs of a project, or of all, the newest first."""
        runs = [item for item in self._runs() if project_id in (None, item[1].get("project_id"))]
        store = self._session.store
        page = [api_records.training_run(run, fields, store.list(run)) for run, fields in runs[offset:][:limit]]
        return types.TrainingRunsResponse(training_runs=page, cursor=_cursor(limit, offset, len(runs)))

    def has_run(self, run_id: str) -> bool:
        """Return whether a run is not another owner's."""
        return self._session.store.has_run(run_id)

    def run_ids(self) -> set[str] | None:
        """Return the runs of the owner, None where there is no owner, for all."""
        return None if self._session.owner is None else {run for run, _ in self._session.store.runs()}

    def checkpoints(self, run_id: str) -> types.CheckpointsListResponse:
        """Return the checkpoints of a run, the newest first. Raises NotFoundError."""
        self._session.store.run(run_id)
        return types.CheckpointsListResponse(checkpoints=self._checkpoints(run_id))

    def all_checkpoints(self, limit: int, offset: int) -> types.CheckpointsListResponse:
        """Return a page of the checkpoints of all runs, the newest first."""
        known = self._checkpoints(None)
        page = known[offset:][:limit]
        return types.CheckpointsListResponse(checkpoints=page, cursor=_cursor(limit, offset, len(known)))

    def weights_info(self, key: CheckpointKey) -> types.WeightsInfoResponse:
        """Return the base model and the LoRA configuration of a checkpoint. Raises NotFoundError."""
        record = self._session.store.record(key)
        spec = api_records.saved_spec(record)
        return types.WeightsInfoResponse(
            base_model=api_records.base_model(record.metadata),
            is_lora=True,
            lora_rank=spec.rank,
            train_unembed=spec.train_unembed,
            train_mlp=spec.train_mlp,
            train_attn=spec.train_attn,
        )

    def delete(self, key: CheckpointKey) -> None:
        """Delete a checkpoint. Raises NotFoundError."""
        self._session.store.record(key)
        self._session.store.delete(key)

    def set_public(self, key: CheckpointKey, public: bool) -> None:
        """Mark a checkpoint as public or not. Raises NotFoundError."""
        self._session.store.set_public(key, public)

    def set_ttl(self, key: CheckpointKey, ttl_seconds: int | None) -> None:
        """Let a checkpoint end `ttl_seconds` from now; None keeps it. Raises NotFoundError."""
        self._session.store.set_ttl(key, ttl_seconds)

    def exported_urls(self, key: CheckpointKey) -> types.ExternalWeightsUrlsResponse:
        """Return a file:// URL for each file of an export. Raises NotFoundError."""
        files, expires_at = self.exported_files(key)
        return types.ExternalWeightsUrlsResponse(
            urls={name: file.as_uri() for name, file in files.items()},
            expires=datetime.max.replace(tzinfo=UTC) if expires_at is None else datetime.fromtimestamp(expires_at, UTC),
        )

    def exported_files(self, key: CheckpointKey) -> tuple[dict[str, Path], float | None]:
        """Return the files of an export, compared with their hashes, and when it ends. Raises NotFoundError."""
        store = self._session.store
        return store.exported_files(key), store.record(key).expires_at

    def exported_file(self, key: CheckpointKey, name: str) -> Path:
        """Return where a file of an export lies. Raises NotFoundError."""
        return self._session.store.exported_file(key, name)

    def copy(self, source: CheckpointKey, project_id: str, ttl_seconds: int | None) -> str:
        """Copy a checkpoint into a project and return the copy's path. Raises NotFoundError."""
        return str(api_records.copy_into_project(self._session.store, source, project_id, ttl_seconds))

    def assign_project(self, session_id: str, project_id: str) -> None:
        """Put every run of a session, and those that it will make, into a project. Raises NotFoundError."""
        project_id = checks.text_or_none("project_id", project_id) or ""
        runs, live = self._session_runs(session_id)
        if live is not None:
            live.info = replace(live.info, project_id=project_id)
        for run, _ in runs:
            self._session.store.change_run(run, project_id=project_id)

    def session(self, session_id: str) -> types.GetSessionResponse:
        """Return a session's runs, and its samplers if it lives in this process. Raises NotFoundError."""
        runs, live = self._session_runs(session_id)
        fields = runs[0][1] if runs else {}
        return types.GetSessionResponse(
            training_run_ids=[run for run, _ in runs],
            sampler_ids=list(live.samplers) if live else [],
            user_metadata=dict(live.info.user_metadata or {}) if live else fields.get("session_metadata"),
            display_name=live.info.display_name if live else fields.get("display_name"),
        )

    def sessions(self, limit: int, offset: int) -> types.ListSessionsResponse:
        """Return a page of the ids of sessions that trained, newest first, after those that only sample now."""
        sampling = [session_id for session_id, session in self._live().items() if session.samplers]
        known = dict.fromkeys([*sampling, *(fields["session_id"] for _, fields in self._runs())])
        return types.ListSessionsResponse(sessions=list(known)[offset:][:limit])

    def sampler(self, sampler_id: str) -> types.GetSamplerResponse:
        """Return what a sampler of this process serves. Raises NotFoundError."""
        for session in self._live().values():
            if (info := session.samplers.get(sampler_id)) is not None:
                return types.GetSamplerResponse(
                    sampler_id=sampler_id, base_model=info.base_model, model_path=info.model_path
                )
        raise NotFoundError(f"there is no sampler {shown(sampler_id)} in this process; make one again from its path.")

    def _runs(self) -> list[tuple[str, dict[str, Any]]]:
        return sorted(self._session.store.runs(), key=lambda item: item[1]["created"], reverse=True)

    def _session_runs(self, session_id: str) -> tuple[list[tuple[str, dict[str, Any]]], Session | None]:
        """Return a session's runs, and the session itself if it lives in this process. Raises NotFoundError."""
        runs = [(run, fields) for run, fields in self._runs() if fields["session_id"] == session_id]
        live = live_sessions.get(session_id)
        if live is not None and not self._shows(live):
            live = None
        if live is None and not runs:
            raise NotFoundError(f"there is no session {shown(session_id)}; list_sessions() lists them.")
        return runs, live

    def _checkpoints(self, run_id: str | None) -> list[types.Checkpoint]:
        records = sorted(self._session.store.list(run_id), key=lambda record: record.created, reverse=True)
        return [api_records.checkpoint(record) for record in records]

    def _live(self) -> dict[str, Session]:
        # A list first: sessions begin on other threads meanwhile.
        live = [session for reference in live_sessions.valuerefs() if (session := reference()) is not None]
        return {session.session_id: session for session in live if self._shows(session)}

    def _shows(self, session: Session) -> bool:
        """Return whether a session of this process has the same state directory, and is not another owner's."""
        owner = self._session.owner
        recorded = None if session.owner is None else session.owner.name
        return session.state_dir == self._session.state_dir and (owner is None or owner.has(recorded))


def check_page(limit: object, offset: object) -> None:
    """Raise BadRequestError unless the arguments describe a page: `limit` from 1, `offset` from 0."""
    for field, value, least in (("limit", limit, 1), ("offset", offset, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadRequestError(f"{field} is {value!r}; give an integer of at least {least}.")


def destination_project(project_id: str | None) -> str:
    """Return the project that a copy goes to, `$TINKER_PROJECT_ID` by default. Raises BadRequestError."""
    project = project_id or os.environ.get("TINKER_PROJECT_ID")
    if not project:
        raise BadRequestError("copy_weights: give destination_project_id, or set TINKER_PROJECT_ID.")
    return checks.text_or_none("destination_project_id", project) or ""


def not_served(method: str) -> UnsupportedError:
    """Return the error of a method in NOT_SERVED."""
    return UnsupportedError(f"{method} is not served: {NOT_SERVED[method]}.")


def _supported_model(name: str, local: bool) -> types.SupportedModel:
    # Imported here: reading a config needs the model registry, and with it jax.
    from jax_client.weights.read.load import read_config

    context = None
    if local:  # to resolve any other name is to download the model
        # A model that cannot be read is listed all the same: creating a client reports what is wrong with it.
        with contextlib.suppress(JaxClientError, OSError):
            context = read_config(resolve(name)).max_context
    return types.SupportedModel(model_name=name, max_context_length=context, trainable=True, sampleable=True)


def _cursor(limit: int, offset: int, total: int) -> types.Cursor:
    return types.Cursor(limit=limit, offset=offset, total_count=total)
