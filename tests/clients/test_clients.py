"""Do the clients and their futures behave as the SDK's do?"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import tinker

import jax_client
from jax_client import errors, types
from jax_client.clients import sdk_errors
from jax_client.clients.futures import LocalFuture, SampleFuture
from jax_client.runs.lifecycle.order import RequestOrder
from support import fake_engine
from support.calls import rl
from support.fake_engine import ADAM, DATA, MODEL, PARAMS, PROMPT, step

client, loaded, service = fake_engine.client, fake_engine.loaded, fake_engine.service
models = fake_engine.models


def test_the_client_future_is_a_future_and_a_client(service):
    future = service.create_lora_training_client(MODEL)
    client = future.result()
    assert type(client) is jax_client.TrainingClient
    for each in (future, client):
        assert isinstance(each, jax_client.TrainingClient)
        assert isinstance(each, tinker.TrainingClient)
        assert each.model_id == client.model_id
        assert each.forward_backward(DATA, "cross_entropy").result().metrics["loss:sum"] == 1.0
        assert each.get_tokenizer().name == MODEL
    assert isinstance(future, tinker.APIFuture)
    assert future.future().result() is client
    assert copy.copy(future).result() is client
    with pytest.raises(AttributeError):
        _ = future.nonsense


def test_awaiting_and_the_async_asymmetry(service):
    async def use():
        future = service.create_lora_training_client(MODEL)
        client = await future
        assert await future is client
        assert await asyncio.create_task(future.coroutine()) is client
        assert (await service.create_lora_training_client_async(MODEL)).model_id != client.model_id
        direct = service.create_lora_training_client(MODEL)
        passing = await direct.forward_backward_async(DATA, "cross_entropy")
        assert isinstance(passing, tinker.APIFuture)
        stepping = await client.forward_backward_async(DATA, "cross_entropy")
        step = await client.optim_step_async(ADAM)
        assert (await stepping).metrics["loss:sum"] == 1.0
        assert (await step.result_async(5)).metrics["grad_norm:mean"] == 1.0
        # Blocking inside a running loop works: the work is on other threads.
        assert client.forward(DATA, "cross_entropy").result(5).metrics
        sampler = await client.save_weights_and_get_sampling_client_async()
        assert type(sampler) is jax_client.SamplingClient
        response = await sampler.sample_async(PROMPT, 1, PARAMS)
        assert isinstance(response, tinker.SampleResponse)
        assert await sampler.compute_logprobs_async(PROMPT) == [None, -1.5, -1.5, -1.5]
        assert (await client.get_info_async()).lora_rank == 32

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(use())


def test_nothing_waits_for_the_device(client, loaded):
    engine = loaded[0]
    engine.gate.clear()
    futures = [
        client.forward_backward(DATA, "cross_entropy"),
        client.optim_step(ADAM),
        client.save_state("a"),
        client.load_state(f"tinker://{client.model_id}/weights/a"),
        client.forward_backward(DATA, "cross_entropy"),
        client.save_weights_and_get_sampling_client(),
    ]
    assert not any(future.future().done() for future in futures)
    with pytest.raises(TimeoutError):
        futures[0].result(timeout=0.01)

    async def give_up():
        with pytest.raises(TimeoutError):
            await futures[0].result_async(0.01)

    asyncio.run(give_up())
    engine.gate.set()
    for future in futures:
        future.result(30)
    # The load waits for the save to be durable, and what comes after it waits for the load.
    order = ["open_adapter", "train_batch", "optim_step", "snapshot", "restore", "train_batch", "snapshot"]
    assert engine.log == order


def test_one_engine_for_all_clients(service, models, loaded, tmp_path):
    clients = [service.create_lora_training_client(MODEL) for _ in range(3)]
    other = jax_client.ServiceClient(config=jax_client.EngineConfig(state_dir=tmp_path), _models=models)
    clients.append(other.create_lora_training_client(MODEL))
    assert len({client.result().model_id for client in clients}) == 4
    assert len(loaded) == 1
    assert service.describe()["model"] == MODEL
    assert service.describe()["engines"] == [{"model": MODEL, "dtype": "float32", "files_changed": False}]
    service.close("success").result()
    assert not loaded[0].closed.is_set()
    other.close("success").result()
    assert loaded[0].closed.wait(30)


def test_loading_errors_come_from_the_future_and_are_not_kept(service, loaded):
    for _ in range(2):
        with pytest.raises(tinker.NotFoundError, match="'missing'"):
            service.create_lora_training_client("missing").result()
    assert not loaded


def test_errors_are_both_ours_and_the_sdks(client):
    with pytest.raises(ValueError, match="No data provided") as caught:
        client.forward_backward([], "cross_entropy")
    assert isinstance(caught.value, tinker.BadRequestError)
    assert isinstance(caught.value, errors.BadRequestError)
    assert caught.value.status_code == 400 and caught.value.body["detail"] == str(caught.value)
    with pytest.raises(TypeError) as wrong_type:
        client.optim_step()
    assert isinstance(wrong_type.value, tinker.BadRequestError)
    failing = client.optim_step(ADAM)
    for _ in range(2):
        with pytest.raises(tinker.RequestFailedError, match="no gradients") as failed:
            failing.result()
    assert failed.value.category is types.RequestErrorCategory.User
    assert failed.value.request_id == "r1"
    for error in (caught.value, wrong_type.value, failed.value):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert pickle.loads(pickle.dumps(type(error))) is type(error)
    assert type(again.category) is types.RequestErrorCategory
    assert step(client).metrics["grad_norm:mean"] == 1.0


def test_subclasses_keep_their_traits_when_bound():
    class Odd(errors.BadRequestError, AssertionError):
        pass

    cause = KeyError("why")
    error = Odd("odd")
    error.__cause__ = cause
    error.add_note("a note")
    translated = sdk_errors.translate(error)
    assert isinstance(translated, Odd) and isinstance(translated, tinker.BadRequestError)
    assert isinstance(translated, AssertionError)
    assert translated.__cause__ is cause and translated.__notes__ == ["a note"]
    assert sdk_errors.translate(translated) is translated
    assert sdk_errors.translate(cause) is cause


def test_a_loss_that_is_not_public_is_another_where_that_was_chosen(models, tmp_path):
    config = jax_client.EngineConfig(state_dir=tmp_path, map_loss={"stable_reinforce": "importance_sampling"})
    with jax_client.ServiceClient(config=config, _models=models) as service:
        client = service.create_lora_training_client(MODEL).result()
        sampler = client.save_weights_and_get_sampling_client(record_stability_info=True)
        assert sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)).result()
        data = [rl()]
        metrics = client.forward_backward(data, "stable_reinforce").result().metrics
        same = client.forward_backward(data, "importance_sampling").result().metrics
        assert metrics.pop("stable_reinforce_as_importance_sampling:max") == 1.0
        assert metrics == same
        assert service.describe()["mapped_losses"] == {"stable_reinforce": "importance_sampling"}
    for wrong in ({"stable_reinforce": "cross_entropy"}, {"ppo": "cispo"}):
        with pytest.raises(errors.BadRequestError, match="it can map stable_reinforce to importance_sampling"):
            jax_client.EngineConfig(map_loss=wrong)


def test_all_modules_off_is_the_sdks_assertion(service):
    with pytest.raises(AssertionError, match="At least one of"):
        service.create_lora_training_client(MODEL, train_mlp=False, train_attn=False, train_unembed=False)


def test_unsupported_features_are_refused_by_name(service, client):
    dimuon = types.DimuonOptimizerConfig()
    path = f"tinker://{client.model_id}/weights/a"
    calls = [
        (lambda: service.create_lora_training_client(MODEL, optimizer=dimuon), "(?i)dimuon"),
        (lambda: service.create_training_client_from_state(path, optimizer=dimuon), "(?i)dimuon"),
        (lambda: service.create_sampling_client(base_model=MODEL, record_stability_info=True), "record_stability_info"),
        (lambda: client.save_weights_and_get_sampling_client(record_stability_info=True), "record_stability_info"),
    ]
    for call, name in calls:
        with pytest.raises(errors.UnsupportedError, match=name) as caught:
            call()
        assert isinstance(caught.value, tinker.BadRequestError)


def test_metrics_that_are_not_finite(client):
    metrics = client.forward_backward(DATA, "cross_entropy").result().metrics
    assert metrics == {"loss:sum": 1.0, "nonfinite/kl:mean": 1.0}
    assert client.optim_step(ADAM).result().metrics == {"grad_norm:mean": 1.0, "nonfinite/update_norm:mean": 1.0}


def test_closing(models, loaded, tmp_path):
    service = jax_client.ServiceClient(config=jax_client.EngineConfig(state_dir=tmp_path), _models=models)
    client = service.create_lora_training_client(MODEL).result()
    loaded[0].gate.clear()
    late = client.forward_backward(DATA, "cross_entropy")
    closing = service.close("success", detail="done")
    assert not closing.future().done()
    loaded[0].gate.set()
    closing.result(30)
    service.close("errored").result()
    assert late.result().metrics["loss:sum"] == 1.0
    for call in (
        lambda: service.create_lora_training_client(MODEL),
        lambda: service.create_sampling_client(base_model=MODEL),
        lambda: client.forward_backward(DATA, "cross_entropy"),
        service.create_rest_client,
    ):
        with pytest.raises(RuntimeError, match=r"ServiceClient is closed \(success .*: done\)") as caught:
            call()
        assert isinstance(caught.value, tinker.NotFoundError)
    with pytest.raises(ValueError, match="status"):
        service.close("finished")


def test_a_waiting_request_holds_the_later_ones():
    order, started, ready = RequestOrder(), [], Future()

    def start(name):
        def go():
            started.append(name)
            future: Future = Future()
            future.set_result(name)
            return future

        return go

    first = order.submit(start("first"), after=ready)
    second, third = order.submit(start("second")), order.submit(start("third"))
    second.cancel()
    failing = order.submit(lambda: ready.result().nonsense)
    assert started == []
    ready.set_result(None)
    assert (first.result(), third.result()) == ("first", "third")
    assert started == ["first", "third"]
    with pytest.raises(AttributeError):
        failing.result()
    assert order.submit(start("fourth")).result() == "fourth"


def test_cancelling_reaches_the_source():
    source: Future = Future()
    future = LocalFuture(source)
    assert future.future().cancel() and source.cancelled()
    assert "cancelled" in repr(future)


async def in_a_group(future):
    async def fail():
        await asyncio.sleep(0.01)
        raise ValueError("one of the group")

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(future.coroutine())
            group.create_task(fail())


async def in_a_timeout(future):
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await future


async def gathered(future):
    task = asyncio.gather(future, asyncio.sleep(9))
    await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def waited_for(future):
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(future, 0.01)


async def with_its_own_limit(future):
    with contextlib.suppress(TimeoutError):
        await future.result_async(0.01)


@pytest.mark.parametrize("wait", [in_a_group, in_a_timeout, gathered, waited_for, with_its_own_limit])
def test_samples_that_nobody_awaits_any_more_are_cancelled(wait):
    samples, steps = Future(), Future()
    asyncio.run(wait(SampleFuture(samples)))
    asyncio.run(wait(LocalFuture(steps)))
    assert samples.cancelled() and not steps.cancelled()


def test_samples_that_others_wait_for_are_not_cancelled():
    source: Future = Future()
    future = SampleFuture(source)
    with pytest.raises(TimeoutError):
        future.result(0.01)
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(future.result)
        while not future._waiters:
            time.sleep(0.001)
        asyncio.run(in_a_timeout(future))
        assert not source.cancelled()
        source.set_result(5)
        assert thread.result() == 5


def test_a_cancelled_waiter_leaves_the_others():
    source: Future = Future()
    future = LocalFuture(source)

    async def use():
        waiting = [asyncio.create_task(future.coroutine()) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        asyncio.get_running_loop().run_in_executor(None, source.set_result, 5)
        assert await waiting[1] == 5

    asyncio.run(use())
    assert not source.cancelled() and future.result() == 5


def test_waiting_in_a_callback_is_refused_not_a_deadlock(client, loaded):
    outcomes = []
    loaded[0].gate.clear()
    first, second = (client.forward(DATA, "cross_entropy") for _ in range(2))
    seen = Future()

    def callback(_):
        try:
            outcomes.append(second.result(30))
        except RuntimeError as error:
            outcomes.append(error)
        finally:
            seen.set_result(None)

    first.future().add_done_callback(callback)
    loaded[0].gate.set()
    seen.result(30)
    assert isinstance(outcomes[0], RuntimeError)
    assert second.result(30).metrics


def test_what_is_dropped_is_given_back(models, loaded, tmp_path):
    service = jax_client.ServiceClient(config=jax_client.EngineConfig(state_dir=tmp_path), _models=models)
    client = service.create_lora_training_client(MODEL).result()
    last = client.forward(DATA, "cross_entropy")
    del service, client
    gc.collect()
    # The request is still answered.
    assert last.result(30).metrics
    del last
    gc.collect()
    assert loaded[0].closed.wait(30)
    assert loaded[0].log[-1] == "release"
