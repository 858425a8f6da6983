"""Does the table of methods hold every method of the SDK, and would it say so if one hung, failed or were missing?"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker

SCRIPTS = Path(__file__).parents[2] / "scripts" / "probes"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("probe_methods")


@pytest.fixture
def probing(script: Any) -> Any:
    return importlib.import_module("probing")


def test_every_method_has_a_probe_and_a_place_in_the_page(script: Any) -> None:
    assert script.differences() == []
    page = script.PAGE.read_text().partition(script.BEGIN)[2].partition(script.END)[0]
    for section in page.split("### ")[1:]:
        client, _, table = section.partition("\n")
        if hasattr(tinker, client):
            listed = {name.strip("` ") for row in table.splitlines()[3:] for name in row.split("|")[1:2]
                      for name in name.split(",")}  # fmt: skip
            assert listed == set(script.public_methods(getattr(tinker, client))), client
    assert page.count("### ") == len(script.CLIENTS) + 1
    assert "broken" not in page


def test_a_method_without_a_probe_is_named(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinker.RestClient, "brand_new", lambda self: None, raising=False)
    assert script.differences() == ["RestClient.brand_new has no probe"]
    monkeypatch.delattr(tinker.RestClient, "brand_new")
    monkeypatch.delattr(tinker.TrainingClient, "forward")
    assert script.differences() == ["TrainingClient.forward is probed, and is no method"]


REFUSED = tinker.TinkerError


def refuse() -> None:
    raise tinker.TinkerError("no use: nobody has it. Do without.")


def fail() -> None:
    raise ValueError("broken")


def fail_on_the_way(world: Any, ask: Any) -> None:
    refuse()


@pytest.mark.parametrize(
    ("run", "expected", "text", "wrong"),
    [
        (lambda w, ask: ask.of(lambda: None), None, "works", None),
        (lambda w, ask: ask.of(refuse), REFUSED, "refused: `TinkerError`: no use: nobody has it", None),
        (lambda w, ask: ask.of(refuse), None, "broken", "TinkerError: no use: nobody has it. Do without."),
        (lambda w, ask: ask.of(fail), REFUSED, "broken", "ValueError: broken"),
        (fail_on_the_way, REFUSED, "broken", "TinkerError: no use: nobody has it. Do without."),
        (lambda w, ask: ask.of(lambda: None), REFUSED, "broken", "is not refused"),
        (lambda w, ask: time.sleep(5), None, "broken", "hangs: no answer in 0 s"),
        (lambda w, ask: time.sleep(5), REFUSED, "broken", "hangs: no answer in 0 s"),
    ],
)
def test_what_comes_of_a_probe(
    script: Any, probing: Any, run: Any, expected: Any, text: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LIMIT_SECONDS", 0.2)
    refused = {} if expected is None else {"served": expected}
    probe = probing.Probe(client="RestClient", method="whoami", run=run, refused=refused, absent=None)
    assert script.outcome(probe, SimpleNamespace(side="served")) == (text, wrong)


def test_a_value_where_the_sdk_gives_a_future_is_wrong(probing: Any) -> None:
    ask = probing.Ask("RestClient", "get_sampler")
    with pytest.raises(probing.WrongError, match="gives str, which is no future"):
        ask(SimpleNamespace(get_sampler=lambda sampler_id: sampler_id), "s")


def test_what_is_missing_only_by_design(script: Any, probing: Any) -> None:
    member = {"client": "ServiceClient", "run": fail_on_the_way, "refused": {}, "absent": "a reason"}
    world = SimpleNamespace(side="in-process", module=importlib.import_module("jax_client"))
    gone, there = (probing.Probe(method=name, **member) for name in ("holder", "close"))
    assert script.outcome(gone, world) == ("not there: a reason", None)
    assert script.outcome(there, world)[1] == "is there: it needs a probe"


@pytest.mark.full
@pytest.mark.torch
def test_the_page_says_what_the_methods_do() -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "probe_methods.py")], env=env, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
