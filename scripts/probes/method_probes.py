"""What does each public method of the SDK's clients have to answer? A small call of each, with a check of its answer.

`probe_methods.py` runs them, once in-process and once through the SDK against a server.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import tinker
from tinker import types
from tinker.lib.api_future_impl import QueueState

from probing import ADAM, ARGUMENTS, METADATA, RANK, Ask, World, WrongError, check, close, probe

BAD, FAILED = tinker.BadRequestError, tinker.RequestFailedError


@probe("ServiceClient", "get_telemetry")
@probe("TrainingClient", "get_telemetry")
@probe("SamplingClient", "get_telemetry")
@probe("RestClient", "get_telemetry")
@probe("AdminClient", "get_telemetry", in_process=BAD)
def telemetry(w: World, ask: Ask) -> None:
    clients = {"ServiceClient": w.service, "TrainingClient": w.training, "SamplingClient": w.sampler}
    given = ask(clients[ask.client] if ask.client in clients else _rest_or_admin(w, ask))
    check(given is None or (w.side == "served" and hasattr(given, "log")), f"gives {given!r}")


@probe("ServiceClient", "holder", absent="the SDK's own connections")
def holder(w: World, ask: Ask) -> None:
    found = ask.of(lambda: w.service.holder)
    check(found.get_session_id() == w.session_id, "is of another session")


@probe("ServiceClient", "get_console_url")
def service_console(w: World, ask: Ask) -> None:
    check(urlsplit(ask(w.service)).scheme in ("file", "https"), "is no address")


@probe("ServiceClient", "get_server_capabilities", "get_server_capabilities_async")
def service_capabilities(w: World, ask: Ask) -> None:
    found = ask(w.service)
    check(isinstance(found, types.GetServerCapabilitiesResponse) and found.supported_models, f"gives {found!r}")


@probe("ServiceClient", "create_lora_training_client", "create_lora_training_client_async")
def create(w: World, ask: Ask) -> None:
    made = ask(w.service, w.model, rank=RANK, seed=7, train_unembed=False, user_metadata=METADATA)
    check(isinstance(made, tinker.TrainingClient), f"gives {type(made).__name__}")
    check(made.get_info().lora_rank == RANK, "has another rank")
    check(w.rest.get_training_run(made.model_id).result().user_metadata == METADATA, "has other metadata")


@probe("ServiceClient", "create_training_client_from_state", "create_training_client_from_state_async")
@probe(
    "ServiceClient",
    "create_training_client_from_state_with_optimizer",
    "create_training_client_from_state_with_optimizer_async",
)
def from_state(w: World, ask: Ask) -> None:
    made = ask(w.service, w.state)
    check(made.model_id != w.run_id, "goes on in the same run")
    close(w.score(made), w.scores, "logprobs")


@probe("ServiceClient", "create_sampling_client", "create_sampling_client_async")
def create_sampler(w: World, ask: Ask) -> None:
    close(ask(w.service, model_path=w.saved).compute_logprobs(w.prompt).result(), w.scores, "logprobs")
    check(ask(w.service, base_model=w.model).get_base_model() == w.model, "has another base model")


@probe("ServiceClient", "create_custom_loss")
def custom_loss(w: World, ask: Ask) -> None:
    def other_loss(logprobs: Any) -> Any:
        loss = -logprobs.mean()
        return loss, {"custom/other:mean": loss}

    handle = ask(w.service, other_loss, {"logprobs": 1})
    check(isinstance(handle, tinker.LossHandle) and handle.session_id == w.session_id, f"gives {handle!r}")


@probe("ServiceClient", "create_rest_client")
def create_rest(w: World, ask: Ask) -> None:
    made = ask(w.service)
    check(isinstance(made, tinker.RestClient), f"gives {type(made).__name__}")
    check(made.get_training_run(w.run_id).result().training_run_id == w.run_id, "lists other runs")


@probe("ServiceClient", "copy_weights")
@probe("RestClient", "copy_weights", "copy_weights_async")
def copy_weights(w: World, ask: Ask) -> None:
    target, project = (w.service, ()) if ask.client == "ServiceClient" else (w.rest, ("elsewhere",))
    path = ask(target, w.saved, *project, ttl_seconds=3600)
    copied = w.checkpoint(path)
    check(path != w.saved and copied is not None and copied.expires_at is not None, f"{path} is listed as {copied!r}")
    made = w.service.create_sampling_client(model_path=path).result()
    close(made.compute_logprobs(w.prompt).result(), w.scores, "logprobs of the copy")


@probe("ServiceClient", "close")
def close_service(w: World, ask: Ask) -> None:
    service = w.new_service()
    service.create_sampling_client(base_model=w.model).result()
    check(ask(service, "success", "probed") is None, "gives something")
    try:
        service.create_sampling_client(base_model=w.model).result()
    except (RuntimeError, tinker.TinkerError):
        return
    raise WrongError("the client can be used afterwards")


@probe("TrainingClient", "forward", "forward_async")
@probe("TrainingClient", "forward_backward", "forward_backward_async")
def forward_backward(w: World, ask: Ask) -> None:
    output = ask(w.training, w.data, "cross_entropy")
    logprobs = [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]
    check([len(each) for each in logprobs] == [each.model_input.length for each in w.data], "has other shapes")
    close([output.metrics["loss:sum"]], [-sum(float(each.sum()) for each in logprobs)], "loss:sum")
    step = w.training.optim_step(ADAM)
    if ask.method.startswith("forward_backward"):
        check(step.result().metrics["grad_norm:mean"] > 0, "left no gradient")
        return
    try:
        step.result()
    except tinker.RequestFailedError:
        return
    raise WrongError("left a gradient")


@probe("TrainingClient", "forward_backward_custom", "forward_backward_custom_async")
def forward_backward_custom(w: World, ask: Ask) -> None:
    expected = w.training.forward(w.data, "cross_entropy").result().metrics["loss:sum"]

    def batch_loss(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return -sum(each.sum() for each in logprobs), {"datums": float(len(data))}

    for loss in (batch_loss, w.handle):
        output = ask(w.training, w.data, loss)
        close([output.metrics["loss:sum"]], [expected], "loss:sum")
    norm = w.training.optim_step(ADAM).result().metrics["grad_norm:mean"]
    check(norm > 0, "left no gradient")


@probe("TrainingClient", "optim_step", "optim_step_async")
def optim_step(w: World, ask: Ask) -> None:
    before = w.training.forward_backward(w.data, "cross_entropy").result().metrics["loss:sum"]
    check(ask(w.training, ADAM).metrics["step:max"] >= 1, "counts no step")
    after = w.training.forward_backward(w.data, "cross_entropy").result().metrics["loss:sum"]
    check(after < before, f"the loss was {before} and is {after}")
    ask(w.training, adam_params=ADAM)


@probe("TrainingClient", "save_state", "save_state_async")
def save_state(w: World, ask: Ask) -> None:
    for overwrite in (False, True):
        path = ask(w.training, ask.method, 3600, overwrite, METADATA).path
        saved = w.checkpoint(path)
        check(saved is not None and saved.user_metadata == METADATA and saved.expires_at, f"is listed as {saved!r}")


@probe("TrainingClient", "save_weights_for_sampler", "save_weights_for_sampler_async")
def save_for_sampler(w: World, ask: Ask) -> None:
    path = ask(w.training, ask.method, user_metadata=METADATA).path
    made = w.service.create_sampling_client(model_path=path)
    close(made.compute_logprobs(w.prompt).result(), w.score(w.training), "logprobs")


@probe("TrainingClient", "save_weights_external", "save_weights_external_async")
def save_external(w: World, ask: Ask) -> None:
    path = ask(w.training, ask.method, 3600).path
    saved = w.checkpoint(path)
    check(saved is not None and saved.checkpoint_type == "external", f"is listed as {saved!r}")


@probe("TrainingClient", "load_state", "load_state_async")
@probe("TrainingClient", "load_state_with_optimizer", "load_state_with_optimizer_async")
def load_state(w: World, ask: Ask) -> None:
    training = w.new_training()
    check(ask(training, w.state).path == w.state, "names another path")
    close(w.score(training), w.scores, "logprobs")


@probe("TrainingClient", "get_info", "get_info_async")
def get_info(w: World, ask: Ask) -> None:
    info = ask(w.training)
    check((info.model_data.model_name, info.lora_rank, info.model_id) == (w.model, RANK, w.run_id), f"gives {info!r}")


@probe("TrainingClient", "get_tokenizer")
@probe("SamplingClient", "get_tokenizer")
def get_tokenizer(w: World, ask: Ask) -> None:
    tokenizer = ask(w.training if ask.client == "TrainingClient" else w.sampler)
    check(tokenizer.encode("t3 t14") == [3, 14], "reads a text as other tokens")


@probe("TrainingClient", "get_console_url")
def training_console(w: World, ask: Ask) -> None:
    check(urlsplit(ask(w.training)).scheme in ("file", "https"), "is no address")


@probe("TrainingClient", "create_sampling_client", "create_sampling_client_async")
def training_sampler(w: World, ask: Ask) -> None:
    close(ask(w.training, w.saved).compute_logprobs(w.prompt).result(), w.scores, "logprobs")


@probe("TrainingClient", "save_weights_and_get_sampling_client", "save_weights_and_get_sampling_client_async")
def ephemeral_sampler(w: World, ask: Ask) -> None:
    for kind in ("snapshot", "inflight"):
        made = ask(w.training, kind=kind)
        close(made.compute_logprobs(w.prompt).result(), w.score(w.training), f"logprobs of {kind}")


@probe("SamplingClient", "create", absent="a factory over the SDK's own connections")
def create_internal(w: World, ask: Ask) -> None:
    made = ask(w.module.SamplingClient, w.service.holder, base_model=w.model)
    check(made.get_base_model() == w.model, "has another base model")


@probe("SamplingClient", "sample", "sample_async")
def sample(w: World, ask: Ask) -> None:
    width, length = 3, w.prompt.length
    targets = types.TensorData(data=[1] * (length - 1), dtype="int64", shape=[length - 1, 1])
    params = types.SamplingParams(max_tokens=5, temperature=0.8, top_k=20, top_p=0.9, seed=3, stop=[])
    answer = ask(
        w.sampler, w.prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=width,
        topk_sample_logprobs=width, target_prompt_logprobs=targets, prompt_alt_tokens_k=2, prompt_logprobs_last_n=2,
    )  # fmt: skip
    check([len(each.tokens) for each in answer.sequences] == [5, 5], "has other lengths")
    check({each.stop_reason for each in answer.sequences} == {"length"}, "stopped early")
    for sequence in answer.sequences:
        best = [dict(row) for row in sequence.topk_logprobs]
        check(all(len(row) == width for row in best), "has another width")
        pairs = zip(sequence.tokens, sequence.logprobs, best, strict=True)
        check(all(row[token] == lp for token, lp, row in pairs if token in row), "contradicts its best tokens")
    close(answer.prompt_logprobs, [*[None] * (length - 2), *w.scores[-2:]], "prompt_logprobs")
    check([row is None for row in answer.topk_prompt_logprobs] == [True] * (length - 2) + [False] * 2, "scored others")
    check(list(answer.target_prompt_logprobs.shape) == [length - 1, 1], "targets have another shape")
    close([answer.target_prompt_logprobs.to_numpy()[0, 0]], [w.scores[1]], "target 1, which is the prompt's own")
    check(list(answer.prompt_alt_tokens.tokens.shape) == [length - 1, 2], "alternatives have another shape")
    again = ask(w.sampler, w.prompt, 2, params)
    check([each.tokens for each in again.sequences] == [each.tokens for each in answer.sequences], "ignores the seed")


@probe("SamplingClient", "compute_logprobs", "compute_logprobs_async")
def compute_logprobs(w: World, ask: Ask) -> None:
    close(ask(w.sampler, w.prompt), w.scores, "logprobs")
    check([each is None for each in ask(w.sampler, w.prompt, 2)] == [True] * 4 + [False] * 2, "scored others")


@probe("SamplingClient", "get_base_model", "get_base_model_async")
def get_base_model(w: World, ask: Ask) -> None:
    check(ask(w.sampler) == w.model, "names another")


@probe("SamplingClient", "get_sampler_handle")
def get_handle(w: World, ask: Ask) -> None:
    handle = ask(w.sampler)
    made = w.module.SamplingClient.from_sampler_handle(handle, api_key=w.where.get("api_key"))
    check(isinstance(handle, str) and made.get_base_model() == w.model, "leads elsewhere")


@probe("SamplingClient", "from_sampler_handle")
def from_handle(w: World, ask: Ask) -> None:
    made = ask(w.module.SamplingClient, w.sampler.get_sampler_handle(), api_key=w.where.get("api_key"))
    close(made.compute_logprobs(w.prompt).result(), w.scores, "logprobs")


@probe("SamplingClient", "on_queue_state_change")
def queue_state(w: World, ask: Ask) -> None:
    check(ask(w.sampler, QueueState.ACTIVE, None) is None, "gives something")


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
    check(all(Path(unquote(urlsplit(url).path)).is_file() for url in found.urls.values()), "leads to no file")
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


@probe("APIFuture", "result")
def future_result(w: World, ask: Ask) -> None:
    future = w.training.forward(w.data, "cross_entropy")
    check(ask(future, 60.0).metrics == ask(future).metrics, "changes")


@probe("APIFuture", "result_async")
@probe("APIFuture", "coroutine")
def future_async(w: World, ask: Ask) -> None:
    future = w.training.forward(w.data, "cross_entropy")
    check(ask(future).metrics == ask(future).metrics == future.result().metrics, "changes")


@probe("APIFuture", "future")
def future_future(w: World, ask: Ask) -> None:
    future = w.training.forward(w.data, "cross_entropy")
    theirs = ask(future)
    check(concurrent.futures.wait([theirs], 60).done == {theirs}, "is not done")
    check(theirs.result().metrics == future.result().metrics, "has another result")


@contextmanager
def _still_trains(w: World) -> Iterator[None]:
    """Train a step after what is refused: the client goes on as if it had not been asked."""
    try:
        yield
    finally:
        w.step(w.training)


def _image() -> types.ModelInput:
    chunks = [types.ImageChunk(data=b"\x89PNG\r\n\x1a\n", format="png", expected_tokens=2)]
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[3, 1]), *chunks])


@probe(ARGUMENTS, "`forward_backward` of an image", in_process=BAD, served=FAILED)
def image_training(w: World, ask: Ask) -> None:
    targets: Any = {"target_tokens": [1, 4, 1, 5]}
    datum = types.Datum(model_input=_image(), loss_fn_inputs=targets)
    with _still_trains(w):
        ask.of(lambda: w.training.forward_backward([datum], "cross_entropy"))


@probe(ARGUMENTS, "`sample` after an image", in_process=BAD, served=FAILED)
def image_sampling(w: World, ask: Ask) -> None:
    ask.of(lambda: w.sampler.sample(_image(), 1, types.SamplingParams(max_tokens=1)))


@probe(ARGUMENTS, "`sample` after audio", in_process=BAD, served=FAILED)
def audio_sampling(w: World, ask: Ask) -> None:
    prompt = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[3, 1]), types.DmelChunk(dmel=b"\0" * 16)])
    ask.of(lambda: w.sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)))


@probe(ARGUMENTS, "`forward_backward` with `stable_reinforce`", in_process=BAD, served=FAILED)
def stable_reinforce(w: World, ask: Ask) -> None:
    with _still_trains(w):
        ask.of(lambda: w.training.forward_backward(w.data, "stable_reinforce"))


@probe(ARGUMENTS, "`create_sampling_client(record_stability_info=True)`, then `sample`", in_process=BAD, served=BAD)
def stability_info(w: World, ask: Ask) -> None:
    def work() -> Any:
        made = w.service.create_sampling_client(base_model=w.model, record_stability_info=True)
        return made.result().sample(w.prompt, 1, types.SamplingParams(max_tokens=1))

    ask.of(work)


@probe(ARGUMENTS, "`create_lora_training_client(optimizer=DimuonOptimizerConfig())`", in_process=BAD, served=BAD)
def dimuon(w: World, ask: Ask) -> None:
    ask.of(lambda: w.service.create_lora_training_client(w.model, optimizer=types.DimuonOptimizerConfig()))


@probe(ARGUMENTS, "`optim_step(DimuonParams(...))`", in_process=BAD, served=FAILED)
def dimuon_step(w: World, ask: Ask) -> None:
    with _still_trains(w):
        ask.of(lambda: w.training.optim_step(types.DimuonParams(learning_rate=0.01)))


@probe(ARGUMENTS, "`save_weights_external(age_encryption_recipients=...)`", in_process=BAD, served=FAILED)
def encryption(w: World, ask: Ask) -> None:
    with _still_trains(w):
        ask.of(lambda: w.training.save_weights_external("secret", age_encryption_recipients=["age1probe"]))
