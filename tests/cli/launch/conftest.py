"""Which fixture do the tests of several hosts share? `launches` starts `launch`, and leaves no process behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.launch.launches import Launches


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Callable[..., Launches]]:
    """Make launches on a number of hosts; the test fails if any process outlives them."""
    made: list[Launches] = []

    def make(hosts: int = 2) -> Launches:
        made.append(Launches(tmp_path, hosts))
        return made[-1]

    yield make
    left = [each.close() for each in made]
    assert left == [{} for _ in made], "processes were left"
