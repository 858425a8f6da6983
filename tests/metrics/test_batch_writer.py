"""Do items reach the file in their order and in batches, without their senders waiting for it?"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_client.threads import BatchWriter


class Sink:
    """Keeps what is written; `gate` holds the writing thread."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def write(self, items: Sequence[int]) -> None:
        assert self.gate.wait(30)
        self.batches.append(list(items))

    @property
    def items(self) -> list[int]:
        return [item for batch in self.batches for item in batch]


def test_items_are_written_in_order_and_in_batches() -> None:
    sink = Sink()
    writer = BatchWriter("test", sink.write, seconds=0.0, most=10)
    sink.gate.clear()
    assert all(writer.put(number) for number in range(35))
    sink.gate.set()
    assert writer.flush(30)
    assert sink.items == list(range(35)) and max(map(len, sink.batches)) <= 10 and len(sink.batches) <= 5
    writer.close()


def test_many_threads_lose_nothing() -> None:
    sink = Sink()
    writer = BatchWriter("test", sink.write, seconds=0.001, most=64)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(writer.put, range(2_000)))
    writer.close()
    assert sorted(sink.items) == list(range(2_000))


def test_a_full_queue_drops_what_comes() -> None:
    sink = Sink()
    writer = BatchWriter("test", sink.write, seconds=0.0, most=10, capacity=10)
    sink.gate.clear()
    assert writer.put(0)
    while writer.waiting():
        time.sleep(0.001)
    assert [writer.put(number) for number in range(1, 21)] == [True] * 10 + [False] * 10
    assert not writer.flush(0.05), "bounded, whatever the thread does"
    sink.gate.set()
    assert writer.flush(30) and sink.items == list(range(11))
    writer.close()


def test_a_flush_does_not_wait_for_the_batch_to_grow() -> None:
    sink = Sink()
    writer = BatchWriter("test", sink.write, seconds=60.0, most=10)
    assert writer.flush(0), "nothing was put"
    writer.put(1)
    assert writer.flush(30) and sink.items == [1]
    writer.put(2)
    writer.close()
    assert sink.items == [1, 2]


def test_what_fails_is_logged_once_and_the_next_is_written(caplog: pytest.LogCaptureFixture) -> None:
    written: list[int] = []

    def write(items: Sequence[int]) -> None:
        if items[0] < 2:
            raise ValueError("no such number")
        written.extend(items)

    writer = BatchWriter("test", write, seconds=0.0, most=1)
    for number in range(4):
        assert writer.put(number) and writer.flush(30)
    writer.close()
    assert written == [2, 3] and len(caplog.records) == 1 and "no such number" in caplog.text


def test_a_thread_that_waits_keeps_nothing_of_its_last_batch() -> None:
    class Item:
        pass

    writer = BatchWriter("test", lambda items: None, seconds=0.0, most=10)
    item = Item()
    kept = weakref.ref(item)
    writer.put(item)
    assert writer.flush(30)
    del item
    gc.collect()
    deadline = time.monotonic() + 10
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert kept() is None
    writer.close()


FORK = """
import os, threading, warnings
from jax_client.threads import BatchWriter

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
gate, written = threading.Event(), []
writer = BatchWriter("test", lambda items: (gate.wait(30), written.extend(items)), seconds=0.0, most=10)
writer.put(1)
writer.put(2)
child = os.fork()
if child == 0:
    gate = threading.Event()
    gate.set()
    writer.restart_in_fork()
    os._exit(0 if writer.put(3) and writer.flush(30) and written == [3] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
gate.set()
writer.close()
assert written == [1, 2], written
"""


def test_a_forked_process_writes_only_what_is_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)
