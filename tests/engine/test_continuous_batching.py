"""Do requests that share a device, a cache and a batch get exactly what they get alone, and is nothing done twice?"""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.engine.core.requests import AdamSettings, GenerationRequest, GenerationResult
from jax_client.engine.engine import Engine
from jax_client.engine.sample import loop as sampler_module
from jax_client.engine.sample import sized
from jax_client.engine.sample.pages import PAGE
from jax_client.errors import RequestFailedError
from jax_client.values import AdapterState, TrainExample
from support.golden_cases import CASES, lora_values
from support.golden_engine import CROSS_ENTROPY, SPEC, open_engine, to_ours

CONFIG = CASES["llama_tied"] | {"max_position_embeddings": 512}
VOCAB = CONFIG["vocab_size"]
ADAM = AdamSettings(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=0.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("m"), CONFIG)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def snapshots(engine: Engine) -> list[Any]:
    """Return the base model and five adapters, more than one batch takes."""
    weights = to_ours(CONFIG, lora_values(CONFIG))
    states = [
        AdapterState(spec=SPEC, step=0, weights={n: a * np.float32(0.5 + 0.2 * i) for n, a in weights.items()})
        for i in range(5)
    ]
    lane = engine.open_lane()
    return [None, *(engine.snapshot(lane, state).result() for state in states)]


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([length, seed]).integers(0, VOCAB, length).astype(np.int32)


def send(engine: Engine, snapshot: Any = None, **fields: Any) -> Future[GenerationResult]:
    fields = {"tokens_T": prompt(40), "max_tokens": 20, "seed": 1} | fields
    return engine.generate(snapshot, GenerationRequest(**fields))


def same(a: GenerationResult, b: GenerationResult, atol: float = 1e-5) -> None:
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)


def test_a_request_names_its_owner_when_it_comes(engine: Engine) -> None:
    """So that it waits for no longer than its owner has to, whoever sampled before."""
    send(engine, owner="before").result()
    begun, gate = Future[None](), Future[None]()

    def hold() -> Any:
        begun.set_result(None)
        gate.result(60)
        return
        yield

    held = engine.submit(engine.open_lane(), hold())
    begun.result(60)
    answers = [send(engine, owner="b")]
    assert engine.sampler.lane.shares == {"b": 0.0} and engine.sampler.lane.due == {"b"}
    answers.append(send(engine, owner="c"))
    assert engine._dispatcher._turns.lanes[engine.sampler.lane] == ("b", "c")
    gate.set_result(None)
    for future in (held, *answers):
        future.result()


def test_a_mixed_load_gives_what_each_request_gets_alone(engine: Engine, snapshots: list[Any]) -> None:
    """Lengths, versions, settings and stops are random; whatever comes, a few programs serve it."""
    rng = np.random.default_rng(0)

    def draw(i: int) -> tuple[Any, dict[str, Any]]:
        fields = {
            "tokens_T": prompt(int(rng.integers(1, 300)), int(rng.integers(3))),
            "num_samples": int(rng.integers(1, 4)),
            "max_tokens": int(rng.integers(1, 90)),
            "temperature": float(rng.choice([0.0, 0.7, 1.0])),
            "top_k": int(rng.choice([-1, 5])),
            "top_p": float(rng.choice([0.8, 1.0])),
            "stop_ids": (int(rng.integers(VOCAB)),),
            "seed": i,
        }
        return snapshots[rng.integers(len(snapshots))], fields

    long = {"tokens_T": prompt(450), "max_tokens": 2}  # fills the larger prefill, without an adapter and with one
    load = [draw(i) for i in range(40)] + [(snapshot, long) for snapshot in snapshots[:2]]
    together = [future.result() for future in [send(engine, s, **f) for s, f in load]]
    for (snapshot, fields), result in list(zip(load, together, strict=True))[::4]:
        same(send(engine, snapshot, **fields).result(), result)
    more = [draw(i) for i in range(100, 140)]
    for future in [send(engine, s, **f) for s, f in more]:
        future.result()
    compiled = [(r["program"], r["shapes"]) for r in engine.monitor.describe()["compiled"]]
    sampling = [each for each in compiled if each[0] in ("prefill", "decode")]
    # Each of two sizes: prefill for the base model and an adapter, decode also for a mixture of adapters.
    assert len(sampling) == len(set(sampling)) <= 10


def test_the_same_programs_give_the_same_bits(engine: Engine) -> None:
    """Two rows alone, or with five more in a batch of the same size, whose rows are longer and end earlier or later."""
    one = {"tokens_T": prompt(33, 50), "max_tokens": 50, "seed": 5, "num_samples": 2}
    alone = send(engine, **one).result()
    others = [send(engine, tokens_T=prompt(20 + 40 * i, 60 + i), max_tokens=10 + 15 * i, seed=i) for i in range(5)]
    same(send(engine, **one).result(), alone, atol=0)
    for future in others:
        future.result()


