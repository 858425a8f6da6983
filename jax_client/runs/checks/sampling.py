"""Which sampling requests are accepted? `generation` refuses the others and returns the engine's request."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import numpy as np
from tinker import types

from jax_client.engine.core.requests import (
    MAX_ALTERNATIVES,
    MAX_TARGETS,
    MAX_TOPK_PROMPT,
    MAX_TOPK_SAMPLE,
    GenerationRequest,
)
from jax_client.errors import BadRequestError, BadTypeError
from jax_client.runs.checks.numbers import FLOAT32_LARGEST, flag, integer, real, shown
from jax_client.runs.checks.stop_strings import StopStrings
from jax_client.runs.checks.tensors import dense, token_ids
from jax_client.runs.checks.tokens import text_tokens

MAX_SAMPLES = 16_384
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096
MAX_SAMPLING_SEED = 2**63 - 1
# What is meant by the values that other libraries take and this API refuses.
_TOP_P_HINT = "1 turns it off; for greedy sampling set temperature=0."
_MAX_TOKENS_HINT = "None takes the rest of the context; to score a prompt without sampling, call compute_logprobs."


def generation(
    prompt: object,
    num_samples: object,
    sampling_params: object,
    *,
    include_prompt_logprobs: object = False,
    topk_prompt_logprobs: object = 0,
    topk_sample_logprobs: object = 0,
    target_prompt_logprobs: object = None,
    prompt_alt_tokens_k: object = 0,
    prompt_logprobs_last_n: object = None,
    vocab_size: int,
    max_context: int,
    eos_token_ids: Sequence[int],
    decode: Callable[[list[int]], str],
) -> GenerationRequest:
    """Check a sample call.

    Args:
        prompt: ModelInput of text.
        num_samples: 1 to 16,384.
        sampling_params: SamplingParams; max_tokens None is the rest of the context, seed None draws one.
        include_prompt_logprobs: score the prompt.
        topk_prompt_logprobs: 0 to 128.
        topk_sample_logprobs: 0 to 20.
        target_prompt_logprobs: int64 TensorData (T - 1, K) of ids, K up to 127, dense or sparse; -1 asks for nothing.
        prompt_alt_tokens_k: 0 to 16.
        prompt_logprobs_last_n: None, or 1 to the prompt's length less one.
        vocab_size: token ids are below it.
        max_context: the most tokens of prompt and answer together. Where the prompt is scored, one token may follow a
            prompt that fills it: it is drawn from the scores of the last position, and takes no place.
        eos_token_ids: end a row, unless the stop list is empty or made of ids.
        decode: from token ids to text, for stop strings.

    Raises:
        BadTypeError: an argument has the wrong type.
        UnsupportedError: a prompt that is not text.
        BadRequestError: a value out of range.
    """
    tokens_T = text_tokens(prompt, "prompt", vocab_size, max_context)
    include = flag("include_prompt_logprobs", include_prompt_logprobs)
    last_n = _last_n(prompt_logprobs_last_n, include, len(tokens_T))
    if not isinstance(sampling_params, types.SamplingParams):
        raise BadTypeError(
            f"sampling_params is {shown(sampling_params)} ({type(sampling_params).__name__}), expected SamplingParams."
        )
    params = sampling_params
    stop_ids, find_stop = _stops(params.stop, vocab_size, eos_token_ids, decode)
    top_k = integer("SamplingParams.top_k", params.top_k, -1, 2**31 - 1, "-1 turns it off.")
    if top_k == 0:
        raise BadRequestError("SamplingParams.top_k is 0; give 1 or more, or -1 to turn it off.")
    seed = params.seed
    targets_TK = None
    if target_prompt_logprobs is not None:
        targets_TK = _targets(target_prompt_logprobs, len(tokens_T), vocab_size)
    alternatives = integer("prompt_alt_tokens_k", prompt_alt_tokens_k, 0, MAX_ALTERNATIVES, "0 turns it off.")
    topk_prompt = integer("topk_prompt_logprobs", topk_prompt_logprobs, 0, MAX_TOPK_PROMPT, "0 turns it off.")
    scores = include or topk_prompt > 0 or targets_TK is not None or alternatives > 0
    return GenerationRequest(
        tokens_T=tokens_T,
        num_samples=integer("num_samples", num_samples, 1, MAX_SAMPLES, "Call sample several times for more."),
        max_tokens=_max_tokens(params.max_tokens, len(tokens_T), max_context, scores=scores),
        temperature=real("SamplingParams.temperature", params.temperature, 0, FLOAT32_LARGEST, hint="0 is greedy."),
        top_k=-1 if top_k >= vocab_size else top_k,
        top_p=real("SamplingParams.top_p", params.top_p, 0, 1, low_open=True, hint=_TOP_P_HINT),
        seed=secrets.randbits(31) if seed is None else integer("SamplingParams.seed", seed, 0, MAX_SAMPLING_SEED),
        stop_ids=stop_ids,
        find_stop=find_stop,
        prompt_logprobs=include,
        topk_prompt=topk_prompt,
        topk_sample=integer("topk_sample_logprobs", topk_sample_logprobs, 0, MAX_TOPK_SAMPLE, "0 turns it off."),
        targets_TK=targets_TK,
        alternatives=alternatives,
        score_last=last_n,
    )


def _targets(tensor: object, length: int, vocab_size: int) -> np.ndarray:
    field = "target_prompt_logprobs"
    ids_TK = dense(tensor, field, pad=-1)
    if ids_TK.ndim != 2 or len(ids_TK) != length - 1:
        raise BadRequestError(
            f"{field} has shape {list(ids_TK.shape)}; a prompt of {length} tokens needs [{length - 1}, K]: row i is "
            "about token i + 1."
        )
    if not 1 <= ids_TK.shape[1] < MAX_TARGETS:
        raise BadRequestError(
            f"{field} has {ids_TK.shape[1]} ids per position; the limit is 1 to {MAX_TARGETS - 1}. Send several "
            "requests for more."
        )
    return token_ids(ids_TK, field, vocab_size, or_nothing=True)


def _last_n(last_n: object, include: bool, length: int) -> int | None:
    if last_n is None:
        return None
    # A prompt of one token has nothing to score; the range check then names 1, the smallest value there is.
    number = integer("prompt_logprobs_last_n", last_n, 1, max(1, length - 1), "The first prompt token has no logprob.")
    if not include:
        raise BadRequestError(
            f"prompt_logprobs_last_n is {last_n}, but include_prompt_logprobs is False; "
            "prompt_logprobs_last_n applies to prompt logprobs; set include_prompt_logprobs=True."
        )
    return number


def _max_tokens(value: object, length: int, max_context: int, *, scores: bool) -> int:
    wanted = max(1, max_context - length) if value is None else value
    most = integer("SamplingParams.max_tokens", wanted, 1, None, _MAX_TOKENS_HINT)
    if length + most > max_context and not (scores and most == 1):
        raise BadRequestError(
            f"Prompt length plus max_tokens exceeds the model's context window: {length} + {most} > {max_context}. "
            "Shorten the prompt, or lower SamplingParams.max_tokens; None takes the rest of the context."
        )
    return most


def _stops(
    stop: object, vocab_size: int, eos_token_ids: Sequence[int], decode: Callable[[list[int]], str]
) -> tuple[tuple[int, ...], StopStrings | None]:
    field = "SamplingParams.stop"
    if stop is None:
        return tuple(eos_token_ids), None
    items = [stop] if isinstance(stop, str) else stop
    if not isinstance(items, (list, tuple)):
        raise BadTypeError(
            f"{field} is {shown(stop)} ({type(stop).__name__}); give text, a list of texts or a list of token ids."
        )
    if len(items) > MAX_STOPS:
        raise BadRequestError(f"{field} has {len(items)} entries; the limit is {MAX_STOPS}.")
    if all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items):
        ids = (integer(f"{field}[{i}]", item, 0, vocab_size - 1, "Token ids.") for i, item in enumerate(items))
        return tuple(dict.fromkeys(ids)), None
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise BadTypeError(
                f"{field}[{i}] is {shown(item)} ({type(item).__name__}); give all entries as text or all as token ids."
            )
        if not 1 <= len(item) <= MAX_STOP_CHARACTERS:
            raise BadRequestError(
                f"{field}[{i}] has {len(item)} characters; a stop string has 1 to {MAX_STOP_CHARACTERS}."
            )
    return tuple(eos_token_ids), StopStrings(stops=tuple(dict.fromkeys(items)), decode=decode)
