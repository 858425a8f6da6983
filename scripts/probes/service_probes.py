"""What do the methods of ServiceClient have to answer? A small call of each, with a check of its answer."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import tinker
from tinker import types

from probing import METADATA, RANK, Ask, World, WrongError, check, close, probe


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
    check(made.model_id != w.run_id, "continues in the same run")
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
