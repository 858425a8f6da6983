"""Are new alerts posted to the address that was allowed, and to no other?"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError
from jax_client.metrics.store import FILE_NAME, MetricsStore, Point
from jax_client.runs.results import alert_poster
from jax_client.runs.results.alert_poster import AlertPoster


@pytest.mark.parametrize(
    ("url", "hosts", "words"),
    [
        ("http://hooks.example.org/x", "hooks.example.org", "only https://"),
        ("https://hooks.example.org/x", None, "alert_hosts does not allow"),
        ("https://hooks.example.org/x", "example.org", "alert_hosts does not allow"),
        ("https://hooks.example.org.evil.net/x", "hooks.example.org", "alert_hosts does not allow"),
        ("https://hooks.example.org@evil.net/x", "hooks.example.org", "give an address"),
        ("https://localhost.evil.net/", "", "alert_hosts does not allow"),
        ("http://127.0.0.1.evil.net/", "", "only https://"),
        ("file:///etc/passwd", "", "give an address"),
        ("https://", "", "give an address"),
        ("https://[::1", "", "give an address"),
        ("https://hooks.example.org:x/", "hooks.example.org", "give an address"),
        (3, "", "give an address"),
    ],
)
def test_other_addresses_are_refused(url: Any, hosts: str | None, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        EngineConfig(alert_webhook=url, alert_hosts=hosts)


def test_allowed_addresses_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineConfig().webhook is None
    for url, hosts in (
        ("https://hooks.example.org/x?y=z", ["other.net", "Hooks.Example.ORG"]),
        ("http://127.0.0.1:8/x", None),
        ("http://[::1]:8/x", None),
        ("http://localhost/x", ()),
    ):
        assert EngineConfig(alert_webhook=url, alert_hosts=hosts).webhook == url
    monkeypatch.setenv("JAX_CLIENT_ALERT_WEBHOOK", "https://a.example/secret")
    with pytest.raises(BadRequestError, match="the environment's JAX_CLIENT_ALERT_WEBHOOK"):
        _ = EngineConfig().webhook
    monkeypatch.setenv("JAX_CLIENT_ALERT_HOSTS", "b.example,a.example")
    config = EngineConfig()
    assert config.webhook == "https://a.example/secret" and "secret" not in json.dumps(config.to_json())


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; answers as the test says."""

    posted: list[dict[str, Any]]
    status = 204
    taken: threading.Event

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).posted.append({"path": self.path, **json.loads(body)})
        self.send_response(self.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        if self.status == 204:
            self.taken.set()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], str]]:
    handler = type("Handler", (Hook,), {"posted": [], "status": 204, "taken": threading.Event()})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}/hook?token=s"
    server.shutdown()
    server.server_close()
    thread.join()


def skip_steps(path: Path, step: int) -> None:
    MetricsStore(path).add([Point(run="r", kind="step", step=step, time=1.0, metrics={"skipped_nonfinite:sum": 1.0})])


def test_an_alert_is_posted_once(hook: tuple[type[Hook], str], tmp_path: Path) -> None:
    handler, url = hook
    path, poster = tmp_path / FILE_NAME, AlertPoster(url)
    skip_steps(path, 7)
    for _ in range(3):
        poster.look(path, "r", "my run")
        poster.look(path, "unknown", "other")
    assert poster.flush(10)
    posted = [each for each in handler.posted if each["kind"] == "nonfinite"]
    assert len(posted) == 1 and posted[0]["path"] == "/hook?token=s"
    assert (posted[0]["run"], posted[0]["name"], posted[0]["step"]) == ("r", "my run", 7)
    poster.end()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000.0]
    monkeypatch.setattr(alert_poster.time, "monotonic", lambda: now[0])
    return now


def test_what_is_not_taken_is_posted_again_later_each_time(
    hook: tuple[type[Hook], str], tmp_path: Path, clock: list[float]
) -> None:
    handler, url = hook
    path, poster = tmp_path / FILE_NAME, AlertPoster(url)
    skip_steps(path, 7)

    def posted(after: float) -> int:
        clock[0] += after
        poster.look(path, "r", "my run")
        assert poster.flush(10)
        return len([each for each in handler.posted if each["kind"] == "nonfinite"])

    handler.status = 503
    assert [posted(after) for after in (0, 29, 1, 59, 1)] == [1, 1, 2, 2, 3]
    handler.status = 204
    assert [posted(after) for after in (119, 1, 500, 500)] == [3, 4, 4, 4], "it was taken"
    assert len({json.dumps(each) for each in handler.posted if each["kind"] == "nonfinite"}) == 1
    poster.end()


@pytest.mark.parametrize("dead", [True, False])
def test_an_address_that_never_takes_any_is_given_up(
    hook: tuple[type[Hook], str], tmp_path: Path, clock: list[float], dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = hook
    path, poster, tries = tmp_path / FILE_NAME, AlertPoster("http://127.0.0.1:9/x" if dead else url), Counter[str]()
    handler.status = 400
    post = poster._post
    monkeypatch.setattr(poster, "_post", lambda body: tries.update([body["kind"]]) or post(body))
    skip_steps(path, 7)
    for _ in range(4 * alert_poster.MOST_TRIES):
        clock[0] += 10_000.0
        poster.look(path, "r", "my run")
        assert poster.flush(10)
    assert tries["nonfinite"] == alert_poster.MOST_TRIES and poster._waiting == {}
    poster.end()


def test_an_alert_of_a_run_that_has_ended_is_posted_again(
    hook: tuple[type[Hook], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = hook
    for name in ("DELAY_SECONDS", "TICK_SECONDS"):
        monkeypatch.setattr(alert_poster, name, 0.01)
    monkeypatch.setattr(alert_poster, "MOST_TRIES", 1_000)
    handler.status = 503
    path, poster = tmp_path / FILE_NAME, AlertPoster(url)
    skip_steps(path, 7)
    poster.look(path, "r", "my run")
    assert poster.flush(10)
    handler.status = 204
    assert handler.taken.wait(10), "nobody looks any more"
    poster.end()


def test_at_the_end_of_the_process_nothing_is_tried_again(
    hook: tuple[type[Hook], str], tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = hook
    handler.status = 503
    path, poster = tmp_path / FILE_NAME, AlertPoster(url)
    monkeypatch.setattr(alert_poster.process, "ending", lambda: True)
    skip_steps(path, 7)
    for _ in range(2):
        clock[0] += 10_000.0
        poster.look(path, "r", "my run")
        assert poster.flush(10)
    assert len([each for each in handler.posted if each["kind"] == "nonfinite"]) == 1
    poster.end()


def test_an_address_that_fails_or_redirects_is_reported_once_without_its_secret(
    hook: tuple[type[Hook], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler, url = hook
    handler.status = 302
    path, poster = tmp_path / FILE_NAME, AlertPoster(url)
    skip_steps(path, 1)
    poster.look(path, "r", "")
    assert poster.flush(10)
    assert {each["path"] for each in handler.posted} == {"/hook?token=s"}, "no redirect is followed"
    dead = AlertPoster("http://127.0.0.1:9/secret")
    dead.look(path, "r", "")
    assert dead.flush(10)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "token" not in caplog.text and "secret" not in caplog.text
    for each in (poster, dead):
        each.end()
