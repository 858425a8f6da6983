"""What is left of a cancelled sampling request? No row, no page, and no tile that no other row reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from jax_client.engine.core.requests import GenerationRequest
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.rows import Job, Row
from jax_client.engine.sample.schedule import Schedule


def job(*tokens: int, **fields: Any) -> Job:
    """A request of a page that begins with each of `tokens`, and of one token more."""
    tokens_T = np.zeros(len(tokens) * PAGE + 1, np.int32)
    tokens_T[:-1:PAGE] = tokens
    return Job(replace(GenerationRequest(tokens_T=tokens_T, max_tokens=8), **fields), None)


def placed(*jobs: Job) -> tuple[Schedule, list[Row]]:
    schedule = Schedule(ways=1, pages=40, rows=8, steps=4)
    for each in jobs:
        schedule.add(each)
    schedule.place()
    return schedule, list(schedule.placed)


def launch_all(schedule: Schedule) -> int:
    launched = 0
    while schedule.pending_tiles():
        _, ways = schedule.next_tiles(2)
        for tile in ways[0]:
            tile.launched = True
            launched += 1
    return launched


def test_tiles_that_others_read_are_computed_and_no_others() -> None:
    first, second = job(1, 2, 3, 4, prompt_logprobs=True), job(1, 2, 9)
    schedule, (_, other) = placed(first, second)
    first.future.cancel()
    schedule.forget_ended()
    assert schedule.placed == [other] and not other.ready
    assert launch_all(schedule) == 3 and other.ready
    schedule.finish(other)
    assert schedule.pages[0].used == 0
    schedule.add(job(1, 2, 3))
    schedule.place()
    assert launch_all(schedule) == 1, "what was not computed is not found"


def test_a_row_that_waits_for_a_dropped_tile_waits_for_the_one_before_it() -> None:
    first, gone, known = job(1, 2), job(5, 6), job(1, 2)
    schedule, (row, _, last) = placed(first, gone, known)
    assert last.after is not row.after
    gone.future.cancel()
    schedule.forget_ended()
    assert last.after is row.after and launch_all(schedule) == 2 and last.ready


def test_samples_that_share_a_prompt_leave_nothing_behind() -> None:
    requests = [job(1, 2, 3, num_samples=3), job(1, 2, num_samples=2), job(7, max_tokens=1, topk_prompt=1)]
    schedule, rows = placed(*requests, job(8, num_samples=9))
    assert len(rows) == 8 and schedule.waiting
    for each in [*requests, *(row.job for row in schedule.waiting)]:
        each.future.cancel()
    schedule.forget_ended()
    assert not schedule.placed and not schedule.waiting and not schedule.pending_tiles()
    assert schedule.pages[0].used == 0
