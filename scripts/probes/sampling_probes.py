"""What do the methods of SamplingClient have to answer? A small call of each, with a check of its answer."""

from __future__ import annotations

from tinker import types
from tinker.lib.api_future_impl import QueueState

from probing import Ask, World, check, close, probe


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
