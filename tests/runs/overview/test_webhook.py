"""Are new alerts posted to the address that was allowed, and to no other?"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError
from jax_client.metrics.store import FILE_NAME, MetricsStore, Point
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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).posted.append({"path": self.path, **json.loads(body)})
        self.send_response(self.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], str]]:
    handler = type("Handler", (Hook,), {"posted": [], "status": 204})
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
