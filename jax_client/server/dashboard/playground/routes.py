"""Which routes let a person talk to a model? One samples, one scores; both answer with tokens, texts and logprobs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jax_client.errors import BadRequestError, JaxClientError, RequestFailedError, first_line
from jax_client.server.dashboard.answers import api_route, json_answer, object_of
from jax_client.server.dashboard.playground.asked import (
    DEFAULT_TOKENS,
    SampleAsked,
    ScoreAsked,
    Weights,
    sample_asked,
    score_asked,
)
from jax_client.server.dashboard.playground.chat import chat_tokens
from jax_client.server.dashboard.playground.samplers import IDLE_SECONDS, Name, Samplers
from jax_client.server.dashboard.playground.token_texts import Alternatives, token_texts
from jax_client.server.wire.accounts import BusyError
from jax_client.server.wire.pools import run_work
from jax_client.values import JsonObject

if TYPE_CHECKING:
    from tinker import types
    from transformers import PreTrainedTokenizerFast

    from jax_client.runs.lifecycle.sampler_handle import SamplerHandle

T = TypeVar("T")
MOST_RUNNING = 8
# Between two looks whether the browser is still there.
_LOOK_SECONDS = 0.5


class Playground:
    """The playground of one owner.

    Args:
        samplers: what is loaded for it.
        models: `models() -> names of base models` to choose from; reads files.
        meaning: `meaning(name) -> base model`; raises BadRequestError for one that is not to be loaded.
    """

    def __init__(self, samplers: Samplers, models: Callable[[], Sequence[str]], meaning: Callable[[str], str]) -> None:
        self.samplers = samplers
        self._models, self._meaning = models, meaning
        self._running = 0

    def describe(self) -> JsonObject:
        """Return whether models can be loaded, which, and what is being loaded; reads files."""
        refusal = self.samplers.refusal()
        return {
            "available": refusal is None,
            "reason": refusal,
            "models": list(self._models()),
            "loading": self.samplers.loading(),
        }

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            api_route("POST", "/playground/sample", self._sample),
            api_route("POST", "/playground/score", self._score),
        ]

    async def _sample(self, request: Request) -> Response:
        asked = sample_asked(await object_of(request))
        return json_answer(await self._with(request, asked.weights, lambda sampler: _sampled(request, sampler, asked)))

    async def _score(self, request: Request) -> Response:
        asked = score_asked(await object_of(request))
        return json_answer(await self._with(request, asked.weights, lambda sampler: _scored(request, sampler, asked)))

    async def _with(
        self, request: Request, weights: Weights, work: Callable[[SamplerHandle], Awaitable[JsonObject]]
    ) -> JsonObject:
        """Return what `work(sampler)` answers, with the seconds that it took, after what was to be loaded."""
        name: Name = weights.path, "" if weights.path else await run_work(self._meaning, weights.model)
        if self._running >= MOST_RUNNING:
            raise BusyError(f"{MOST_RUNNING} requests of pages are running; wait for one to end.")
        self._running += 1
        taken = self.samplers.take(name)
        try:
            sampler = await _awaited(request, taken.handle, cancel=False)
            start = time.monotonic()
            found = await work(sampler)
            return found | {"seconds": round(time.monotonic() - start, 4)}
        except (JaxClientError, asyncio.CancelledError):
            raise
        except RuntimeError as error:  # such as of a device that has no memory left
            raise RequestFailedError(f"the model did not answer: {first_line(error)}.", category="server") from error
        finally:
            self._running -= 1
            await run_work(self.samplers.give, taken)
            loop = asyncio.get_running_loop()
            loop.call_later(IDLE_SECONDS + 1, self._release_idle)

    def _release_idle(self) -> None:
        # Held, because a loop keeps only weak references to its tasks.
        self._freeing = asyncio.ensure_future(run_work(self.samplers.release_idle))


async def _awaited(request: Request, future: Future[T], *, cancel: bool = True) -> T:
    """Return the result of a future; where the browser leaves before that, stop waiting, and cancel it if asked."""
    wrapped = asyncio.wrap_future(future)
    # Looked at, also where nobody waits any more: else the loop would complain.
    wrapped.add_done_callback(lambda done: done.cancelled() or done.exception())
    while not (await asyncio.wait([wrapped], timeout=_LOOK_SECONDS))[0]:
        if await request.is_disconnected():
            if cancel:
                future.cancel()
            raise BadRequestError("the browser has left.")
    return wrapped.result()


async def _sampled(request: Request, sampler: SamplerHandle, asked: SampleAsked) -> JsonObject:
    from tinker import types

    tokenizer = await run_work(sampler.model_ref.model.tokenizer)
    prompt_ids = await run_work(_prompt_ids, tokenizer, asked)
    prompt = types.ModelInput.from_ints(prompt_ids)
    room = max(1, sampler.model_ref.model.engine.model.max_context - len(prompt_ids))
    params = types.SamplingParams(
        max_tokens=asked.max_tokens or min(DEFAULT_TOKENS, room),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=asked.seed,
    )
    # Two requests: what is drawn is then what the same call of the SDK draws, which need not score the prompt.
    drawing = sampler.sample(prompt, asked.num_samples, params, topk_sample_logprobs=asked.alternatives)
    scoring = sampler.compute_logprobs(prompt, None) if len(prompt_ids) > 1 else None
    drawn = await _awaited(request, drawing)
    scored = [None] if scoring is None else await _awaited(request, scoring)
    return await run_work(_shown, tokenizer, prompt_ids, scored, drawn.sequences) | {"seed": asked.seed}


async def _scored(request: Request, sampler: SamplerHandle, asked: ScoreAsked) -> JsonObject:
    from tinker import types

    tokenizer = await run_work(sampler.model_ref.model.tokenizer)
    whole = types.ModelInput.from_ints([*asked.prompt_ids, *asked.ids])
    logprobs = (await _awaited(request, sampler.compute_logprobs(whole, len(asked.ids))))[-len(asked.ids) :]
    texts = await run_work(token_texts, _decoder(tokenizer), asked.ids)
    rows = zip(asked.ids, texts, logprobs, strict=True)
    return {"tokens": [{"id": index, "text": text, "logprob": _finite(logprob)} for index, text, logprob in rows]}


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, asked: SampleAsked) -> list[int]:
    if asked.prompt_ids is not None:
        return asked.prompt_ids
    if asked.messages is not None:
        return chat_tokens(tokenizer, asked.messages)
    ids = list(tokenizer.encode(asked.prompt or ""))
    if not ids:
        raise BadRequestError("the prompt has no tokens; give more text.")
    return ids


def _decoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _shown(
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: list[int],
    scored: Sequence[float | None],
    sequences: Sequence[types.SampledSequence],
) -> JsonObject:
    decode = _decoder(tokenizer)
    alternatives = Alternatives(decode)
    prompt = zip(prompt_ids, token_texts(decode, prompt_ids), scored, strict=True)
    return {
        "prompt": [{"id": index, "text": text, "logprob": _finite(logprob)} for index, text, logprob in prompt],
        "samples": [_sample(decode, alternatives, sequence) for sequence in sequences],
    }


def _sample(
    decode: Callable[[list[int]], str], alternatives: Alternatives, sequence: types.SampledSequence
) -> JsonObject:
    ids, logprobs, likeliest = sequence.tokens, sequence.logprobs or [], sequence.topk_logprobs or []
    tokens = []
    for place, (index, text) in enumerate(zip(ids, token_texts(decode, ids), strict=True)):
        top = likeliest[place] or [] if place < len(likeliest) else []
        others = [{"id": other, "text": alternatives.text(other), "logprob": _finite(p)} for other, p in top]
        rank = next((rank for rank, (other, _) in enumerate(top, 1) if other == index), None)
        logprob = _finite(logprobs[place]) if place < len(logprobs) else None
        tokens.append({"id": index, "text": text, "logprob": logprob, "rank": rank, "alternatives": others})
    return {"tokens": tokens, "text": decode(ids), "stop_reason": sequence.stop_reason}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