def test_the_length_of_a_block_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow platform runs fewer steps in a block than a fast one."""
    results, counts = [], []
    send(engine).result()  # so that it is known what a step takes
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(sized, "BLOCK_S", seconds)
        before = engine.monitor.describe()["sampling"]["decode_blocks"]
        results.append(send(engine, tokens_T=prompt(21, 70), max_tokens=60, num_samples=3).result())
        counts.append(engine.monitor.describe()["sampling"]["decode_blocks"] - before)
    same(*results, atol=0)
    assert counts == [2, 15]


def test_identical_prompts_are_computed_once(engine: Engine, snapshots: list[Any]) -> None:
    """The load of group sampling: every prompt comes many times at once, and its tail is not a whole page."""
    shared = [prompt(100 + PAGE // 2, seed) for seed in range(100, 104)]
    before = engine.monitor.describe()["sampling"]["prompt_tokens_computed"]
    futures = [send(engine, snapshots[1], tokens_T=p, seed=i) for i in range(8) for p in shared]
    results = [future.result() for future in futures]
    computed = engine.monitor.describe()["sampling"]["prompt_tokens_computed"] - before
    assert computed == sum(len(p) - 1 for p in shared)
    cached = sorted(result.cached_tokens for result in results)
    assert cached == [0] * 4 + [len(shared[0]) - 1] * 28
    same(results[5], send(engine, snapshots[1], tokens_T=shared[1], seed=1).result())


def test_the_next_turn_finds_what_was_sampled(engine: Engine) -> None:
    first = prompt(3 * PAGE + 5, 7)
    answer = send(engine, tokens_T=first, max_tokens=2 * PAGE).result().rows[0].tokens
    turn = np.concatenate([first, answer, prompt(9)])
    result = send(engine, tokens_T=turn).result()
    assert result.cached_tokens == (len(first) + len(answer) - 1) // PAGE * PAGE
    other = send(engine, tokens_T=turn, prompt_logprobs=True).result()  # computes the prompt again, to score it
    assert other.cached_tokens == 0
    same(result, other)


def test_a_version_keeps_its_answers_and_training_its_state(engine: Engine) -> None:
    """Bit for bit: training on changes no snapshot, and sampling no weights, moments or gradients."""
    lane = engine.open_lane()
    states = AdapterState(spec=SPEC, step=0, weights=to_ours(CONFIG, lora_values(CONFIG)))
    one, twin = (engine.open_adapter(lane, states).result() for _ in range(2))
    data = [TrainExample(tokens_T=prompt(50, s), targets=prompt(50, s + 9)) for s in range(3)]
    snapshot = engine.snapshot(lane, one).result()
    first = send(engine, snapshot, num_samples=3).result()
    for _ in range(2):
        flying = []
        for adapter, sampling in ((one, True), (twin, False)):
            flying.append(engine.train_batch(lane, adapter, data, CROSS_ENTROPY))
            if sampling:
                flying += [send(engine, snapshot, num_samples=2), send(engine, None), send(engine, snapshot)]
            flying.append(engine.optim_step(lane, adapter, ADAM))
        for future in flying:
            future.result()
    same(send(engine, snapshot, num_samples=3).result(), first, atol=0)
    engine.train_batch(lane, one, data, CROSS_ENTROPY).result()
    send(engine, engine.snapshot(lane, one).result()).result()
    engine.train_batch(lane, twin, data, CROSS_ENTROPY).result()
    for name in ("weights", "mu", "nu", "grads"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(twin, name))
    newer = send(engine, engine.snapshot(lane, one).result(), num_samples=3).result()
    assert newer.rows[0].logprobs.tolist() != first.rows[0].logprobs.tolist()


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Engine]:
    """Return an engine whose cache holds one full context and little more."""
    monkeypatch.setattr(sized, "CPU", replace(sized.CPU, tokens_per_row=8))
    engine = open_engine(tmp_path / "m", CONFIG)
    yield engine
    engine.close()


def test_rows_that_find_no_pages_wait_and_lose_nothing(engine: Engine, tight: Engine) -> None:
    requests = [{"tokens_T": prompt(30, i), "max_tokens": 200, "seed": i} for i in range(6)]
    results = [future.result() for future in [send(tight, **r) for r in requests]]
    assert tight.monitor.describe()["sampling"]["cache_tokens"] < 6 * 230
    for request, result in zip(requests, results, strict=True):
        same(send(engine, **request).result(), result)
    schedule = tight.sampler._schedule
    assert schedule is not None and all(pages.available == pages.count - 1 for pages in schedule.pages), "none is lost"


def test_a_cache_that_comes_back_smaller_refuses_what_it_cannot_hold(
    engine: Engine, tight: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on with the rest; it grows again when it is idle and there is memory."""
    long, short = {"max_tokens": 450, "seed": 2}, {"max_tokens": 250, "seed": 3}
    extend, fitting = sized.extend, type(tight.sampler)._fitting_pages

    def release() -> Any:
        monkeypatch.setattr(tight.sampler, "_fitting_pages", lambda there: 10)
        return tight.sampler.release_cache()
        yield

    def extend_once_without_cache(*args: Any) -> None:
        monkeypatch.setattr(sized, "extend", extend)
        assert tight._dispatcher.submit(tight.open_lane(), release()).result()
        extend(*args)

    monkeypatch.setattr(sized, "extend", extend_once_without_cache)
    futures = [send(tight, **long), send(tight, **short)]
    with pytest.raises(RequestFailedError, match="490 tokens together, but the memory that is left holds 320"):
        futures[0].result(timeout=60)
    same(send(engine, **short).result(), futures[1].result(timeout=60))
    monkeypatch.setattr(tight.sampler, "_fitting_pages", partial(fitting, tight.sampler))
    same(send(engine, **long).result(), send(tight, **long).result(timeout=60))


