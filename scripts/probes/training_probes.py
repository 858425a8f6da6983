"""What do the methods of TrainingClient and of its futures have to answer? A small call of each, with a check."""

from __future__ import annotations

import concurrent.futures
from typing import Any
from urllib.parse import urlsplit

import tinker
from tinker import types

from probing import ADAM, METADATA, RANK, Ask, World, WrongError, check, close, probe


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
