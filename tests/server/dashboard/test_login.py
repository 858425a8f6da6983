"""Is every route of the page behind the key, and does a browser get in by key and by token, once each?"""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from jax_client.errors import BadRequestError
from jax_client.server.public_url import PublicUrl
from jax_client.server.wire import logins
from jax_client.server.wire.guard import KEY_HEADER
from support.server.pages import KEY, Page, Parts

ORIGIN = {"Sec-Fetch-Site": "same-origin"}


def paths(parts: Parts) -> list[tuple[str, str]]:
    found = []
    for route in parts.board().routes():
        path = re.sub(r"\{(name|rest):path\}", "index.html", route.path).replace("{run:path}", "some-run")
        found += [(method, path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return found


def test_every_route_is_behind_the_key(parts: Parts, page: Page) -> None:
    known = paths(parts)
    assert len(known) > 20 and ("GET", "/") in known and ("POST", "/dashboard/api/playground/sample") in known
    with page.client(key=None) as client:
        for method, path in [*known, ("GET", "/dashboard/api/none"), ("GET", "/dashboard/")]:
            for headers in ({}, {"X-API-Key": "tml-wrong"}, {"Cookie": f"{logins.COOKIE}_{page.port}=x"}):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, headers)
                assert KEY not in answer.text
        form = client.get("/").text
        assert '<form method="post">' in form and form.count("<input") == 1
        assert '<form method="post" action="/dashboard/login">' in client.get("/dashboard/tables").text
        assert client.get("/dashboard/api/runs").json()["detail"]


def test_a_key_logs_in_and_the_cookie_opens_the_page_only(page: Page) -> None:
    with page.client(key=None) as client:
        wrong = client.post("/dashboard/login", data={"key": "tml-wrong"}, headers=ORIGIN)
        assert wrong.status_code == 401 and "Set-Cookie" not in wrong.headers and "no key of this server" in wrong.text
        assert client.post("/", data={"key": "tml-wrong"}, headers=ORIGIN).status_code == 401
        for path in ("/dashboard/login", "/"):
            right = client.post(path, data={"key": f" {KEY} "}, headers=ORIGIN)
            assert (right.status_code, right.headers["Location"]) == (303, "/"), path
        cookie = right.headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; ")) and KEY not in cookie
        assert "Secure" not in cookie, "plain HTTP would never send it back"
        for path in ("/", "/dashboard/tables", "/dashboard/api/runs", "/dashboard/static/index.html"):
            assert client.get(path).status_code == 200, path
        assert client.get("/api/v1/sessions").status_code == 401, "the SDK's routes want the key"
        assert client.get("/metrics").status_code == 401
        assert client.get("/dashboard/login").status_code == 405
    with page.client(key=None) as other:
        assert other.get("/").status_code == 401, "the cookie is that browser's"
    with page.client() as script:
        assert script.get("/dashboard/api/runs").status_code == 200, "a script sends the key"


def test_a_token_logs_in_once_and_another_one_is_shown(parts: Parts) -> None:
    guard = parts.guard()
    shown: list[str] = []
    guard.announce_page(shown.append)
    page = Page(guard)
    try:
        with page.client(key=None) as client:
            assert client.head(f"/{shown[0]}").status_code == 405, "a preview uses nothing up"
            assert client.get("/?token=").status_code == client.get("/?token=wrong").status_code == 401
            answer = client.get(f"/{shown[0]}")
            assert (answer.status_code, answer.headers["Location"]) == (303, "/") and client.get("/").status_code == 200
        assert len(shown) == 2 and shown[0] != shown[1] and shown[1].startswith("?token=")
        with page.client(key=None) as client:
            again = client.get(f"/{shown[0]}")
            assert again.status_code == 401 and "once already" in again.text and client.get("/").status_code == 401
            assert client.get(f"/{shown[1]}").status_code == 303
            assert len(shown) == 3
    finally:
        page.stop()


def test_without_a_key_there_is_no_login(parts: Parts) -> None:
    guard = parts.guard(api_key=None)
    shown: list[str] = []
    guard.announce_page(shown.append)
    page = Page(guard)
    try:
        with page.client(key=None) as client:
            assert shown == [""] and client.get("/").status_code == 200
            assert client.get("/?token=old").status_code == 200, "an address of an earlier start is no dead end"
    finally:
        page.stop()


def test_cookies_end_and_are_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(logins, "MOST_COOKIES", 2)
    monkeypatch.setattr(logins, "MOST_TOKENS", 2)
    made = logins.Logins(lambda key: None if key != b"k" else "entry")
    headers = {b"host": b"localhost:9"}

    def log_in() -> str:
        request: Any = type("Request", (), {"scope": {"headers": list(headers.items())}})()
        answer = made._logged_in(request, "entry")
        return answer.headers["Set-Cookie"].split(";")[0]

    first, second, third = log_in(), log_in(), log_in()
    found = [made.of_cookie({**headers, b"cookie": each.encode()}) for each in (first, second, third)]
    assert found == [None, "entry", "entry"], "the oldest goes"
    assert made.of_cookie({b"host": b"localhost:8", b"cookie": third.encode()}) is None, "another port's cookie"
    monkeypatch.setattr(logins.time, "monotonic", lambda: 10.0**12)
    assert made.of_cookie({**headers, b"cookie": third.encode()}) is None
    for broken in (b"", b"=", b"\xff\xfe;;=", b"jax_client_session_9", b"a" * 10_000):
        assert made.of_cookie({**headers, b"cookie": broken}) is None
    for _ in range(5):
        made.new_token("entry")
    assert len(made._tokens) == 2


@pytest.mark.parametrize(
    "other",
    [
        b'theme={"a": 1, "b": 2}',
        b"x=a b",
        b"na[me]=1",
        b"u=\xe9t\xe9",
        b'k="unterminated',
        b"a,b=1",
        b"flag",
        b"=",
        b"",
    ],
)
def test_cookies_of_other_programs_of_the_host_are_passed_over(other: bytes) -> None:
    made: logins.Logins[str] = logins.Logins(lambda key: "entry")
    headers = {b"host": b"localhost:9"}
    request: Any = type("Request", (), {"scope": {"headers": list(headers.items())}})()
    own = made._logged_in(request, "entry").headers["Set-Cookie"].split(";")[0].encode()
    stale = own.partition(b"=")[0] + b"=of-an-earlier-server"
    for sent in (own, other + b"; " + own, own + b";" + other, stale + b"; " + own, own + b"; " + stale):
        assert made.of_cookie({**headers, b"cookie": sent}) == "entry", sent
    for sent in (other, b"x" + own, b"x=" + own, other + b"; " + stale):
        assert made.of_cookie({**headers, b"cookie": sent}) is None, sent


@pytest.mark.parametrize("public", ["https://Train.example.org", "https://train.example.org:8443/"])
def test_a_browser_logs_in_and_posts_through_a_proxy_with_tls(parts: Parts, public: str) -> None:
    url = PublicUrl.parse(public)
    page = Page(parts.guard(public=url))
    name = str(url).partition("://")[2]
    try:
        # The proxy passes the name on, or it writes its own in its place.
        for host in (name, "train.example.org", f"127.0.0.1:{page.port}"):
            with page.client(key=None) as client:
                client.headers.update({"Host": host, "Sec-Fetch-Site": "same-origin", "Origin": str(url)})
                answer = client.post("/dashboard/login", data={"key": KEY})
                assert (answer.status_code, answer.headers["Location"]) == (303, "/"), host
                assert "Secure" in answer.headers["Set-Cookie"].split("; ")
                client.headers["Cookie"] = answer.headers["Set-Cookie"].split(";")[0]
                path = "/dashboard/api/checkpoints/delete"
                assert client.post(path, json={}).status_code == 400, "it is read"
                for origin in (f"http://{name}", f"https://{name}0", "https://train.example.org:1", "https://evil.com"):
                    assert client.post(path, json={}, headers={"Origin": origin}).status_code == 403, origin
                headers = {"Origin": f"https://127.0.0.1:{page.port}", "X-Forwarded-Proto": "https"}
                assert client.post(path, json={}, headers=headers).status_code == 403, "anyone can send that"
        with page.client() as client:
            near = {"Origin": page.url, "Sec-Fetch-Site": "same-origin"}
            assert client.post("/dashboard/api/checkpoints/delete", json={}, headers=near).status_code == 400
    finally:
        page.stop()


@pytest.mark.parametrize(
    "text",
    [
        *("train.example.org", "ftp://a", "https://", "https://a/b", "https://a?b", "https://a#b", "https://u@a"),
        *("https://a:b@c", "https://a:0", "https://a:99999", "https://a b", "https://é.org", "https://a\n", ""),
    ],
)
def test_a_public_address_has_a_scheme_a_name_and_a_port(text: str) -> None:
    with pytest.raises(BadRequestError, match="give https://NAME"):
        PublicUrl.parse(text)
    said = {each: str(PublicUrl.parse(each)) for each in ("https://A.b:443/", "http://[::1]:80", "http://a:443")}
    assert list(said.values()) == ["https://a.b", "http://[::1]", "http://a:443"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.com"},
    ],
)
def test_other_sites_are_refused(page: Page, client: httpx.Client, headers: dict[str, str]) -> None:
    posts = ("/dashboard/login", "/dashboard/api/checkpoints/delete", "/dashboard/api/playground/sample")
    for path in posts:
        assert client.post(path, json={}, headers=headers).status_code == 403, path
    assert client.get("/", headers=headers).status_code == 403
    assert KEY_HEADER == b"x-api-key"


def test_a_body_is_json_and_bounded(client: httpx.Client) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        answer = client.post(
            "/dashboard/api/checkpoints/delete", content=b'{"path": "x"}', headers={"Content-Type": content_type}
        )
        assert answer.status_code == 400 and "application/json" in answer.json()["detail"], content_type
    headers = {"Content-Type": "application/json"}
    for body, status in (
        (b"[]", 400),
        (b"{", 400),
        (b"[" * 2000, 400),
        (b'{"a": NaN}', 400),
        (b" " * 2**20 + b"{}", 413),
    ):
        answer = client.post("/dashboard/api/playground/sample", content=body, headers=headers)
        assert answer.status_code == status and answer.json()["detail"], body[:10]
    long = client.post("/dashboard/login", content=b"key=" + b"a" * 5_000)
    assert long.status_code == 401 and "more than" in long.text