def test_an_answered_request_keeps_no_weights(engine: Engine) -> None:
    """Not even until the garbage collector looks for cycles: a loop takes new weights with every step."""
    weights = to_ours(CONFIG, lora_values(CONFIG))
    snapshot = engine.snapshot(engine.open_lane(), AdapterState(spec=SPEC, step=0, weights=weights)).result()
    array = weakref.ref(jax.tree.leaves(snapshot.weights)[0])
    gc.collect()
    gc.disable()
    try:
        send(engine, snapshot, num_samples=2, prompt_logprobs=True).result()
        send(engine, snapshot, tokens_T=prompt(70), max_tokens=1).result()
        del snapshot
        send(engine).result()  # the last turn's arguments are those of another request
        assert array() is None
    finally:
        gc.enable()


def test_the_cache_can_go_while_rows_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes after every third block, before what the block drew has been looked at."""
    requests = [{"tokens_T": prompt(60, i), "max_tokens": 150, "seed": i, "num_samples": 2} for i in range(4)]
    extend, calls, released = sized.extend, itertools.count(), []

    def release() -> Any:
        return engine.sampler.release_cache()
        yield

    def extend_without_cache(*args: Any) -> None:
        if next(calls) % 3 == 0:
            released.append(engine._dispatcher.submit(engine.open_lane(), release()).result())
        extend(*args)

    monkeypatch.setattr(sized, "extend", extend_without_cache)
    futures = [send(engine, **r) for r in requests]
    for future in futures:
        future.result()
    monkeypatch.undo()
    assert len(released) >= 2 and all(released)
    for request, future in zip(requests, futures, strict=True):
        same(send(engine, **request).result(), future.result())


def test_cancelling_frees_the_rows(engine: Engine) -> None:
    def after() -> Any:
        return True
        yield

    def sampling() -> dict[str, float]:
        return engine.monitor.usage()["sampling"]

    long, short = [send(engine, max_tokens=400) for _ in range(1024)], send(engine, max_tokens=4)
    while sampling()["rows_running"] < 32:
        time.sleep(0.001)
    assert all(future.cancel() for future in [*long, short])
    before = sampling()["decode_blocks"]
    send(engine, max_tokens=4).result()
    assert sampling()["decode_blocks"] - before <= 3, "one block in flight, and those of four tokens"
    assert engine._dispatcher.submit(engine.sampler.lane, after()).result()  # when nothing is left to serve
    assert [sampling()[name] for name in ("rows_running", "rows_waiting", "pages_used")] == [0, 0, 0]


def test_a_failed_program_fails_what_it_ran_and_nothing_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    send(engine).result()
    decode = engine.sampler._programs.decode

    def fail(*_: Any) -> Any:
        monkeypatch.setattr(engine.sampler._programs, "decode", decode)
        raise jax.errors.JaxRuntimeError("INTERNAL: something broke")

    monkeypatch.setattr(engine.sampler._programs, "decode", fail)
    with pytest.raises(RequestFailedError, match="something broke"):
        send(engine).result()
    assert len(send(engine).result().rows[0].tokens) == 20


def test_the_queue_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "MAX_WAITING", 50)
    waiting = send(engine, num_samples=45, max_tokens=60)
    with pytest.raises(RequestFailedError, match="45 samples wait already, and 6 more would pass the limit of 50"):
        send(engine, num_samples=6)
    waiting.result()
    send(engine, num_samples=6).result()


def test_scores_of_a_prompt(engine: Engine, snapshots: list[Any]) -> None:
    """Targets, likeliest tokens, alternatives and the prompt's own agree, over a prompt of several tiles."""
    tokens, k = prompt(90, 3), min(64, VOCAB)
    targets = np.random.default_rng(1).integers(-1, VOCAB, (89, 5)).astype(np.int32)
    asks = {"prompt_logprobs": True, "topk_prompt": k, "targets_TK": targets, "alternatives": 3}
    result = send(engine, snapshots[2], tokens_T=tokens, num_samples=0, max_tokens=0, **asks).result()
    adapter = snapshots[2]
    full = {}
    for i in range(89):
        assert result.topk_ids_Tk is not None and result.topk_logprobs_Tk is not None
        full[i] = dict(zip(result.topk_ids_Tk[i + 1].tolist(), result.topk_logprobs_Tk[i + 1].tolist(), strict=True))
        assert result.prompt_logprobs_T is not None and result.target_logprobs_TK is not None
        own = int(tokens[i + 1])
        if own in full[i]:
            assert result.prompt_logprobs_T[i + 1] == pytest.approx(full[i][own], abs=1e-6)
        for j, target in enumerate(targets[i].tolist()):
            if target < 0:
                assert result.target_logprobs_TK[i, j] == 0
            elif target in full[i]:
                assert result.target_logprobs_TK[i, j] == pytest.approx(full[i][target], abs=1e-6)
        assert result.alternative_ids_Tk is not None and result.alternative_logprobs_Tk is not None
        for token, logprob in zip(result.alternative_ids_Tk[i], result.alternative_logprobs_Tk[i], strict=True):
            if int(token) in full[i]:
                assert logprob == pytest.approx(full[i][int(token)], abs=1e-6)
    last = send(engine, adapter, tokens_T=tokens, num_samples=0, max_tokens=0, prompt_logprobs=True, score_last=7)
    scored = last.result()
    assert scored.cached_tokens == 64 and scored.prompt_logprobs_T is not None
    assert np.isnan(scored.prompt_logprobs_T[:-7]).all()
    np.testing.assert_allclose(scored.prompt_logprobs_T[-7:], result.prompt_logprobs_T[-7:], atol=1e-5)


