"""Does a call that turns out bad later fail its future, and leave the run, the disk and the next step as they were?

Names that are not found, files that do not fit, loss functions that fail, gradients that are not finite, memory that
runs out. The numbers are the rows of the bad-input matrix.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
import tinker

import jax_client
from jax_client.engine.core import memory
from jax_client.engine.train import packing
from jax_client.runs.results import run_metrics
from support import bad_calls
from support.bad_calls import (
    ADAM,
    DATA,
    FAILED,
    NAN,
    REFUSED,
    Bench,
    Row,
    batch,
    check,
    datum,
    nothing_accumulated,
    numbered,
    settings,
)

bench, shared = bad_calls.bench, bad_calls.shared

TOO_MANY = {"fsdp": jax.device_count() + 1}
LATER: list[Row] = [
    (2, lambda b: b.lora("qwen3-8b"), tinker.NotFoundError, ["Did you mean 'Qwen/Qwen3-8B'?", "Known models: "]),
    (2, lambda b: b.lora("qwen/qwen3-8b"), tinker.NotFoundError, ["Did you mean 'Qwen/Qwen3-8B'?"]),
    (
        8,
        lambda b: jax_client.ServiceClient(config=settings(b.home, mesh=TOO_MANY)).create_lora_training_client(b.model),
        REFUSED,
        [f"needs {TOO_MANY['fsdp']} devices, but {jax.device_count()} are there", "mesh='auto'"],
    ),
    (53, lambda b: b.client.save_state("taken"), FAILED, ["from step 1, saved 20", "pass overwrite=True"]),
    (53, lambda b: b.client.save_weights_for_sampler("sampler"), FAILED, ["exists already"]),
    (
        56,
        lambda b: b.service.create_training_client_from_state(b.paths["taken"], b.other_model),
        REFUSED,
        ["other'", "model'", "nothing was loaded"],
    ),
    (
        58,
        lambda b: b.service.create_training_client_from_state_with_optimizer(b.paths["weights-only"]),
        REFUSED,
        ["Adam's moments are missing", "create_training_client_from_state"],
    ),
    (
        64,
        lambda b: b.sampling("no-sampler_weights"),
        tinker.NotFoundError,
        ["no checkpoint", "it has nan-sampler, sampler"],
    ),
]


def total(logprobs: list[Any]) -> Any:
    return -sum(p.sum() for p in logprobs)


def raising(error: BaseException) -> Callable[..., Any]:
    def loss(data: Any, logprobs: Any) -> Any:
        raise error

    return loss


def answering(answer: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    return lambda data, logprobs: answer(logprobs)


WRONG = [
    "saved adapter cannot be loaded",
    "in its weights nan at",
    "1 numbers in 1 arrays",
    "Load an earlier checkpoint",
]
NOT_FINITE: list[Row] = [
    (59, lambda b: b.load("nan"), REFUSED, WRONG),
    (59, lambda b: b.client.load_state(b.paths["nan"]), REFUSED, WRONG),
    (59, lambda b: b.service.create_training_client_from_state(b.paths["nan"]), REFUSED, WRONG),
    (64, lambda b: b.sampling("nan-sampler"), REFUSED, WRONG),
    (49, lambda b: b.step(learning_rate=1e30), FAILED, ["learning_rate 1e+30 would take", "step 1", "Lower"]),
    (49, lambda b: b.step(weight_decay=1e30), FAILED, ["weight_decay 1e+30 would take", "gradient is kept", "Lower"]),
]
CUSTOM: list[Row] = [
    (39, lambda b: b.custom(answering(lambda p: None)), TypeError, ["must return (loss, metrics); got NoneType"]),
    (39, lambda b: b.custom(answering(lambda p: 1.0)), TypeError, ["must return (loss, metrics); got float"]),
    (39, lambda b: b.custom(answering(lambda p: (total(p), {}, 1))), TypeError, ["got tuple of 3"]),
    (39, lambda b: b.custom(answering(lambda p: (total(p).detach().numpy(), {}))), TypeError, ["got ndarray"]),
    (40, lambda b: b.custom(answering(lambda p: (p[0], {}))), REFUSED, ["must be one real number", "shape (9,)"]),
    (40, lambda b: b.custom(answering(lambda p: (total(p).to("meta"), {}))), REFUSED, ["device meta"]),
    (40, lambda b: b.custom(answering(lambda p: (total(p) * 1j, {}))), REFUSED, ["complex"]),
    (41, lambda b: b.custom(answering(lambda p: (total(p).detach(), {}))), REFUSED, ["does not depend on logprobs"]),
    (42, lambda b: b.custom(answering(lambda p: (total(p[:1]), {}))), REFUSED, ["logprobs of datum 1 ", "Leave these"]),
    (43, lambda b: b.custom(answering(lambda p: (total(p) * NAN, {}))), FAILED, ["your loss is nan"]),
    (
        43,
        lambda b: b.custom(answering(lambda p: (total(p) + (p[1][4:6] * 0).sqrt().sum(), {}))),
        FAILED,
        ["gradient of your loss", "nan at datum 1, position 4"],
    ),
    (44, lambda b: b.custom(answering(lambda p: (total(p), [1.0]))), TypeError, ["dict as metrics; got list"]),
    (44, lambda b: b.custom(answering(lambda p: (total(p), {"a": p[0].detach()}))), TypeError, ["'a'", "shape (9,)"]),
    (46, lambda b: b.custom(lambda data, p: b.client.optim_step(ADAM)), RuntimeError, ["re-entrant call"]),
    (46, lambda b: b.custom(lambda data, p: b.client.save_state("new")), RuntimeError, ["re-entrant call"]),
]


@numbered(LATER + NOT_FINITE + CUSTOM)
def test_a_bad_call_fails_its_future(
    bench: Bench, call: Callable[[Bench], Any], kind: type[BaseException], parts: list[str]
) -> None:
    future = call(bench)
    with pytest.raises(kind) as caught:
        future.result(30)
    check(caught.value, kind, parts)
    if isinstance(caught.value, FAILED):
        assert caught.value.category == "user"


@pytest.mark.torch
@pytest.mark.parametrize("error", [KeyError("mine"), ZeroDivisionError("mine"), KeyboardInterrupt("mine")])
def test_an_exception_of_the_loss_function_comes_back_as_it_is(bench: Bench, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        bench.custom(raising(error)).result(30)
    assert caught.value is error
    assert any(entry.name == "loss" for entry in caught.traceback), "the user's line is in the traceback"
    assert "inside your loss function; no gradients were accumulated" in error.__notes__


def test_a_loss_function_needs_torch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match=re.escape("pip install 'jax_client[torch]'")):
            bench.custom(answering(lambda p: (total(p), {})))


@pytest.mark.torch
@pytest.mark.parametrize("custom", [[], [{}], "cross_entropy"], ids=["empty", "no-datum", "no-function"])
def test_bad_arguments_beside_a_loss_function(bench: Bench, custom: Any) -> None:
    loss, data = (custom, None) if isinstance(custom, str) else (answering(lambda p: (total(p), {})), custom)
    with pytest.raises(tinker.BadRequestError, match=r"No data provided|data\[0\] is dict|loss_fn is str"):
        bench.custom(loss, data)


@pytest.mark.torch
def test_a_loss_function_gets_copies_and_may_report_any_number(shared: Bench) -> None:
    import torch

    def plain(data: Any, logprobs: Any) -> Any:
        return total(logprobs), {}

    def unruly(data: Any, logprobs: Any) -> Any:
        loss = total(logprobs)
        logprobs[0].detach().zero_()
        data[0].loss_fn_inputs["weights"].to_numpy()[:] = 9
        data[1].loss_fn_inputs.clear()
        logprobs.clear()
        assert shared.neighbour.forward_backward(DATA, "cross_entropy").result(30), "other clients go on"
        return loss, {"0-d": torch.tensor(2.0), "nan": NAN, "int": 3}

    given = [{key: value.to_numpy().copy() for key, value in d.loss_fn_inputs.items()} for d in DATA]
    outcomes = []
    for loss in (plain, unruly):
        shared.reset(gradients=False)
        output = shared.custom(loss).result(30)
        outcomes.append(([o["logprobs"].to_numpy().tobytes() for o in output.loss_fn_outputs], shared.weights()))
    assert outcomes[0] == outcomes[1]
    assert (output.metrics["0-d"], output.metrics["int"]) == (2.0, 3.0) and math.isnan(output.metrics["nan"])
    shared.client.optim_step(ADAM).result(30)
    assert run_metrics.shared.flush(30)
    (recorded,) = [run.newest for run in run_metrics.live() if run.run_id == shared.client.model_id]
    assert recorded["nonfinite/nan"] == 1.0 and "nan" not in recorded, "what is recorded is finite"
    for d, inputs in zip(DATA, given, strict=True):
        assert d.loss_fn_inputs.keys() == inputs.keys()
        assert all((d.loss_fn_inputs[key].to_numpy() == value).all() for key, value in inputs.items())


@nothing_accumulated
def test_a_step_without_gradients(bench: Bench) -> None:
    with pytest.raises(FAILED, match="no gradients since step 1") as caught:
        bench.client.optim_step(ADAM).result(30)
    assert caught.value.category == "user"


def test_zero_weights_add_nothing(shared: Bench, caplog: pytest.LogCaptureFixture) -> None:
    shared.reset(gradients=True)
    output = shared.train(batch(0.0)).result(30)
    assert output.metrics["loss:sum"] == output.metrics["tokens:sum"] == 0.0
    messages = [record.getMessage() for record in caplog.records if "weight" in record.getMessage()]
    assert [message.partition(". ")[0] for message in messages] == [
        "every weight of the 3 datums is zero: loss and gradient are zero"
    ]
    assert shared.canary() == shared.expected[True]


@nothing_accumulated
def test_a_gradient_that_is_not_finite_is_skipped(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    before = bench.weights()
    for skipped in range(1, 11):
        training = bench.train(batch(3e38)).result(30)
        assert training.metrics["nonfinite/loss:sum"] == 1.0
        json.dumps(training.metrics, allow_nan=False)
        step = bench.client.optim_step(ADAM)
        if skipped < 10:
            metrics = step.result(30).metrics
            assert metrics == {"skipped_nonfinite:sum": 1.0, "learning_rate:mean": ADAM.learning_rate}
            assert bench.adapter.skipped_in_a_row == skipped
    with pytest.raises(FAILED, match=r"10 steps in a row .* weights are those of step 1") as caught:
        step.result(30)
    assert caught.value.category == "user"
    assert sum("step 2 was skipped" in record.getMessage() for record in caplog.records) == 10
    bench.adapter.skipped_in_a_row = 0
    assert bench.weights() == before


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nA long dump")


def test_a_client_or_a_call_that_does_not_fit_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is allocated, with what is needed, what is free, and what to change."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda *_: 10_000)
        for call, hints in (
            (lambda: bench.lora(bench.model, rank=64), ["rank 64", "Lower the rank", "dtype='bfloat16'", "mesh"]),
            (
                lambda: bench.train(DATA),
                ["micro-batch of 1 x 256 tokens", "max_tokens_per_micro_batch", "remat='full'"],
            ),
        ):
            with pytest.raises(FAILED, match=r"needs .*MiB.*, but 0\.0 MiB are free") as caught:
                call().result(30)
            assert caught.value.category == "user" and all(hint in str(caught.value) for hint in hints)


@pytest.mark.parametrize("program", ["forward", "backward", "optim_step"])
def test_out_of_memory_in_a_step(bench: Bench, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine.trainer.programs, program, out_of_memory)
        call = bench.step if program == "optim_step" else lambda: bench.train(DATA)
        with pytest.raises(FAILED, match=r"ran out of memory.*state is intact") as caught:
            call().result(30)
    assert caught.value.category == "server"
    assert "Out of memory allocating 123 bytes. " in str(caught.value) and "dump" not in str(caught.value)
    if program != "optim_step":
        assert "in a micro-batch of 1 x 256 tokens" in str(caught.value)
        assert "cannot hold a sequence of 21 tokens: send shorter ones, or set remat='full'" in str(caught.value)


def test_out_of_memory_names_a_batch_that_is_smaller(shared: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.reset(gradients=True)
    before = shared.weights()
    long = [datum([1] * 100, (1,) * 100)] * 8
    with monkeypatch.context() as patch:
        patch.setattr(shared.engine.trainer, "limits", packing.Limits(ways=1, tokens=2048))
        patch.setattr(shared.engine.trainer.programs, "forward", out_of_memory)
        with pytest.raises(FAILED, match="in a micro-batch of 1 x 512 tokens") as caught:
            shared.train(long).result(30)
        patch.setattr(shared.engine.sampler._programs, "prefill", out_of_memory)
        with pytest.raises(FAILED, match="fewer samples") as sampling:
            shared.sample().result(30)
    assert caught.value.category == sampling.value.category == "server"
    assert "state is intact" in str(sampling.value)
    found = re.search(r"max_tokens_per_micro_batch to (\d+),", str(caught.value))
    assert found is not None and int(found[1]) == 256
    plans = packing.plan_call([100] * 8, packing.Limits(ways=1, tokens=256))
    assert {(plan.rows, plan.length) for plan in plans} == {(1, 256)}
    # What had to be compiled for the calls stays.
    assert shared.weights() == before and shared.canary() == shared.expected[True]
