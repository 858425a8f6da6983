"""Which arguments does the SDK take that are refused here? Each is given once; the refusal leaves the client usable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinker import types

from probing import ARGUMENTS, BAD, FAILED, Ask, World, probe


@contextmanager
def _still_trains(w: World) -> Iterator[None]:
    """Train a step after a refused call: the refusal leaves the client as it was."""
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
