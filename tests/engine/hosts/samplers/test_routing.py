"""Does a request go where the beginning of its prompt is, unless that replica has far more to do?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from jax_client.engine.hosts.samplers.members import Member
from jax_client.engine.hosts.samplers.monitor import summed
from jax_client.engine.hosts.samplers.pool import SamplerPool
from jax_client.engine.hosts.samplers.prefixes import Prefixes, chain, extended
from jax_client.engine.sample.pages import PAGE
from support.samplers.fakes import COUNTS, FakeReplica, pool_of, request, result, snapshot, until


def tokens(length: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + length, dtype=np.int32)


@pytest.fixture
def replicas() -> list[FakeReplica]:
    return [FakeReplica(name) for name in "abc"]


@pytest.fixture
def pool(replicas: list[FakeReplica]) -> Iterator[SamplerPool]:
    pool = pool_of(*replicas)
    pool.opened.result(5)
    yield pool
    pool.close()


def done(pool: SamplerPool, replicas: list[FakeReplica], prompt: np.ndarray, **fields: object) -> str:
    """Send a request and answer it; return who got it."""
    return {replica.host for replica in taken(pool, replicas, [(prompt, fields)])}.pop()


def taken(pool: SamplerPool, replicas: list[FakeReplica], sent: list) -> list[FakeReplica]:
    futures = [pool.generate(fields.pop("of", None), request(prompt, **fields)) for prompt, fields in sent]
    until(lambda: sum(len(replica.pending) for replica in replicas) == len(sent))
    found = [replica for replica in replicas for _ in replica.pending]
    for replica in replicas:
        replica.answer()
    [future.result(5) for future in futures]
    return found


def test_a_chain_names_full_pages_of_one_owner_and_version() -> None:
    text = tokens(3 * PAGE + 5)
    whole = chain("", 0, text)
    assert len(whole) == 4
    assert chain("", 0, text[: 2 * PAGE]) == whole[:3]
    assert extended(whole[:2], text[PAGE:]) == whole
    others = [chain("x", 0, text), chain("", 1, text), chain("", 0, text + 1)]
    assert not any(set(whole[1:]) & set(other) for other in others)
    # A page is known by those before it, too.
    assert chain("", 0, np.concatenate([text[PAGE : 2 * PAGE], text[PAGE : 2 * PAGE]]))[2] not in whole


def test_the_longest_known_beginning_of_a_living_replica_is_found() -> None:
    known, text = Prefixes(), tokens(4 * PAGE)
    known.note(chain("", 0, text), (0, 1))
    known.note(chain("", 0, text[: 2 * PAGE]), (1, 1))
    assert known.find(chain("", 0, text), [(0, 1), (1, 1)]) == (0, 1)
    assert known.find(chain("", 0, text[: 3 * PAGE]), [(0, 1), (1, 1)]) == (0, 1)
    assert known.find(chain("", 0, text[: 2 * PAGE]), [(0, 1), (1, 1)]) == (1, 1)
    assert known.find(chain("", 0, text), [(1, 1)]) == (1, 1)
    assert known.find(chain("", 0, text), [(0, 2), (1, 2)]) is None, "a new process has an empty cache"


def test_the_table_has_a_limit() -> None:
    known = Prefixes(most=4)
    for i in range(8):
        known.note(chain("", 0, tokens(PAGE, start=i)), (i, 1))
    everyone = [(i, 1) for i in range(8)]
    found = [known.find(chain("", 0, tokens(PAGE, start=i)), everyone) for i in range(8)]
    assert found == [None] * 4 + everyone[4:]


def test_a_prompt_follows_its_beginning(pool: SamplerPool, replicas: list[FakeReplica]) -> None:
    first = done(pool, replicas, tokens(2 * PAGE))
    done(pool, replicas, tokens(2 * PAGE, start=1000))
    for length in (PAGE, 2 * PAGE, 3 * PAGE):
        assert done(pool, replicas, tokens(length)) == first
    assert sum(member.prefix_hits for member in pool.members) == 3


def test_a_next_turn_follows_the_answer_before_it(pool: SamplerPool, replicas: list[FakeReplica]) -> None:
    """The first prompt had no full page of its own."""
    short = request(tokens(5), max_tokens=2 * PAGE)
    future = pool.generate(None, short)
    until(lambda: any(replica.pending for replica in replicas))
    first = next(replica for replica in replicas if replica.pending)
    first.answer()
    future.result(5)
    done(pool, replicas, tokens(40, start=500))
    turn = np.concatenate([short.tokens_T, result(short).rows[0].tokens, tokens(9, start=900)])
    assert done(pool, replicas, turn) == first.host


def test_versions_and_owners_have_beginnings_of_their_own(pool: SamplerPool, replicas: list[FakeReplica]) -> None:
    one = snapshot()
    hosts = [done(pool, replicas, tokens(PAGE), **fields) for fields in ({}, {"of": one}, {"owner": "x"})]
    assert sorted(hosts) == ["a", "b", "c"], "none is known: the least used"


def test_half_a_batch_more_to_do_outweighs_a_known_beginning(pool: SamplerPool, replicas: list[FakeReplica]) -> None:
    prompt = tokens(2 * PAGE)
    assert done(pool, replicas, prompt) == "a"
    group = taken(pool, replicas, [(prompt, {}) for _ in range(16)])
    assert {replica.host for replica in group} == {"a"}
    # The last that a computed is known there: the 17th goes elsewhere, and so the others after it, until they are even.
    spread = [replica.host for replica in taken(pool, replicas, [(prompt, {}) for _ in range(48)])]
    assert max(spread.count(host) for host in "abc") == 16


def test_what_all_have_sampled_is_summed_and_nothing_is_counted_twice() -> None:
    trainer = COUNTS | {"sampled_tokens": 5, "decode_rows": 1, "decode_slots": 8, "rows_waiting": 3, "occupancy": 0.1}
    a, b = Member(replica=FakeReplica("a"), index=0), Member(replica=FakeReplica("b"), index=1)
    a.counts = COUNTS | {"sampled_tokens": 7, "decode_rows": 3, "decode_slots": 8, "rows_waiting": 9, "rows_running": 4}
    a.rows = 4
    b.counts = COUNTS | {"rows_running": 2}  # as it said last, while it had some
    total = summed(trainer, [a, b], rows=11)
    assert total.keys() == trainer.keys()
    assert (total["sampled_tokens"], total["rows_waiting"], total["rows_running"]) == (12, 11, 4)
    assert total["occupancy"] == 4 / 16
