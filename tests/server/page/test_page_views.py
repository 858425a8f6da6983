"""Does each view show what the server knows, and only as text?"""

from __future__ import annotations

import ast
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import pytest

from support.page import made
from support.page.browser import findings, opened, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from support.page.fake_server import FakeDashboard

pytestmark = pytest.mark.full

RUN = "#/run/s1%3Atrain%3A0"
# Each view, and what stands there once it is.
VIEWS = {
    "#/runs": "table.runs tbody tr:nth-child(6)",
    RUN: "figure.chart canvas",
    "#/device": ".stack rect",
    "#/checkpoints": "table.checkpoints tbody tr:nth-child(4)",
    "#/playground": "form.play-form option:nth-child(2)",
    "#/compare?runs=s1%3Atrain%3A0&runs=s2%3Atrain%3A0": "figure.chart canvas",
    "#/rollouts": "article.sample",
}


def show(page: Page, url: str, view: str) -> None:
    page.goto(url + view)
    page.wait_for_selector(VIEWS[view], state="attached")
    if view == "#/playground":
        page.fill("textarea", "Who are you?")
        page.click("button[type=submit]")
        page.wait_for_selector(".sample .token[role=option]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(chromium: Browser, fake: FakeDashboard, view: str, scheme: str) -> None:
    with opened(chromium, fake.url, scheme=scheme) as page:
        show(page, fake.url, view)
        assert findings(page) == []


@pytest.mark.parametrize("view", VIEWS)
def test_views_fit_a_small_phone(chromium: Browser, fake: FakeDashboard, view: str) -> None:
    with opened(chromium, fake.url, width=360) as page:
        show(page, fake.url, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_texts_stay_texts(chromium: Browser, fake: FakeDashboard, view: str) -> None:
    with opened(chromium, fake.url) as page:
        show(page, fake.url, view)
        assert page.evaluate("window.owned") is None and "owned" not in page.title()
        assert page.locator("main img, main script").count() == 0
        assert made.HOSTILE in (page.locator("main").text_content() or "") or view in (RUN, "#/playground")


def test_a_hostile_metric_is_a_charts_title(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url + RUN) as page:
        page.click("summary:has-text('More charts')")
        page.wait_for_selector("details[open] figure.chart canvas")
        assert made.HOSTILE in page.locator("figcaption .name").all_text_contents()
        assert page.evaluate("window.owned") is None


def test_a_step_is_seen_within_a_second(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("table.runs")
        for step in range(820, 825):
            began = time.monotonic()
            fake.step("s1:train:0", step, 1.0)
            until(page, f"document.querySelector('table.runs').textContent.includes('{step}')")
            assert time.monotonic() - began < 1


def test_the_theme_is_the_systems_until_chosen(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url, scheme="dark") as page:
        ground = "getComputedStyle(document.body).backgroundColor"
        page.wait_for_selector("table.runs")
        assert page.evaluate(ground) == "rgb(17, 20, 24)"
        page.click("#tools button[title='Light or dark']")
        assert page.evaluate(ground) == "rgb(247, 247, 244)"
        page.reload()
        page.wait_for_selector("table.runs")
        assert page.evaluate(ground) == "rgb(247, 247, 244)"


def test_all_can_be_reached_with_keys(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("table.runs")
        keys, focused = page.keyboard, "document.activeElement.textContent"
        for key in "jjk":
            keys.press(key)
        assert page.evaluate(focused) == "math-rl-0423"
        keys.press("c")
        keys.press("j")
        keys.press("c")
        assert page.locator("input.pick:checked").count() == 2
        keys.press("C")
        until(page, "location.hash.startsWith('#/compare?runs=')")
        page.wait_for_selector("figure.chart canvas")
        for key, view in (("d", "device"), ("k", "checkpoints"), ("p", "playground"), ("o", "rollouts"), ("r", "runs")):
            keys.press("g")
            keys.press(key)
            until(page, f"document.querySelector('main').dataset.view === '{view}'")
        keys.press("/")
        keys.type("lighthouse")
        keys.press("Escape")
        until(page, "document.querySelectorAll('table.runs tbody tr').length === 1")
        keys.press("j")
        keys.press("Enter")
        page.wait_for_selector("h1:has-text('sft-lighthouse')")
        keys.press("?")
        assert page.locator("dialog[open] dt").count() > 8
        keys.press("Escape")
        assert page.locator("dialog[open]").count() == 0


def test_charts_zoom_and_pan_with_keys(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url + RUN) as page:
        page.wait_for_selector("figure.chart canvas")
        page.focus("figure.chart")
        for key in ("+", "+", "ArrowLeft"):
            page.keyboard.press(key)
        page.click("button:has-text('Copy link')")
        page.wait_for_selector(".toast:has-text('copied')")
        link = page.evaluate("navigator.clipboard.readText()")
        low, high = map(float, link.split("range=")[1].split("_"))
        assert 0 <= low < high <= 812 and high - low == pytest.approx(811 * 0.36, rel=0.01)
        page.focus("figure.chart")
        page.keyboard.press("0")
        page.click("button:has-text('Copy link')")
        until(page, "(async () => !(await navigator.clipboard.readText()).includes('range'))()")


def test_a_deleted_checkpoint_comes_back(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url + "#/checkpoints") as page:
        row = "tr[data-path='tinker://s1:train:0/sampler_weights/final']"
        page.click(f"{row} button:has-text('Delete')")
        page.wait_for_selector(row, state="detached")
        assert "tinker://s1:train:0/sampler_weights/final" in fake.deleted
        page.click(".toast.undo button:has-text('Undo')")
        page.wait_for_selector(row)
        assert not fake.deleted


def test_a_deletion_is_offered_back_once(chromium: Browser, fake: FakeDashboard) -> None:
    fake.deleted["tinker://s1:train:0/sampler_weights/final"] = time.time() + 600
    with opened(chromium, fake.url + "#/checkpoints") as page:
        for _ in range(3):
            page.wait_for_selector("table.checkpoints tbody tr")
            page.wait_for_selector(".toast.undo")
            page.click("nav a:has-text('Runs')")
            page.wait_for_selector("table.runs tbody tr")
            page.click("nav a:has-text('Checkpoints')")
        page.wait_for_selector("table.checkpoints tbody tr")
        assert page.locator(".toast.undo").count() == 1
        # Had back, and deleted again: that is another one.
        page.click(".toast.undo button:has-text('Undo')")
        row = "tr[data-path='tinker://s1:train:0/sampler_weights/final']"
        page.click(f"{row} button:has-text('Delete')")
        page.wait_for_selector(".toast.undo")


def test_names_are_sent_as_they_are(chromium: Browser, fake: FakeDashboard) -> None:
    names = ["log:lr=0.1,seed=1", "log:drop 10%", "log:a%2Cb&c?d"]
    for name in names:
        fake.runs.append(made.run_row(name, name, "live", time.time()))
        fake.series[name] = made.series(name, time.time(), 60)
    with opened(chromium, fake.url + "#/compare") as page:
        for name in names:
            page.check(f"li:has-text('{name}') input")
        page.click("button:has-text('Compare')")
        page.wait_for_selector("figure.chart canvas")
        shown = page.locator(".compare-legend a").all_text_contents()
        assert sorted(shown) == sorted(names)
        heads = page.locator("section table.plain thead th").all_text_contents()
        assert heads[1:] == [f"{i} {name}" for i, name in enumerate(shown, 1)]
        page.click("button:has-text('Copy link')")
        page.wait_for_selector(".toast:has-text('copied')")
        page.goto(page.evaluate("navigator.clipboard.readText()"))
        page.reload()
        page.wait_for_selector("figure.chart canvas")
        name = "log:a%2Cb&c?d"
        page.click(f".compare-legend a:has-text('{name}')")
        page.wait_for_selector(f"h1[title='{name}']")


def test_finer_points_are_asked_for_by_name(chromium: Browser, fake: FakeDashboard) -> None:
    fake.series["s1:train:0"] = made.series("s1:train:0", time.time(), 1500)
    with opened(chromium, fake.url + RUN) as page:
        page.wait_for_selector("figure.chart canvas")
        page.focus("figure.chart")
        for _ in range(3):
            page.keyboard.press("+")
        until(page, "performance.getEntriesByType('resource').some(({ name }) => name.includes('names='))")
        query = parse_qs(next(query for query in fake.asked if "names=" in query))
        assert {"loss:mean", "grad_norm:mean"} <= set(query["names"])


def test_events_say_how_a_run_ended_and_where_it_began(chromium: Browser, fake: FakeDashboard) -> None:
    details = {
        "end": {"how": "exception", "text": "ValueError: boom"},
        "start": {"base_model": "m", "rank": 8, "origin": "tinker://a/weights/b"},
        "host": {"role": "sampler", "number": 1, "host": "box", "state": "lost"},
        "save": {"path": "tinker://a/weights/c", "seconds": 2.0},
    }
    words = "async (event) => (await import('/dashboard/static/charts/group.js')).words(event)"
    with opened(chromium, fake.url) as page:
        told = [
            page.evaluate(words, {"kind": kind, "step": 3, "time": 1.0, "details": each}).split(": ", 1)[1]
            for kind, each in details.items()
        ]
    assert told == [
        "ended: exception, ValueError: boom",
        "started m, rank 8, from tinker://a/weights/b",
        "sampler 1 on box: lost",
        "saved tinker://a/weights/c in 2 s",
    ]


def test_checkpoints_say_what_is_damaged_and_how_to_resume(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url + "#/checkpoints") as page:
        damaged = page.locator("tr.damaged")
        assert "sha256 differs" in (damaged.text_content() or "") and damaged.locator(".badge.bad").count() == 1
        damaged.locator("button.resume").click()
        page.wait_for_selector(".toast")
        assert page.evaluate("navigator.clipboard.readText()").startswith("client = service.create_training_client")


def test_the_playground_shows_a_token_in_full(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        show(page, fake.url, "#/playground")
        page.focus(".sample .token >> nth=0")
        page.keyboard.press("ArrowRight")
        assert page.locator(".inspector tr").count() >= 5
        assert "rank" in (page.locator(".inspector").text_content() or "")
        page.select_option("label:has-text('Beside it') select", index=2)
        page.click("button[type=submit]")
        page.wait_for_selector("select[aria-label=Colours]")
        page.select_option("select[aria-label=Colours]", "difference")
        assert page.locator(".answer").count() == 2
        assert page.locator(".tokens [class*=more-], .tokens [class*=less-]").count() > 0
        body = next(body for action, body in reversed(fake.posts) if action.endswith("sample"))
        assert body["messages"] == [{"role": "user", "content": "Who are you?"}] and body["path"]


def test_copied_python_is_python(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        show(page, fake.url, "#/playground")
        text = 'Say "é" & \\n \u2028 🙂'
        page.fill("textarea", text)
        page.click("button:has-text('Copy as Python')")
        page.wait_for_selector(".toast:has-text('Python')")
        script = page.evaluate("navigator.clipboard.readText()")
        line = next(line for line in script.splitlines() if line.startswith("messages = "))
        compile(script, "playground", "exec")
        assert ast.literal_eval(line.removeprefix("messages = "))[0]["content"] == text
