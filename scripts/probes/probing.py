"""How is a method probed? It is called and what it gives is checked, or it is refused by an error that was foreseen."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tinker
from tinker import types

RANK = 4
ADAM = types.AdamParams(learning_rate=1e-2)
METADATA = {"made_by": "probe"}
PROJECT = "probe"
# Rows of the table that are no methods but arguments.
ARGUMENTS = "Arguments"
# How most refusals are raised: in the call, and by the future of a request that a server has taken.
BAD, FAILED = tinker.BadRequestError, tinker.RequestFailedError
_FUTURE = re.compile(r"(APIFuture\[|AwaitableConcurrentFuture\[|Backcompat\w+Future$)")


class WrongError(Exception):
    """A method answered something else than it promises."""


def check(right: object, said: str) -> None:
    """Raise WrongError unless `right`."""
    if not right:
        raise WrongError(said)


def close(ours: Any, theirs: Any, what: str) -> None:
    """Raise WrongError unless two lists of logprobs agree to 1e-4 nats, None in the same places."""
    pairs = list(zip(ours, theirs, strict=True))
    same = [a is b if a is None or b is None else math.isclose(a, b, abs_tol=1e-4, rel_tol=1e-4) for a, b in pairs]
    check(all(same), f"{what}: {list(ours)} is not {list(theirs)}")


class Ask:
    """Calls the method under test, and waits for what it gives.

    That it gives a future where the SDK says so, and the value itself elsewhere, is checked too.

    Args:
        client: the SDK's class.
        method: its method.
    """

    def __init__(self, client: str, method: str) -> None:
        self.client, self.method = client, method
        self.refusal: BaseException | None = None

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method on `target`."""
        theirs = getattr(getattr(tinker, self.client), self.method)
        self._future = bool(_FUTURE.match(str(inspect.signature(theirs).return_annotation)))
        return self.of(lambda: getattr(target, self.method)(*args, **kwargs), self._settle)

    def of(self, call: Callable[[], Any], settle: Callable[[Any], Any] | None = None) -> Any:
        """Make any call; what it raises is what the method under test refuses."""
        try:
            given = call()
            return (settle or _value)(given)
        except Exception as error:
            self.refusal = error
            raise

    def _settle(self, given: Any) -> Any:
        if not inspect.iscoroutine(given):
            self._check_kind(given)
            return _value(given)

        async def finish() -> Any:
            awaited = await given
            self._check_kind(awaited)
            return await awaited if self._future else awaited

        return asyncio.run(finish())

    def _check_kind(self, given: Any) -> None:
        check(
            isinstance(given, tinker.APIFuture) is self._future,
            f"gives {type(given).__name__}, which is {'no ' if self._future else 'a '}future",
        )


def _value(given: Any) -> Any:
    return given.result() if isinstance(given, tinker.APIFuture) else given


@dataclass(kw_only=True)
class World:
    """What the probes of one side use.

    Attributes:
        side: "in-process" or "served".
        module: where that side's clients come from.
        where: the arguments that lead them there.
        model: directory of a tiny model.
    """

    side: str
    module: Any
    where: Mapping[str, Any]
    model: str

    def __post_init__(self) -> None:
        self.data = [_datum([3, 1, 4, 1, 5, 9]), _datum([2, 7, 1, 8, 2, 8, 1, 8, 2])]
        # As the trainer scores its first datum, so that both can be compared.
        self.prompt = types.ModelInput.from_ints([3, 1, 4, 1, 5, 9])
        self.service = self.new_service()
        self.rest = self.module.RestClient(**self.where)
        self.training = self.new_training()
        self.step(self.training)
        self.state = self.training.save_state("start", user_metadata=METADATA).result().path
        self.saved = self.training.save_weights_for_sampler("start").result().path
        self.scores = self.score(self.training)
        self.sampler = self.service.create_sampling_client(model_path=self.saved).result()
        self.run_id = self.training.model_id
        self.session_id = self.run_id.partition(":train:")[0]

    def new_service(self) -> Any:
        """Return a client of a session of its own."""
        return self.module.ServiceClient(METADATA, PROJECT, display_name="probe", **self.where)

    def new_training(self) -> Any:
        """Return a client of a fresh adapter."""
        # Without the output projection, which cannot be exported where it is tied.
        return self.service.create_lora_training_client(self.model, rank=RANK, seed=1, train_unembed=False).result()

    def step(self, training: Any) -> None:
        """Train one step."""
        training.forward_backward(self.data, "cross_entropy")
        training.optim_step(ADAM).result()

    def score(self, training: Any) -> list[float | None]:
        """Return the trainer's logprobs of the first datum, in the form of a sampler's of its whole prompt."""
        output = training.forward(self.data, "cross_entropy").result().loss_fn_outputs[0]
        return [None, *output["logprobs"].to_numpy().tolist()]

    def with_futures(self) -> World:
        """Return the same with clients that are futures, which the SDK lets callers use as the clients themselves."""
        other = copy.copy(self)
        other.training = self.service.create_training_client_from_state_with_optimizer(self.state)
        other.sampler = self.service.create_sampling_client(model_path=self.saved)
        other.run_id = other.training.model_id
        return other

    def checkpoint(self, path: str) -> types.Checkpoint | None:
        """Return what is listed of a checkpoint, None if nothing."""
        run = types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
        found = self.rest.list_checkpoints(run).result().checkpoints
        return next((each for each in found if each.tinker_path == path), None)

    @functools.cached_property
    def handle(self) -> tinker.LossHandle:
        """A custom loss of this session."""
        return self.service.create_custom_loss(negative_sum, {"logprobs": 1, "weights": 1}).result()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One method, or one argument.

    Attributes:
        client: the SDK's class.
        method: its method.
        run: calls it and checks.
        refused: by which error each side that does not serve it says so.
        absent: why jax_client's own class has no such member, None if it has.
    """

    client: str
    method: str
    run: Callable[[World, Ask], None]
    refused: Mapping[str, type[BaseException]]
    absent: str | None


PROBES: list[Probe] = []


def probe(
    client: str,
    *methods: str,
    in_process: type[BaseException] | None = None,
    served: type[BaseException] | None = None,
    absent: str | None = None,
) -> Callable[[Callable[[World, Ask], None]], Callable[[World, Ask], None]]:
    """Register a probe of each method named; `in_process` and `served` are the errors by which it is refused there."""
    refused = {side: error for side, error in (("in-process", in_process), ("served", served)) if error is not None}

    def register(run: Callable[[World, Ask], None]) -> Callable[[World, Ask], None]:
        for method in methods:
            PROBES.append(Probe(client=client, method=method, run=run, refused=refused, absent=absent))
        return run

    return register


def negative_sum(logprobs: Any, weights: Any) -> Any:
    """Be cross_entropy, as a custom loss."""
    loss = -(logprobs * weights).sum()
    return loss, {"custom/negative_sum:sum": loss}


def _datum(tokens: list[int]) -> types.Datum:
    inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
