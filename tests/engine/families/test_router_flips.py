"""Does the probe of router flips see every choice, find none in float32, and count those that are there?"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts" / "probes"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("router_flips")


@pytest.mark.full
def test_in_float32_trainer_and_sampler_choose_the_same_experts(script: Any, tmp_path: Path) -> None:
    """A sequence is longer than a page, and with this seed no token has two experts of almost equal probability."""
    sizes = script.Sizes(layers=2, width=32, experts=8, each=2, hidden=16, vocabulary=64, sequences=2, shortest=12,
                         longest=36, prompt=5)  # fmt: skip
    found = script.measure(tmp_path / "model", sizes, "float32")
    assert found["routers"]["smallest gap"] > 1e-5
    for pair, line in found["pairs"].items():
        assert line["share of token and layer"] == line["share of tokens"] == 0, pair
        assert line["max nats"] < 5e-5, pair
        assert line["tokens"] == (40 if "decode" in pair else 48), pair


def test_sets_are_compared_and_not_their_order(script: Any) -> None:
    routers_LDE = np.arange(2.0).reshape(2, 1, 1)

    def of(choices: list[list[list[int]]], logprobs: list[float]) -> Any:
        place = script.Choices(routers_LDE, 3, 2)
        place.choice_LTk[:] = choices
        return script.Pass(logprobs=[np.array(logprobs)], choices=[place])

    a = of([[[0, 1], [0, 1], [2, 3]], [[4, 5], [4, 5], [6, 7]]], [np.nan, -1.0, -2.0])
    b = of([[[1, 0], [1, 0], [2, 3]], [[4, 6], [5, 4], [5, 7]]], [np.nan, -1.5, -2.25])
    gap_LT = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    line = script.compare(a, b, [gap_LT], 1)
    assert (line["tokens"], line["share of tokens"], line["share of token and layer"]) == (2, 0.5, 0.25)
    assert (line["mean nats where some layer differs"], line["mean nats where none does"]) == (0.25, 0.5)
    assert (line["max nats"], line["largest gap that flipped"]) == (0.5, 0.6)
    b.choices[0].choice_LTk[1, 2] = -1
    with pytest.raises(RuntimeError, match="were not recorded"):
        script.compare(a, b, [gap_LT], 1)
