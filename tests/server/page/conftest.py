"""What do tests of the page share? One browser, and a fake server for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.page.browser import browser
from support.page.fake_server import FakeDashboard

if TYPE_CHECKING:
    from playwright.sync_api import Browser


# Its driver keeps an event loop of this thread running, beside which the tests of other files could start none.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def fake() -> Iterator[FakeDashboard]:
    server = FakeDashboard()
    yield server
    server.close()
