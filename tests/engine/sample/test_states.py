"""Are the states of recurrent layers where the schedule says, and do samples not depend on which of them are kept?"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from jax_client.engine.core.requests import GenerationRequest, GenerationResult
from jax_client.engine.engine import Engine
from jax_client.engine.sample.cache_size import state_bytes
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.rows import Job, Row
from jax_client.engine.sample.schedule import STATE_EVERY, Schedule
from jax_client.models.config import GatedDelta, ModelConfig
from jax_client.values import AdapterState
from support.families import cases as family_cases
from support.families.engine import open_engine

STEPS = 16


class Device:
    """Does what programs do with states: each place has the tokens that have run up to it."""

    def __init__(self, schedule: Schedule, rng: np.random.Generator) -> None:
        self.schedule, self.rng = schedule, rng
        self.states: list[dict[int, bytes]] = [{} for _ in schedule.pages]

    def prefill(self) -> None:
        _, tiles = self.schedule.next_tiles(4)
        for way, members in enumerate(tiles):
            for tile in members:
                source, *targets = tile.places
                before = self.states[way][source] if source else b""
                assert before == tile.row.tokens(0, tile.start).tobytes()
                for place in targets:
                    self.states[way][place] = before + tile.row.tokens(tile.start, tile.stop).tobytes()
                self.schedule.launched(tile)

    def decode(self) -> None:
        _, rows = self.schedule.next_block()
        for way, members in enumerate(rows):
            for row in members:
                self._step(row, self.states[way])
        for row in [row for row in self.schedule.placed if row.stop_reason]:
            self.schedule.finish(row)

    def _step(self, row: Row, states: dict[int, bytes]) -> None:
        if row.length > 1:
            assert states[row.place] == row.tokens(0, row.length - 1).tobytes()
        kept = len(row.drawn)
        for _ in range(min(STEPS, row.left)):
            states[row.place] = row.tokens(0, row.length).tobytes()
            if row.length % PAGE == 0:
                states[row.mark] = states[row.place]
            row.drawn.append(int(self.rng.integers(2)))
        if row.left == 0 or self.rng.random() < 0.1:
            row.stop_reason = "stop"
            if self.rng.random() < 0.5:  # a stop string within what the block drew
                row.cut = True
                del row.drawn[int(self.rng.integers(kept, len(row.drawn) + 1)) :]

    def check(self) -> None:
        """What a later prompt finds is what stands there, and no place is lost."""
        for way, pages in enumerate(self.schedule.pages):
            for row in self.schedule.placed:
                if row.way == way:
                    assert row.place and not {row.place, row.mark} & set(pages.states._kept_for)
            free = pages.states._free
            assert len(set(free)) == len(free) and not any(pages.states._users[place] for place in free)


@pytest.mark.parametrize("seed", range(6))
def test_every_tile_and_step_continues_its_own_row(seed: int) -> None:
    """With prompts that begin alike, too few pages and places, rows that are cancelled, and preempted."""
    rng = np.random.default_rng(seed)
    pages, states = int(rng.choice([14, 40])), int(rng.choice([4, 9, 30]))
    schedule = Schedule(ways=int(rng.integers(1, 3)), pages=pages, rows=8, steps=STEPS, states=states)
    device, jobs, hits = Device(schedule, rng), list[Job](), 0
    for block in range(150):
        if block < 100 and rng.random() < 0.5:
            # Of a few long texts, so that prompts begin alike; some continue what was answered.
            text = np.random.default_rng(int(rng.integers(3))).integers(0, 2, 400).astype(np.int32)
            tokens_T = text[: int(rng.integers(1, (pages - 4) * PAGE // 2))]
            options: dict[str, Any] = {"max_tokens": int(rng.integers(1, 80)), "owner": str(rng.choice(list("ab")))}
            if rng.random() < 0.2:
                options = {**options, "num_samples": 0, "prompt_logprobs": True}
            elif rng.random() < 0.3:
                options["num_samples"] = int(rng.integers(2, 4))
            jobs.append(Job(GenerationRequest(tokens_T=tokens_T, **options), None))
            if not jobs[-1].refused_beyond(schedule.capacity):
                schedule.add(jobs[-1])
        if rng.random() < 0.1 and jobs:
            jobs[int(rng.integers(len(jobs)))].future.cancel()
            schedule.forget_ended()
        schedule.place()
        while schedule.pending_tiles() and rng.random() < 0.8:
            device.prefill()
        for row in [row for row in schedule.placed if row.ready and not row.job.rows]:
            schedule.finish(row)
        device.decode()
        device.check()
    while schedule.placed or schedule.waiting:
        schedule.place()
        while schedule.pending_tiles():
            device.prefill()
        for row in [row for row in schedule.placed if row.ready and not row.job.rows]:
            schedule.finish(row)
        device.decode()
    hits = sum(bool(job.cached_tokens) for job in jobs)
    assert hits > 0 or states == 4
    for way in schedule.pages:
        assert way.states.used == 0 and way.used == 0


def test_states_are_kept_at_long_distances_and_behind_the_last_full_page() -> None:
    schedule = Schedule(ways=1, pages=400, rows=2, steps=STEPS, states=30)
    schedule.add(Job(GenerationRequest(tokens_T=np.zeros(2 * STATE_EVERY + 70, np.int32), max_tokens=4), None))
    schedule.place()
    kept = [tile.start + PAGE for tile in schedule.next_tiles(1000)[1][0] if tile.places[2]]
    assert kept == [STATE_EVERY, 2 * STATE_EVERY, 2 * STATE_EVERY + 2 * PAGE]


def test_a_state_takes_what_the_sizes_say() -> None:
    """61 MiB in a Qwen3.5 of 35B-A3B: 30 layers of 32 heads with 128 x 128 values each, and the last three inputs."""
    delta = GatedDelta(
        layers=tuple(i for i in range(40) if i % 4 != 3),
        key_heads=16,
        value_heads=32,
        key_dim=128,
        value_dim=128,
        taps=4,
    )
    sizes: dict[str, Any] = {"vocab_size": 248320, "d_model": 2048, "d_ff": 512, "n_layers": 40, "n_heads": 16}
    more: dict[str, Any] = {
        "n_kv_heads": 2,
        "head_dim": 256,
        "norm_eps": 1e-6,
        "rope_theta": 1e7,
        "max_context": 262144,
    }
    c = ModelConfig(family="qwen3_5", tied_embeddings=False, delta=delta, **sizes, **more)
    assert state_bytes(c, np.float16) == 30 * (2 * 2**20 + 3 * 8192 * 2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("m"), "qwen3_5")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def snapshots(engine: Engine) -> list[Any]:
    """Return the base model and two adapters."""
    lane, weights = engine.open_lane(), family_cases.adapter("qwen3_5")
    scaled = [{name: a * np.float32(factor) for name, a in weights.items()} for factor in (1.0, 0.5)]
    states = [AdapterState(spec=family_cases.SPEC, step=0, weights=each) for each in scaled]
    return [None, *(engine.snapshot(lane, state).result() for state in states)]


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([length, seed]).integers(3, 128, length).astype(np.int32)


def send(engine: Engine, snapshot: Any = None, **fields: Any) -> Future[GenerationResult]:
    fields = {"tokens_T": prompt(75), "max_tokens": 20, "seed": 1} | fields
    return engine.generate(snapshot, GenerationRequest(**fields))


def drawn(result: GenerationResult) -> list[tuple[bytes, bytes]]:
    return [(row.tokens.tobytes(), row.logprobs.tobytes()) for row in result.rows]


def check_alike(one: GenerationResult, other: GenerationResult) -> None:
    """Compare what programs for other numbers of rows drew, which round otherwise."""
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("length", [1, 32, 33, 64, 75, 96])
def test_a_prompt_that_was_computed_before_gives_the_same(engine: Engine, length: int) -> None:
    tokens_T = prompt(length, 7)
    engine.sampler.release_cache()
    first = send(engine, tokens_T=tokens_T).result()
    second = send(engine, tokens_T=tokens_T).result()
    # One token at least is run by a tile of the row's own, and the last one by a step.
    assert (first.cached_tokens, second.cached_tokens) == (0, max(0, length - 2) // PAGE * PAGE)
    assert drawn(first) == drawn(second)


def test_samples_of_one_prompt_are_those_that_each_would_be(engine: Engine) -> None:
    together = send(engine, num_samples=5).result()
    engine.sampler.release_cache()
    # The draws of sample i are those of number i: all are drawn once more, in another batch.
    others = [send(engine, tokens_T=prompt(50 + i, i)) for i in range(3)]
    again = send(engine, num_samples=5)
    check_alike(again.result(), together)
    assert len({row.tokens.tobytes() for row in together.rows}) > 1
    for other in others:
        other.result()


def test_a_next_turn_begins_behind_the_reply(engine: Engine) -> None:
    engine.sampler.release_cache()
    reply = send(engine, tokens_T=prompt(40), max_tokens=60, seed=3).result().rows[0].tokens
    whole = np.concatenate([prompt(40), reply, prompt(30, 1)]).astype(np.int32)
    turn = send(engine, tokens_T=whole).result()
    assert turn.cached_tokens == (40 + len(reply) - 1) // PAGE * PAGE > 40
    engine.sampler.release_cache()
    fresh = send(engine, tokens_T=whole).result()
    # Steps and tiles round otherwise.
    assert fresh.cached_tokens == 0 and fresh.rows[0].tokens.tolist() == turn.rows[0].tokens.tolist()
    np.testing.assert_allclose(turn.rows[0].logprobs, fresh.rows[0].logprobs, atol=1e-4)


def test_scores_of_a_prompt_do_not_depend_on_what_is_kept(engine: Engine) -> None:
    engine.sampler.release_cache()
    tokens_T = prompt(110, 3)
    first = send(engine, tokens_T=tokens_T, prompt_logprobs=True, max_tokens=1).result()
    second = send(engine, tokens_T=tokens_T, prompt_logprobs=True, score_last=10, max_tokens=1).result()
    assert second.cached_tokens == 96
    np.testing.assert_array_equal(first.prompt_logprobs_T[-10:], second.prompt_logprobs_T[-10:])


def test_adapters_of_one_batch_do_not_meet(engine: Engine, snapshots: list[Any]) -> None:
    alone = [send(engine, snapshot).result() for snapshot in snapshots]
    together = [send(engine, snapshot) for snapshot in snapshots]
    for one, future in zip(alone, together, strict=True):
        check_alike(one, future.result())
    assert len({result.rows[0].logprobs.tobytes() for result in alone}) == len(snapshots)


def test_states_that_were_evicted_are_computed_once_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = send(engine, tokens_T=prompt(100)).result()
    engine.sampler.release_cache()
    sampler = engine.sampler
    monkeypatch.setattr(sampler, "_cache", type(sampler._cache)(**fields_of(sampler._cache) | {"states": 5}))
    kept = send(engine, tokens_T=prompt(100)).result()
    for i in range(6):  # each keeps a state behind its last full page
        send(engine, tokens_T=prompt(70 + i, i)).result()
    later = send(engine, tokens_T=prompt(100)).result()
    assert (kept.cached_tokens, later.cached_tokens) == (0, 0) and drawn(kept) == drawn(later)
    check_alike(kept, first)
    described = sampler.describe()
    assert described["states_used"] == 0 < described["states_kept"] <= 4
    engine.sampler.release_cache()


def fields_of(size: Any) -> dict[str, Any]:
    return {name: getattr(size, name) for name in type(size).__dataclass_fields__}


@pytest.mark.full
def test_two_hundred_ragged_turns_leave_nothing_and_compile_nothing(engine: Engine) -> None:
    """Conversations of several turns, of several samples each, in turn; what is found is what was kept."""
    engine.sampler.release_cache()
    rng, texts, compiled, memory = np.random.default_rng(0), dict[int, np.ndarray](), 0, 0
    for turn in range(200):
        who = turn % 7
        more = rng.integers(3, 128, int(rng.integers(1, 40))).astype(np.int32)
        before = texts.get(who, np.zeros(0, np.int32))
        text = np.concatenate([before, more])
        new = int(rng.integers(1, 40))
        if len(text) + new > 250:
            text, before = more, before[:0]
        answer = send(engine, tokens_T=text, max_tokens=new, seed=turn, num_samples=1 + turn % 3).result()
        # At least what the last turn's prompt, whose state was kept before it was drawn from, has in full pages.
        assert answer.cached_tokens >= max(0, len(before) - 40 - 1) // PAGE * PAGE - PAGE, (turn, len(before))
        assert answer.cached_tokens <= max(0, len(text) - 2)
        texts[who] = np.concatenate([text, answer.rows[0].tokens]).astype(np.int32)
        if turn == 50:
            compiled, memory = len(engine._log), resident_bytes()
    described = engine.sampler.describe()
    assert described["states_used"] == described["pages_used"] == 0 < described["states_kept"]
    assert len(engine._log) == compiled
    assert described["prompt_tokens_cached"] > described["prompt_tokens"] / 2
    assert resident_bytes() - memory < 64 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
