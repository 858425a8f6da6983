"""Does an error reach the parent of a worker process, and does a client that cannot work there end the worker?"""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import os
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import tinker

import jax_client
from jax_client import errors
from jax_client.clients import sdk_errors
from jax_client.clients.futures import LocalFuture
from support import fake_engine
from support.fake_engine import DATA, PARAMS, PROMPT
from support.pickled_child import bad_call

client, loaded, service = fake_engine.client, fake_engine.loaded, fake_engine.service
models = fake_engine.models


def error_classes() -> Iterator[type[BaseException]]:
    """Yield every error class of the package."""
    for found in pkgutil.walk_packages(jax_client.__path__, "jax_client."):
        module = importlib.import_module(found.name)
        for value in list(vars(module).values()):
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == module.__name__:
                yield value


def samples_of(kind: type[BaseException]) -> Iterator[BaseException]:
    """Yield errors of a class as they are raised, and as the clients raise them."""
    args = ("no [index 3]", "r1", "user") if issubclass(kind, errors.RequestFailedError) else ("no [index 3]",)
    error = kind(*args)
    error.add_note("a note")
    yield error
    if isinstance(error, errors.JaxClientError):
        yield sdk_errors.translate(error)


def test_every_error_and_its_class_can_be_pickled() -> None:
    kinds = set(error_classes())
    assert {errors.BadRequestError, errors.DoesNotFitError} < kinds and len(kinds) > 12
    for kind in kinds:
        for error in samples_of(kind):
            ways: list[Callable[[Any], Any]] = [
                copy.copy,
                copy.deepcopy,
                lambda x: pickle.loads(ForkingPickler.dumps(x)),
            ]
            ways += [lambda x, p=p: pickle.loads(pickle.dumps(x, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
            for way in ways:
                again = way(error)
                assert type(again) is type(error) and way(type(error)) is type(error), kind
                assert str(again) == str(error) and again.__notes__ == ["a note"], kind
            # What torch's DataLoader does with the class that a worker raised.
            assert str(type(error)("worker 0: no")) == "worker 0: no", kind


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_process_raises_the_clients_errors(method: str) -> None:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method))
    with pool, pytest.raises(tinker.BadRequestError, match=r"^rank is 0; give 1 or more\.$") as caught:
        pool.submit(bad_call).result(60)
    assert isinstance(caught.value, errors.BadRequestError) and caught.value.status_code == 400


def in_fork(call: Callable[[], object]) -> str:
    """Return what a call says in a forked process, and at most ten seconds later."""
    here, there = multiprocessing.Pipe()

    def work() -> None:
        try:
            there.send(f"gave {call()!r}")
        except Exception as error:
            there.send(f"{type(error).__name__}: {error}")

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    try:
        assert here.poll(10), "it hangs"
        return here.recv()
    finally:
        worker.kill()
        worker.join()


FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")


@FORKS
def test_what_a_fork_inherited_says_so_or_works(service: Any, client: Any) -> None:
    sampler = client.save_weights_and_get_sampling_client()
    done = client.forward(DATA, "cross_entropy")
    done.result(10)
    pending = LocalFuture(Future())
    parent = os.getpid()
    for call in (pending.result, lambda: pickle.dumps(pending)):
        said = in_fork(call)
        assert said.startswith(("UnsupportedError: this future came from process", "BadTypeError: a LocalFuture")), said
    assert f"from process {parent} by a fork" in in_fork(lambda: sampler.sample(PROMPT, 1, PARAMS).result())
    assert in_fork(lambda: sorted(done.result().metrics)).startswith("gave [")
    assert in_fork(lambda: service.close("success").result()) == "gave None", "closing is the parent's to do"
    assert client.forward(DATA, "cross_entropy").result(10).metrics, "the parent goes on"


def test_what_cannot_go_to_another_process_says_so(service: Any, client: Any) -> None:
    for one in (service, client, service.create_rest_client(), client.forward(DATA, "cross_entropy")):
        with pytest.raises(TypeError, match=rf"a {type(one).__name__} cannot be pickled: .* SamplingClient") as caught:
            pickle.dumps(one)
        assert isinstance(caught.value, tinker.BadRequestError)
        assert copy.copy(one) is one and copy.deepcopy({"client": one})["client"] is one


class Scored:
    """A dataset whose items are computed with a client that the worker inherited."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return self.sampler.compute_logprobs(PROMPT).result()


@FORKS
@pytest.mark.torch
def test_a_worker_of_a_data_loader_ends_with_the_clients_message(client: Any) -> None:
    from torch.utils.data import DataLoader

    dataset: Any = Scored(client.save_weights_and_get_sampling_client())
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context="fork", timeout=20)
    with pytest.raises(tinker.BadRequestError, match=r"(?s)DataLoader worker.*from process \d+ by a fork.* Pickle it"):
        list(loader)
