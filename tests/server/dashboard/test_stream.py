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


class Looked:
    """A page that a test reads, and the look that fills it, one after the other."""

    def __init__(self, source: FakeSource, run: str | None = None, engines: Any = None, **more: Any) -> None:
        self.watch = Watch(source, Devices(source, engines))
        self.page = self.watch.page(run, more.pop("since", None), more.pop("last_id", None), **more)
        self.watch.add(self.page)
        self.ids: list[str] = []

    async def __call__(self) -> list[tuple[str, Any]]:
        """Return the kinds and the data of the frames of one look."""
        self.watch._rows_next = 0.0
        await asyncio.to_thread(self.watch.look)
        await asyncio.sleep(0)  # the page's queue is filled on this loop
        found = []
        while self.page._frames:
            lines = (await self.page.next(1)).decode().split("\n")
            self.ids.append(lines[0].removeprefix("id: "))
            found.append((lines[1].removeprefix("event: "), json.loads(lines[2].removeprefix("data: "))))
        return found


def test_a_page_that_does_not_read_waits_for_no_more_than_it_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_BYTES", 100)

    async def run() -> None:
        source = FakeSource()
        look = Looked(source, "a")
        source.set("a", note="n" * 500)
        source.add_point("a", 1, 1.0)
        for step in range(2, 9):
            await asyncio.to_thread(look.watch.look)
            source.add_point("a", step, 1.0)
        await asyncio.sleep(0)
        assert len(look.page._frames) == 1 and look.watch.pages() == [look.page], "one more than it had room for"
        assert [kind for kind, _ in await look()] == ["points"]
        (kind, points), *_ = await look()
        assert kind == "points" and points["series"]["loss:mean"]["step"] == list(range(2, 9)), "all that it missed"

    asyncio.run(run())


def test_a_list_of_any_size_arrives_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_BYTES", 30_000)
    monkeypatch.setattr(watching, "PART_BYTES", 4_000)

    async def run() -> None:
        source = FakeSource()
        for number in range(300):
            source.set(f"r{number}", user_metadata={"config": "x" * 60_000}, archived=number % 3 == 0)
        source.set("large", note="n" * 50_000)
        look = Looked(source)
        looks = [[data for kind, data in await look() if kind == "runs"] for _ in range(4)]
        frames = [data for found in looks for data in found]
        rows = [row["run"] for data in frames for row in data["runs"]]
        assert len(frames) > 5 and sum(map(bool, looks)) > 1 and not any(data["gone"] for data in frames)
        assert rows == [run for run, row in source.rows.items() if not row["archived"]], "each once, the newest first"
        assert not any("user_metadata" in row for data in frames for row in data["runs"])
        # A page that lost its connection in the middle goes on there.
        again = look.watch.page(None, None, look.ids[4])
        assert again.seen == int(look.ids[4].split(".")[1]) > 0
        assert not [data for kind, data in await look() if kind == "runs"], "it has all"
        source.rows["r1"]["archived"] = True
        source.version += 1
        ((_, data),) = await look()
        assert [row["run"] for row in data["runs"]] == ["r1"] and data["runs"][0]["archived"], "that it went is told"
        asked = Looked(source, archived=True)
        found = [row for _ in range(5) for kind, data in await asked() if kind == "runs" for row in data["runs"]]
        assert len(found) == 301

    asyncio.run(run())


def test_a_series_of_any_size_arrives_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PART_VALUES", 3)

    async def run() -> None:
        source = FakeSource()
        source.set("a")
        source.events = [{"kind": "start", "step": 0, "time": 1.0, "details": {}}]
        for step in range(4):
            source.add_point("a", step, 1.0)
        look = Looked(source, "a")
        parts = [data for kind, data in await look() if kind == "points"]
        assert [list(part["series"]) for part in parts] == [[name] for name in parts[0]["names"]] and len(parts) == 2
        assert [len(part.get("events", ())) for part in parts] == [1, 0] and all(part["run"] == "a" for part in parts)
        assert [part.get("next") for part in parts] == [None, "4-0"]
        # From between the two no place in the series is known.
        assert [each.split(".", 2)[2] for each in look.ids[:2]] == [watching.NOWHERE, "4-0"]
        assert look.watch.page("a", None, look.ids[0]).since == watching.NOWHERE
        source.add_point("a", 4, 1.0)
        assert [data["series"]["loss:mean"]["step"] for _, data in await look()] == [[4]]

    asyncio.run(run())


def test_what_fails_takes_nothing_else_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        source = FakeSource()
        engines: list[Any] = []
        look = Looked(source, "a", lambda: [1 / each for each in engines])  # type: ignore[misc]
        source.set("a", state="live")
        source.add_point("a", 1, 1.0)
        assert [kind for kind, _ in await look()] == ["points", "runs", "device"]
        source.add_point("a", 2, 2.0)
        good, source.runs = source.runs, lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        look.watch._device_at, engines[:] = -100.0, [0]
        ((kind, points),) = await look()
        assert kind == "points" and points["series"]["loss:mean"]["value"] == [2.0]
        source.runs, engines[:] = good, []  # type: ignore[method-assign]
        source.add_point("a", 3, 3.0)
        good, source.series = source.series, lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        source.rows["a"]["step"] = 3
        assert [(kind, data["runs"][0]["step"]) for kind, data in await look()] == [("runs", 3)]
        source.series = good  # type: ignore[method-assign]
        ((kind, points),) = await look()
        assert kind == "points" and points["series"]["loss:mean"]["value"] == [3.0], "though nothing else has changed"

    asyncio.run(run())
    assert len(caplog.records) == 1, "said once"


def test_runs_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_GONE", 3)

    async def run() -> None:
        source = FakeSource()
        look = Looked(source)
        source.set("stays")
        for number in range(10):
            source.rows = {"stays": source.rows["stays"]}
            source.set(f"r{number}")
            await look()
        assert len(look.watch._rows.changes) == 5
        ((_, data),) = [each for each in await Looked(source)() if each[0] == "runs"]
        assert [row["run"] for row in data["runs"]] == ["stays", "r9"]

    asyncio.run(run())


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
