"""Which fixtures do the tests of weights share?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from jax_client.engine.engine import Engine
from support.golden_cases import CASES
from support.golden_engine import open_engine


@pytest.fixture
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Engine]]:
    """Open the engine of a case once; its model directory is `engine.source.path`."""
    engines: dict[str, Engine] = {}

    def get(case: str) -> Engine:
        if case not in engines:
            engines[case] = open_engine(tmp_path_factory.mktemp(case), CASES[case])
        return engines[case]

    yield get
    for engine in engines.values():
        engine.close()
