"""Does an open page hear of changes within a second, once each, also after a broken connection?"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jax_client.server.dashboard import watching
from jax_client.server.dashboard.device import Devices
from jax_client.server.dashboard.watching import Watch, Watcher
from support.server.pages import FakeSource, Page, Parts, frames

STREAM = "/dashboard/api/stream"


class Listener:
    """A stream that is read event by event."""

    def __init__(self, client: httpx.Client, params: dict[str, str] | None = None, last: str | None = None) -> None:
        headers = {} if last is None else {"Last-Event-ID": last}
        self._context = client.stream("GET", STREAM, params=params, headers=headers)
        self.answer = self._context.__enter__()
        assert self.answer.status_code == 200, self.answer.read()
        self._events: Iterator[dict[str, str]] = frames(self.answer)
        self.last = ""

    def next(self, kind: str) -> Any:
        """Return the data of the next event of a kind."""
        for event in self._events:
            self.last = event["id"]
            if event["event"] == kind:
                return json.loads(event["data"])
        raise AssertionError(f"no {kind} came")

    def close(self) -> None:
        self._context.__exit__(None, None, None)


def test_changes_arrive_within_a_second(parts: Parts, page: Page, client: httpx.Client) -> None:
    parts.source.set("a", step=1)
    parts.source.add_point("a", 1, 0.5)
    stream = Listener(client, {"run": "a", "since": "1-0"})
    assert stream.answer.headers["Content-Type"].startswith("text/event-stream")
    assert stream.answer.headers["Cache-Control"] == "no-store"
    assert [row["run"] for row in stream.next("runs")["runs"]] == ["a"]
    parts.source.set("b", step=7)
    start = time.monotonic()
    assert [row["run"] for row in stream.next("runs")["runs"]] == ["b"], "only what changed"
    assert time.monotonic() - start < 1.0
    parts.source.add_point("a", 2, 0.25)
    start = time.monotonic()
    found = stream.next("points")
    assert time.monotonic() - start < 1.0
    assert found["series"]["loss:mean"]["value"] == [0.25], "only what is after the cursor"
    stream.close()


def test_a_stream_goes_on_where_it_broke(parts: Parts, client: httpx.Client) -> None:
    parts.source.set("a")
    parts.source.add_point("a", 1, 1.0)
    stream = Listener(client, {"run": "a"})
    assert stream.next("points")["series"]["loss:mean"]["value"] == [1.0]
    stream.next("runs")
    stream.close()
    parts.source.set("b")
    parts.source.add_point("a", 2, 2.0)
    again = Listener(client, {"run": "a"}, stream.last)
    assert again.next("points")["series"]["loss:mean"]["value"] == [2.0]
    assert [row["run"] for row in again.next("runs")["runs"]] == ["b"]
    again.close()
    for last in ("00000000.5.2-0", "garbage", "0.0.0-0", "a" * 500):
        other = Listener(client, {"run": "a"}, last)
        assert {row["run"] for row in other.next("runs")["runs"]} == {"a", "b"}, "an id of another server has all"
        other.close()


def test_a_run_that_goes_is_told(parts: Parts, client: httpx.Client) -> None:
    parts.source.set("a")
    parts.source.set("b")
    stream = Listener(client)
    assert len(stream.next("runs")["runs"]) == 2
    del parts.source.rows["a"]
    parts.source.version += 1
    assert stream.next("runs") == {"runs": [], "gone": ["a"]}
    stream.close()


def test_the_end_of_the_server_cuts_a_stream_quietly(parts: Parts, caplog: Any) -> None:
    page = Page(parts.guard())
    page.http.config.timeout_graceful_shutdown = 20
    stream = Listener(page.client())
    stream.next("device")
    start = time.monotonic()
    page.stop()
    assert time.monotonic() - start < 5 and not caplog.records
    with pytest.raises(httpx.HTTPError):
        for _ in range(100):
            stream.next("device")


def test_bad_questions(parts: Parts, client: httpx.Client) -> None:
    assert client.get(STREAM, params={"since": "x"}).status_code == 400
    assert client.get(STREAM, params={"run": "a" * 600}).status_code == 400
    stream = Listener(client, {"run": "none"})
    parts.source.set("a")
    assert stream.next("runs")["runs"], "a run that is not there costs nothing but its points"
    stream.close()


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "jax_client-pages"]


def wait_for_threads(number: int) -> None:
    """Without pages the thread ends."""
    end = time.monotonic() + 10
    while len(threads()) != number:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_many_pages_are_read_for_once(parts: Parts, client: httpx.Client, page: Page) -> None:
    wait_for_threads(0)
    parts.source.set("a")
    streams = [Listener(page.client(), {"run": "a"}) for _ in range(5)]
    for stream in streams:
        stream.next("runs")
    assert len(threads()) == 1
    reads = parts.source.reads
    parts.source.set("a", step=2)
    assert [stream.next("runs")["runs"][0]["step"] for stream in streams] == [2] * 5
    assert parts.source.reads - reads <= 2, "five pages, one or two reads"
    for stream in streams:
        stream.close()
    wait_for_threads(0)


def test_pages_are_bounded(parts: Parts, client: httpx.Client, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_PAGES", 1)
    stream = Listener(page.client())
    answer = client.get(STREAM)
    assert answer.status_code == 429 and "pages are open" in answer.json()["detail"]
    stream.close()


def test_a_page_that_does_not_read_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_FRAMES", 3)

    async def run() -> list[bytes | None]:
        watch = Watch(FakeSource(), Devices(FakeSource(), None))  # type: ignore[arg-type]
        slow, quick = watch.page(None, None, None), watch.page(None, None, None)
        watch.add(slow)
        watch.add(quick)
        got: list[bytes | None] = []
        for number in range(5):
            for each in (slow, quick):
                each.put([b"%d" % number])
            await asyncio.sleep(0.01)
            got.append(await quick.next(5))
        assert await slow.next(5) is None and watch.pages() == [quick]
        assert await quick.next(0.01) == b"", "nothing came"
        return got

    assert asyncio.run(run()) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_source_that_fails_does_not_end_the_stream(parts: Parts, client: httpx.Client, caplog: Any) -> None:
    parts.source.set("a")
    stream = Listener(client)
    stream.next("runs")
    good = parts.source.runs
    parts.source.runs = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    parts.source.set("b")
    end = time.monotonic() + 10
    while not caplog.records and time.monotonic() < end:
        time.sleep(0.05)
    assert [each.exc_info[0] for each in caplog.records] == [ZeroDivisionError]
    parts.source.runs = good  # type: ignore[method-assign]
    assert [row["run"] for row in stream.next("runs")["runs"]] == ["b"]
    stream.close()


def test_the_watcher_ends_when_told() -> None:
    async def run() -> None:
        watcher, source = Watcher(), FakeSource()
        watch = Watch(source, Devices(source, None))  # type: ignore[arg-type]
        page = watch.page(None, None, None)
        watcher.join(watch, page)
        assert await page.next(5)
        watcher.close()

    wait_for_threads(0)
    asyncio.run(run())
    wait_for_threads(0)
