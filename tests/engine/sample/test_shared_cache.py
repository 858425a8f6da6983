"""Do owners whose rows have all lengths share the pages of a cache, and do all rows come to their end?"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.rows import Job
from jax_client.engine.sample.schedule import Schedule

NUMBERS = itertools.count(1)


def job(owner: str, pages: int, max_tokens: int) -> Job:
    """Return a request that has no prefix in common with others."""
    tokens_T = np.full(pages * PAGE + 1, next(NUMBERS), np.int32)
    return Job(GenerationRequest(tokens_T=tokens_T, max_tokens=max_tokens, owner=owner), None)


def decode(schedule: Schedule) -> Counter[str]:
    """Run a round as the loop does; return whose rows took part in its block."""
    schedule.place()
    while schedule.pending_tiles():
        for tile in (tile for tiles in schedule.next_tiles(16)[1] for tile in tiles):
            tile.launched = True
    ran = [row for rows in schedule.next_block()[1] for row in rows]
    for row in ran:
        schedule.copied(row)
        row.drawn += [5] * min(schedule._steps, row.job.request.max_tokens - len(row.drawn))
        row.stop_reason = "length" if len(row.drawn) == row.job.request.max_tokens else None
    for row in [row for row in schedule.placed if row.stop_reason]:
        schedule._publish(row)
        schedule._remove(row)
    return Counter(row.owner for row in ran)


def run(schedule: Schedule, blocks: int, *, pages: int, max_tokens: int, rows: int) -> Counter[str]:
    """Return how many rows of two owners took part in blocks; both always have more rows than there is room for."""
    ran = Counter[str]()
    for _ in range(blocks):
        here = Counter(row.owner for row in (*schedule.placed, *schedule.waiting))
        for _ in range(here["long"], rows):
            schedule.add(job("long", pages, max_tokens))
        for _ in range(here["short"], 64):
            schedule.add(job("short", 1, 64))
        ran += decode(schedule)
    return ran


@pytest.mark.parametrize(("pages", "max_tokens"), [(50, 4 * PAGE), (1, 45 * PAGE)])
def test_one_long_row_leaves_others_the_rest_of_the_pages(pages: int, max_tokens: int) -> None:
    schedule = Schedule(ways=1, pages=64, rows=32, steps=16)
    ran = run(schedule, 150, pages=pages, max_tokens=max_tokens, rows=3)
    assert ran["long"] >= 100 and ran["short"] >= 3 * 150, ran


def test_a_row_that_needs_nearly_all_pages_has_its_turn_and_no_more() -> None:
    ran = run(Schedule(ways=1, pages=64, rows=32, steps=16), 150, pages=59, max_tokens=16, rows=1)
    assert ran["long"] >= 4 and ran["short"] >= 8 * 150, ran


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_several_owners_all_end_and_what_each_holds_is_counted(seed: int) -> None:
    """No rows preempt each other for ever, whatever their lengths, on one way or on two."""
    rng = np.random.default_rng(seed)
    pages = int(rng.choice([14, 30, 60]))
    schedule = Schedule(ways=int(rng.integers(1, 3)), pages=pages, rows=int(rng.choice([2, 8])), steps=16)
    total = 0
    for _ in range(20):
        tokens_T = np.full(rng.integers(1, (pages - 4) * PAGE * 3 // 4), rng.integers(3), np.int32)
        most = int(rng.integers(1, max(2, schedule.capacity - len(tokens_T) - PAGE)))
        owner, samples = str(rng.choice(list("abc"))), int(rng.integers(1, 4))
        request = GenerationRequest(tokens_T=tokens_T, max_tokens=most, owner=owner, num_samples=samples)
        if request.stored_tokens <= schedule.capacity:
            schedule.add(Job(request, None))
            total += most * samples
    blocks = 0
    while schedule.placed or schedule.waiting:
        decode(schedule)
        held = {row.owner: set[tuple[int, int]]() for row in schedule.placed}
        for row in schedule.placed:
            held[row.owner] |= {(row.way, page) for page in row.used_pages}
        assert +schedule._held.pages == Counter({owner: len(each) for owner, each in held.items()})
        assert +schedule._held.rows == Counter(row.owner for row in schedule.placed)
        blocks += 1
        assert blocks <= total // 4 + 100, "a block draws tokens"
