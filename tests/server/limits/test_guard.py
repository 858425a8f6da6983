"""Does the guard let in only those who call this server by its name, with its key, from no other site's page?"""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

from jax_client.server.wire.accounts import Account
from jax_client.server.wire.guard import Guard
from support import fake_engine
from support.server import served_fake
from support.server.served_fake import LIMIT, received
from support.server.serving import API, KEY

pytestmark = pytest.mark.filterwarnings("ignore")
loaded, models, start = fake_engine.loaded, fake_engine.models, served_fake.start

OWN_KEY = f"X-API-Key: {KEY}"


def statuses(
    port: int, *headers: str, target: str = f"{API}/sessions", method: str = "GET", body: str = ""
) -> list[int]:
    """The statuses of what the server answers to one request, which ends the connection."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *headers, "Connection: close"])
    connection.sendall(f"{head}\r\n\r\n{body}".encode("latin-1"))
    return [int(found) for found in re.findall(rb"HTTP/1.1 (\d+)", received(connection))]


CASES = {
    "its name and key": ([200], ["Host: 127.0.0.1:PORT", OWN_KEY]),
    "its name in capitals, another port of a tunnel": ([200], ["Host: LOCALHOST:9", OWN_KEY]),
    "its IPv6 address": ([200], ["Host: [::1]:PORT", OWN_KEY]),
    "no key": ([401], ["Host: localhost"]),
    "a part of the key": ([401], ["Host: localhost", OWN_KEY[:-1]]),
    "a wrong key before the right one": ([400], ["Host: localhost", "X-API-Key: no", OWN_KEY]),
    "the right key twice": ([400], ["Host: localhost", OWN_KEY, OWN_KEY]),
    "no host": ([400], [OWN_KEY]),
    "another host": ([403], ["Host: evil.com", OWN_KEY]),
    "a host before the right one": ([400], ["Host: evil.com", "Host: localhost", OWN_KEY]),
    "a host behind the right one": ([400], ["Host: localhost", "Host: evil.com", OWN_KEY]),
    "a user in the host": ([400], ["Host: evil.com@127.0.0.1", OWN_KEY]),
    "a path in the host": ([400], ["Host: 127.0.0.1/evil.com", OWN_KEY]),
    "a fragment in the host": ([400], ["Host: 127.0.0.1#evil.com", OWN_KEY]),
    "a query in the host": ([400], ["Host: 127.0.0.1?evil.com", OWN_KEY]),
    "a backslash in the host": ([400], ["Host: 127.0.0.1\\evil.com", OWN_KEY]),
    "a tab in the host": ([400], ["Host: 127.0.0.1\tevil.com", OWN_KEY]),
    "a port beyond all": ([400], ["Host: 127.0.0.1:99999", OWN_KEY]),
    "a port that is no number": ([400], ["Host: 127.0.0.1:8o", OWN_KEY]),
    "a name that ends like this one": ([403], ["Host: 127.0.0.1.nip.io", OWN_KEY]),
    "its own page": ([200], ["Host: 127.0.0.1:PORT", "Origin: http://127.0.0.1:PORT", OWN_KEY]),
    "a page of another port": ([403], ["Host: 127.0.0.1:PORT", "Origin: http://127.0.0.1:3000", OWN_KEY]),
    "a page without a port": ([403], ["Host: 127.0.0.1:PORT", "Origin: http://127.0.0.1", OWN_KEY]),
    "a page of another scheme": ([403], ["Host: 127.0.0.1:PORT", "Origin: https://127.0.0.1:PORT", OWN_KEY]),
    "an extension": ([403], ["Host: 127.0.0.1:PORT", "Origin: chrome-extension://127.0.0.1:PORT", OWN_KEY]),
    "a page of another name of this server": (
        [403],
        ["Host: 127.0.0.1:PORT", "Origin: http://localhost:PORT", OWN_KEY],
    ),
    "another site's page": ([403], ["Host: localhost", "Origin: http://evil.com", OWN_KEY]),
    "no page that says so": ([403], ["Host: localhost", "Origin: null", OWN_KEY]),
    "an empty origin": ([403], ["Host: localhost", "Origin:", OWN_KEY]),
    "two origins": ([400], ["Host: localhost", "Origin: http://evil.com", "Origin: http://localhost", OWN_KEY]),
    "a user in the origin": ([403], ["Host: localhost", "Origin: http://evil.com@localhost", OWN_KEY]),
    "a link that the user typed": ([200], ["Host: localhost", "Sec-Fetch-Site: none", OWN_KEY]),
    "a fetch of its own page": ([200], ["Host: localhost", "Sec-Fetch-Site: same-origin", OWN_KEY]),
    "a fetch of another port's page": ([403], ["Host: localhost", "Sec-Fetch-Site: same-site", OWN_KEY]),
    "a fetch of another site": ([403], ["Host: localhost", "Sec-Fetch-Site: cross-site", OWN_KEY]),
    "two fetches": ([400], ["Host: localhost", "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site", OWN_KEY]),
}


def test_who_is_let_in(start: Any) -> None:
    port = start().port
    for case, (expected, headers) in CASES.items():
        assert statuses(port, *(header.replace("PORT", str(port)) for header in headers)) == expected, case


def test_a_target_is_a_path(start: Any) -> None:
    port = start().port
    for target in (f"http://evil.com{API}/sessions", f"http://127.0.0.1{API}/sessions", "*", "evil.com:80"):
        assert statuses(port, "Host: 127.0.0.1", OWN_KEY, target=target) == [400], target
    assert statuses(port, "Host: 127.0.0.1", OWN_KEY, target=API + "/sessions") == [200]


def test_nothing_behind_a_body_counts(start: Any) -> None:
    port = start().port
    evil = ["Host: evil.com", "Origin: http://evil.com", "Transfer-Encoding: chunked"]
    own = ["Host: localhost", OWN_KEY, "Transfer-Encoding: chunked"]
    for trailer in ("Host: localhost", "Origin: http://localhost", OWN_KEY, "Content-Encoding: gzip", "X-Other: 1"):
        post = {"target": f"{API}/telemetry", "method": "POST", "body": f"2\r\n{{}}\r\n0\r\n{trailer}\r\n\r\n"}
        assert statuses(port, *evil, **post) in ([400], [403]), trailer
        assert statuses(port, *own, **post) in ([400], []), trailer
    whole = {"target": f"{API}/telemetry", "method": "POST", "body": "2\r\n{}\r\n0\r\n\r\n"}
    assert statuses(port, *own, **whole) == [200]


def test_refusals_name_the_value_and_the_way_out() -> None:
    guard = Guard(lambda *_: None, api_key=KEY, hosts=["localhost"], account=Account)  # type: ignore[arg-type, return-value]

    def said(*headers: tuple[bytes, bytes]) -> str:
        scope = {"type": "http", "headers": headers, "path": "/", "server": ("127.0.0.1", 1), "scheme": "http"}
        found = guard.check(scope)
        return found[1] if isinstance(found, tuple) else "let in"

    host, key = (b"host", b"localhost:1"), (b"x-api-key", KEY.encode())
    assert "'evil.com'" in said((b"host", b"evil.com"), key) and "--allow-host" in said((b"host", b"evil.com"), key)
    assert "'http://a:2'" in said(host, key, (b"origin", b"http://a:2"))
    assert "cross-site" in said(host, key, (b"sec-fetch-site", b"cross-site"))
    assert "x-api-key is there twice" in said(host, key, key) and "TINKER_API_KEY" in said(host)
    assert len(said((b"host", b"x" * 60_000), key)) < 300
    assert said(host, key) == "let in"
