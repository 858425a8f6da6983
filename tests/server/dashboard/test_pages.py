"""Is everything that a person or a model wrote inert on the page, and are its files the only ones served?"""

from __future__ import annotations

import gzip
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from jax_client.server.dashboard import pages
from support.server.pages import HOSTILE, Page, Parts

BAD = ("<img src=x onerror=alert(1)>", HOSTILE, '"><b>', "\u2028</script>", "\ud800", "a\r\nSet-Cookie: b=c")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def check_html(answer: httpx.Response) -> None:
    """A policy without inline scripts, and a page that has none."""
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] in ("no-referrer", "same-origin")
    for tag, attributes in Tags(answer.text).found:
        assert tag not in ("style", "iframe", "object", "base"), tag
        assert tag != "script" or attributes.get("src", "").startswith("/dashboard/static/"), attributes  # type: ignore[union-attr]
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes
        assert "javascript:" not in str(attributes)


def test_html_has_a_policy_and_no_inline_script(page: Page, client: httpx.Client) -> None:
    for path in ("/", "/dashboard/tables", "/dashboard/static/index.html"):
        answer = client.get(path)
        assert answer.status_code == 200
        check_html(answer)
    with page.client(key=None) as stranger:
        for answer in (
            stranger.get("/"),
            stranger.post("/dashboard/login", data={"key": HOSTILE}),
            stranger.get("/?token=a"),
        ):
            assert answer.status_code == 401 and "<form" in answer.text and "<script" not in answer.text
            check_html(answer)
            # Without a referrer a browser would call the form's origin "null", which is refused.
            assert answer.headers["Referrer-Policy"] == "same-origin"


@pytest.mark.filterwarnings("ignore")
def test_what_people_wrote_is_text(parts: Parts, client: httpx.Client) -> None:
    for number, bad in enumerate(BAD):
        parts.source.set(f"r{number}", name=bad, note=bad, reason=bad, model=bad, tags=[bad], state=bad)
    answer = client.get("/dashboard/tables")
    check_html(answer)
    tags = [tag for tag, _ in Tags(answer.text).found]
    assert "img" not in tags and "b" not in tags and "script" not in tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in answer.text
    answer = client.get("/dashboard/api/runs")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
    names = [each["name"] for each in answer.json()["runs"]]
    assert names[:2] == list(BAD[:2]) and names[5] == BAD[5] and "Set-Cookie" not in answer.headers
    for bad in BAD[:4]:
        answer = client.get(f"/dashboard/api/runs/{httpx.URL('http://a', params={'a': bad}).query.decode()[2:]}")
        assert answer.status_code == 404 and answer.headers["Content-Type"] == "application/json"


def test_only_the_pages_files_are_served(client: httpx.Client) -> None:
    names = set(pages.static_files())
    assert "index.html" in names
    for name in sorted(names):
        file = pages.static_files()[name]
        answer = client.get(f"/dashboard/static/{name}", headers={"Accept-Encoding": "gzip"})
        assert answer.content == file.data and answer.headers["ETag"] == file.tag
        same = client.get(f"/dashboard/static/{name}", headers={"If-None-Match": file.tag})
        assert same.status_code == 304 and not same.content
    for name in (
        "../pages.py",
        "..%2fpages.py",
        "%2e%2e/pages.py",
        "....//pages.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "index.html%00",
        "./index.html",
        "views/../index.html",
        "..\\pages.py",
        "index.html/",
        "",
        "a" * 3_000,
    ):
        answer = client.send(httpx.Request("GET", f"{client.base_url}/dashboard/static/{name}", headers=client.headers))
        traversed = answer.status_code == 404 or answer.content == pages.static_files()["index.html"].data
        assert traversed and b"def " not in answer.content and b"root:" not in answer.content, name


def test_files_are_sent_zipped_where_that_is_smaller(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"export const a = 1;\n" * 100
    zipped = gzip.compress(data)
    files = {"a.js": pages.StaticFile(data=data, zipped=zipped, tag='"t"', media_type=pages.TYPES["js"])}
    monkeypatch.setattr(pages, "static_files", lambda: files)
    small = client.get("/dashboard/static/a.js", headers={"Accept-Encoding": "gzip"})
    assert small.headers["Content-Encoding"] == "gzip" and int(small.headers["Content-Length"]) == len(zipped)
    plain = client.get("/dashboard/static/a.js", headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers and plain.content == small.content == data
    assert plain.headers["Content-Type"] == "text/javascript; charset=utf-8"


def test_the_index_names_files_that_are_there() -> None:
    text = pages.static_files()["index.html"].data.decode()
    for name in re.findall(r'(?:src|href)="/dashboard/static/([^"]+)"', text):
        assert name in pages.static_files(), name


def test_the_wheel_holds_the_pages_files() -> None:
    root = Path(__file__).parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "jax_client" / "server" / "dashboard"
    packed = {path for pattern in patterns["jax_client.server.dashboard"] for path in folder.glob(pattern)}
    assert {str(path.relative_to(folder / "static")) for path in packed if path.is_file()} == set(pages.static_files())


def test_state_says_what_can_be_done(parts: Parts, client: httpx.Client) -> None:
    parts.models.append("org/model")
    found = client.get("/dashboard/api/state").json()
    assert found["home"] == str(parts.home) and not found["serving"] and found["can_act"] and not found["logs"]
    assert found["playground"] == {"available": True, "reason": None, "models": ["org/model"], "loading": None}
    assert found["version"].count(".") == 2 and abs(found["time"]) > 1e9 and found["host"]


def test_the_device_of_open_runs(parts: Parts, client: httpx.Client) -> None:
    parts.source.set("done", state="done")
    parts.source.set("open", state="live")
    parts.source.add_point("open", 1, 2.0)
    parts.source.events = [{"kind": "compile", "step": 1, "time": 3.0, "details": {"program": HOSTILE}}]
    found = client.get("/dashboard/api/device").json()
    assert found["engines"] == found["hosts"] == [] and found["points"] == {}
    newest = {"time": 5.0, "metrics": {"memory_bytes/weights": 7.0}}
    parts.source.device_points = {"open": newest, "done": newest}
    assert client.get("/dashboard/api/device").json()["points"] == {"open": newest}
    assert [(each["run"], each["details"]["program"]) for each in found["compiles"]] == [("open", HOSTILE)]
    assert json.dumps(found)
