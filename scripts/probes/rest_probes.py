"""What do RestClient and AdminClient have to answer, or to refuse? A small call of each method, with a check."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.request import urlopen

import tinker
from tinker import types

from probing import BAD, METADATA, RANK, Ask, World, WrongError, check, probe


@probe("RestClient", "get_server_capabilities")
def capabilities(w: World, ask: Ask) -> None:
    found = ask(w.rest).supported_models
    check(found and all(each.trainable and each.sampleable for each in found), f"gives {found!r}")


@probe("RestClient", "get_training_run", "get_training_run_async")
@probe("RestClient", "get_training_run_by_tinker_path", "get_training_run_by_tinker_path_async")
def get_run(w: World, ask: Ask) -> None:
    run = ask(w.rest, w.state if "path" in ask.method else w.run_id)
    check((run.training_run_id, run.base_model, run.lora_rank) == (w.run_id, w.model, RANK), f"gives {run!r}")


@probe("RestClient", "get_weights_info_by_tinker_path")
def weights_info(w: World, ask: Ask) -> None:
    info = ask(w.rest, w.state)
    check((info.base_model, info.lora_rank, info.train_mlp) == (w.model, RANK, True), f"gives {info!r}")


@probe("RestClient", "list_training_runs", "list_training_runs_async")
def list_runs(w: World, ask: Ask) -> None:
    everything = ask(w.rest, limit=1000)
    check(w.run_id in {run.training_run_id for run in everything.training_runs}, "lacks the run")
    page = ask(w.rest, 1, 1)
    check([run.training_run_id for run in page.training_runs] == [everything.training_runs[1].training_run_id], "page")
    check(page.cursor.total_count == len(everything.training_runs), "counts others")
    check(not ask(w.rest, project_id="nobody's").training_runs, "lists other projects")


@probe("RestClient", "list_checkpoints", "list_checkpoints_async")
def list_checkpoints(w: World, ask: Ask) -> None:
    found = {each.checkpoint_id: each for each in ask(w.rest, w.run_id).checkpoints}
    check({"weights/start", "sampler_weights/start"} <= set(found), f"lists {sorted(found)}")
    state = found["weights/start"]
    check(state.checkpoint_type == "training" and state.size_bytes, f"gives {state!r}")


@probe("RestClient", "list_user_checkpoints", "list_user_checkpoints_async")
def list_all_checkpoints(w: World, ask: Ask) -> None:
    everything = ask(w.rest, 1000)
    check({w.state, w.saved} <= {each.tinker_path for each in everything.checkpoints}, "lacks some")
    check(len(ask(w.rest, 1).checkpoints) == 1, "ignores the limit")
    check(everything.cursor.total_count == len(everything.checkpoints), "counts others")


@probe("RestClient", "delete_checkpoint", "delete_checkpoint_async")
@probe("RestClient", "delete_checkpoint_from_tinker_path", "delete_checkpoint_from_tinker_path_async")
def delete(w: World, ask: Ask) -> None:
    path = w.training.save_state(f"for-{ask.method}").result().path
    where = (path,) if "path" in ask.method else (w.run_id, f"weights/for-{ask.method}")
    check(ask(w.rest, *where) is None and w.checkpoint(path) is None, "is still listed")
    try:
        w.rest.get_weights_info_by_tinker_path(path).result()
    except tinker.NotFoundError:
        return
    raise WrongError("is still found")


@probe("RestClient", "publish_checkpoint_from_tinker_path", "publish_checkpoint_from_tinker_path_async")
@probe("RestClient", "unpublish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path_async")
def publish(w: World, ask: Ask) -> None:
    public = ask.method.startswith("publish")
    opposite = w.rest.unpublish_checkpoint_from_tinker_path if public else w.rest.publish_checkpoint_from_tinker_path
    opposite(w.saved).result()
    check(ask(w.rest, w.saved) is None, "gives something")
    listed = w.checkpoint(w.saved)
    check(listed is not None and listed.public is public, f"is listed as {listed!r}")


@probe("RestClient", "set_checkpoint_ttl_from_tinker_path", "set_checkpoint_ttl_from_tinker_path_async")
def set_ttl(w: World, ask: Ask) -> None:
    for seconds in (7200, None):
        check(ask(w.rest, w.saved, seconds) is None, "gives something")
        listed = w.checkpoint(w.saved)
        check(listed is not None and (listed.expires_at is None) is (seconds is None), f"is listed as {listed!r}")


@probe("RestClient", "get_external_weights_urls", "get_external_weights_urls_async")
def external_urls(w: World, ask: Ask) -> None:
    found = ask(w.rest, w.training.save_weights_external(f"for-{ask.method}").result().path)
    check({"adapter_config.json", "adapter_model.safetensors"} <= set(found.urls), f"lists {sorted(found.urls)}")
    for name, url in found.urls.items():  # a server's are links, those in-process are files' addresses
        with urlopen(url) as answer:
            check(len(answer.read()) > 0, f"leads to an empty {name}")
    check(found.expires > datetime.now(UTC), "has ended")


@probe("RestClient", "get_session", "get_session_async")
def get_session(w: World, ask: Ask) -> None:
    found = ask(w.rest, w.session_id)
    check(w.run_id in found.training_run_ids and found.sampler_ids, f"gives {found!r}")
    check((found.user_metadata, found.display_name) == (METADATA, "probe"), f"gives {found!r}")


@probe("RestClient", "list_sessions", "list_sessions_async")
def list_sessions(w: World, ask: Ask) -> None:
    check(w.session_id in ask(w.rest).sessions and len(ask(w.rest, 1).sessions) == 1, "lacks the session")


@probe("RestClient", "assign_session_project", "assign_session_project_async")
def assign_project(w: World, ask: Ask) -> None:
    check(ask(w.rest, w.session_id, ask.method) is None, "gives something")
    there = w.rest.list_training_runs(limit=1000, project_id=ask.method).result().training_runs
    check(w.run_id in {run.training_run_id for run in there}, "lists the run elsewhere")


@probe("RestClient", "get_sampler", "get_sampler_async")
def get_sampler(w: World, ask: Ask) -> None:
    (sampler_id, *_) = w.rest.get_session(w.session_id).result().sampler_ids
    found = ask(w.rest, sampler_id)
    check((found.sampler_id, found.base_model) == (sampler_id, w.model), f"gives {found!r}")
    check(found.model_path == w.saved, f"gives {found!r}")


@probe("RestClient", "export_session_trace", "export_session_trace_async", in_process=BAD, served=BAD)
def export_trace(w: World, ask: Ask) -> None:
    ask(w.rest, w.session_id)


@probe("RestClient", "search_sessions", in_process=BAD, served=BAD)
def search_sessions(w: World, ask: Ask) -> None:
    ask(w.rest, types.SessionSearchRequest(display_name="probe"))


# The SDK answers this itself, from its credentials.
@probe("RestClient", "whoami", in_process=BAD, served=RuntimeError)
def whoami(w: World, ask: Ask) -> None:
    ask(w.rest)


def _rest_or_admin(w: World, ask: Ask) -> Any:
    return w.rest if ask.client == "RestClient" else ask.of(lambda: w.module.AdminClient(**_server_of(w)))


def _server_of(w: World) -> Mapping[str, Any]:
    # In-process there is nothing to configure: the class itself is refused.
    return w.where if w.side == "served" else {}


@probe("AdminClient", "get_audit_log", "get_audit_log_async", in_process=BAD, served=BAD)
@probe("RestClient", "get_audit_log", "get_audit_log_async", in_process=BAD, served=BAD)
@probe(
    "AdminClient", "get_current_checkpoint_storage_usage", "get_current_checkpoint_storage_usage_async",
    in_process=BAD, served=BAD,
)  # fmt: skip
@probe(
    "RestClient", "get_current_checkpoint_storage_usage", "get_current_checkpoint_storage_usage_async",
    in_process=BAD, served=BAD,
)  # fmt: skip
def admin(w: World, ask: Ask) -> None:
    ask(_rest_or_admin(w, ask))


@probe("AdminClient", "get_billing_usage", "get_billing_usage_async", in_process=BAD, served=BAD)
@probe("RestClient", "get_billing_usage", "get_billing_usage_async", in_process=BAD, served=BAD)
def billing(w: World, ask: Ask) -> None:
    ask(_rest_or_admin(w, ask), "2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z")


@probe("ServiceClient", "get_telemetry")
@probe("TrainingClient", "get_telemetry")
@probe("SamplingClient", "get_telemetry")
@probe("RestClient", "get_telemetry")
@probe("AdminClient", "get_telemetry", in_process=BAD)
def telemetry(w: World, ask: Ask) -> None:
    clients = {"ServiceClient": w.service, "TrainingClient": w.training, "SamplingClient": w.sampler}
    given = ask(clients[ask.client] if ask.client in clients else _rest_or_admin(w, ask))
    check(given is None or (w.side == "served" and hasattr(given, "log")), f"gives {given!r}")
