"""What do the page's tests share? A page over a state directory with checkpoints, and a source that says anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.command_line import fill
from support.server.pages import Page, Parts


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(fill(tmp_path / "home"))


@pytest.fixture
def page(parts: Parts) -> Iterator[Page]:
    served = Page(parts.guard())
    yield served
    served.stop()


@pytest.fixture
def client(page: Page) -> Iterator[httpx.Client]:
    with page.client() as found:
        yield found
