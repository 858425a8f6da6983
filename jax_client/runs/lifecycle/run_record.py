"""What is written down of a run when it is opened, and what stays of that when it is loaded again?"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from jax_client.errors import NotFoundError, RequestFailedError
from jax_client.runs.lifecycle.session import Session
from jax_client.runs.overview.described import run_name
from jax_client.runs.results import api_records
from jax_client.runs.results.reports import Reporting
from jax_client.values import CheckpointKey, JsonObject, LoraSpec

logger = logging.getLogger(__name__)

# What a run's record keeps where the run was unloaded: its beginning is not that of today.
OF_THE_BEGINNING = ("created", "resumed_from", "script", "project_id")


def record_of(
    session: Session,
    run_id: str,
    base_model: str,
    spec: LoraSpec,
    user_metadata: Mapping[str, str] | None,
    source: CheckpointKey | None,
) -> dict[str, object]:
    """Return the record of a run that is being opened; of one that was unloaded, with its first record's beginning.

    Args:
        session: whose run it is.
        run_id: of the run.
        base_model: the `ModelSource.lasting_name` of its files.
        spec: of the adapter.
        user_metadata: kept with it.
        source: the checkpoint that it is made from, None for a fresh adapter.
    """
    record = api_records.run_metadata(
        session_id=session.session_id,
        base_model=base_model,
        spec=spec,
        user_metadata=user_metadata,
        project_id=session.info.project_id,
        display_name=session.info.display_name,
        session_metadata=session.info.user_metadata,
        script=session.info.script,
        resumed_from=source and str(source),
        settings=session.config.to_json(),
    )
    if source is None or source.run_id != run_id:
        return record
    known = _known(session, run_id)
    return record | {name: known[name] for name in OF_THE_BEGINNING if name in known}


def reporting_of(session: Session, run_id: str) -> Reporting:
    """Return where the metrics and alerts of a run go, once it is recorded."""
    record = dict(_known(session, run_id))
    name = run_name(run_id, record, time.time())
    config = {key: record.get(key) for key in ("base_model", "spec", "settings", "script", "resumed_from")}
    return Reporting(name=name, config=config, trackers=session.config.trackers, webhook=session.config.webhook)


def user_metadata_of(session: Session, run_id: str) -> Mapping[str, str] | None:
    """Return the user's metadata of a run; None if its record is gone, which is no reason not to continue the run."""
    return _known(session, run_id).get("user_metadata")


def _known(session: Session, run_id: str) -> JsonObject:
    try:
        return session.store.run(run_id)
    except NotFoundError:
        return {}
    except RequestFailedError as error:
        logger.warning("%s", error)
        return {}