def test_the_likeliest_at_sampled_positions(engine: Engine) -> None:
    row = send(engine, topk_sample=4, temperature=0.0, max_tokens=40).result().rows[0]
    assert row.top_ids is not None and row.top_logprobs is not None and row.top_ids.shape == (40, 4)
    assert row.top_ids[:, 0].tolist() == row.tokens.tolist()
    np.testing.assert_allclose(row.top_logprobs[:, 0], row.logprobs, atol=1e-6)
    assert (np.diff(row.top_logprobs, axis=1) <= 0).all()


def test_alternatives_follow_the_distribution(engine: Engine) -> None:
    """Drawn at the request's temperature: chi-square against the scores of all tokens; the bound is the 0.1 % tail."""
    tokens = prompt(2, 5)
    everything = np.arange(VOCAB, dtype=np.int32)
    ids = np.array_split(everything, -(-VOCAB // 100))
    scores = [
        send(engine, tokens_T=tokens, num_samples=0, max_tokens=0, targets_TK=part[None]).result().target_logprobs_TK
        for part in ids
    ]
    p = np.exp(np.concatenate([s[0] for s in scores if s is not None]) / 0.8)
    p /= p.sum()
    asks = {"tokens_T": tokens, "num_samples": 0, "max_tokens": 0, "alternatives": 16, "temperature": 0.8}
    futures = [send(engine, seed=seed, **asks) for seed in range(100)]
    drawn = np.concatenate([f.result().alternative_ids_Tk[0] for f in futures])  # type: ignore[index]
    counts, expected = np.bincount(drawn, minlength=VOCAB), len(drawn) * p
    common = expected >= 5
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    keep = wanted > 0
    chi2, degrees = ((seen - wanted)[keep] ** 2 / wanted[keep]).sum(), keep.sum() - 1
    assert chi2 < degrees + 3.1 * np.sqrt(2 * degrees) + 4


def test_training_takes_the_caches_memory_before_it_gives_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-memory step runs again without the cache; the rows that ran go on afterwards."""
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    data = [TrainExample(tokens_T=prompt(50), targets=prompt(50))]
    expected = send(engine, max_tokens=200).result()
    forward, limit = engine.trainer.programs.forward, engine.monitor.describe()["max_tokens_per_micro_batch"]

    def first_runs_out(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(engine.trainer.programs, "forward", forward)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(engine.trainer.programs, "forward", first_runs_out)
    running = send(engine, max_tokens=200)
    engine.train_batch(lane, adapter, data, CROSS_ENTROPY).result()
    assert engine.monitor.describe()["max_tokens_per_micro_batch"] == limit
    same(running.result(), expected)
