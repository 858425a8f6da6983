"""Are empty and bad states designed? No runs, a lost server, a lost login, a long compile; and long curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.page import made
from support.page.browser import opened, until
from support.page.fake_server import FakeDashboard
from support.server.pages import KEY, Page, Parts

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.full


def test_without_runs_there_is_a_script_to_copy(chromium: Browser) -> None:
    fake = FakeDashboard(empty=True)
    with opened(chromium, fake.url) as page:
        page.click(".empty button:has-text('Copy')")
        page.wait_for_selector(".toast")
        script = page.evaluate("navigator.clipboard.readText()")
        compile(script, "first", "exec")
        assert made.MODEL in script and len(script.splitlines()) <= 14
        fake.runs = made.rows(0.0)[:1]
        fake.send("runs", {"runs": fake.runs})
        page.wait_for_selector("table.runs tbody tr")
    fake.close()


def test_a_lost_server_is_told_and_found_again(chromium: Browser) -> None:
    fake = FakeDashboard()
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("table.runs tbody tr")
        fake.close()
        page.wait_for_selector("#link:has-text('No answer from the server')")
        assert page.locator("body.stale table.runs tbody tr").count() == 6
        again = FakeDashboard(port=fake.port)
        page.wait_for_selector("#link", state="hidden", timeout=20_000)
        page.wait_for_selector("body:not(.stale)")
        again.step("s1:train:0", 999, 1.0)
        until(page, "document.querySelector('table.runs').textContent.includes('999')")
        again.close()


def test_a_lost_login_leads_to_the_login(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("table.runs tbody tr")
        fake.logged_out = True
        page.click("nav a:has-text('Checkpoints')")
        page.wait_for_selector("body:has-text('log in')")


def test_a_compile_explains_the_wait(chromium: Browser, fake: FakeDashboard) -> None:
    run = made.run_row("s9:train:0", "fresh", "live", made.NOW, step=0, loss=None)
    fake.runs.append(run)
    fake.series["s9:train:0"] = {
        "run": "s9:train:0",
        "series": {},
        "names": [],
        "events": [],
        "next": "0-0",
        "live": True,
    }
    fake.device = made.device(made.NOW, compiling=True)
    with opened(chromium, fake.url + "#/run/s9%3Atrain%3A0") as page:
        page.wait_for_selector(".wait:has-text('Compiling backward (8x1024)')")
        assert "compiling backward" in (page.locator("#device-line").text_content() or "")
        fake.step("s9:train:0", 1, 3.0)
        page.wait_for_selector("figure.chart canvas")
        assert page.locator(".wait").is_hidden()


def test_first_paint_and_a_million_points(
    chromium: Browser, fake: FakeDashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("table.runs tbody tr")
        painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        result = page.evaluate("dashboardBench(1_000_000, 90)")
        with capsys.disabled():
            print(f"\nfirst paint {painted:.0f} ms; a million points: {result}")
        # How fast is a matter of the machine; how much is drawn in a frame is not.
        assert result["drawn"] == 90 and 0 < result["most"] <= 2 * result["width"]


def test_a_run_that_is_begun_anew_is_drawn_anew(chromium: Browser, fake: FakeDashboard) -> None:
    run = "s1:train:0"
    points = {
        "kind": "step",
        "step": [0, 1, 2],
        "time": [1.0, 2.0, 3.0],
        "tokens": [0, 1, 2],
        "value": [5.0, 5.0, 5.25],
    }
    events = [
        {"kind": "start", "step": 0, "time": 1.0, "details": {"base_model": "b", "origin": "tinker://a/weights/c"}}
    ]
    anew = {"run": run, "series": {"loss:mean": points}, "names": ["loss:mean"], "events": events, "live": True}
    with opened(chromium, fake.url + "#/run/s1%3Atrain%3A0") as page:
        page.wait_for_selector("figure.chart canvas")
        until(page, "document.querySelectorAll('main > .charts:not(.rest *) figure').length > 3")
        page.focus("figure.chart")
        page.keyboard.press("+")
        # The frame comes by a new connection, as after the server itself has begun anew.
        fake.drop()
        fake.wait_for_streams()
        fake.send("points", {**anew, "next": "b-3-1", "reset": True})
        until(page, "document.querySelectorAll('figure.chart').length === 1")
        until(page, "document.querySelector('figcaption .value').textContent === '5.25'")
        page.click("summary:has-text('Events (2)')")  # the start, and an alert of the run's row
        assert "started b, from tinker://a/weights/c" in (page.locator("ol.events").text_content() or "")
        page.click("button:has-text('Copy link')")
        page.wait_for_selector(".toast:has-text('copied')")
        assert "range=" not in page.evaluate("navigator.clipboard.readText()")
        fake.step(run, 3, 4.75)
        until(page, "document.querySelector('figcaption .value').textContent === '4.75'")


def test_a_compared_run_that_is_begun_anew_is_drawn_anew(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        page.clock.install()
        page.goto(fake.url + "#/compare?runs=s1%3Atrain%3A0&runs=s5%3Atrain%3A0")
        page.reload()
        page.wait_for_selector("figure.chart canvas")
        points = {"kind": "step", "step": [0], "time": [1.0], "tokens": [0], "value": [5.0]}
        anew = {"series": {"loss:mean": points}, "names": ["loss:mean"], "events": [], "next": "b-1-0", "reset": True}
        fake.series["s1:train:0"] |= anew
        page.uncheck(".compare-legend li:nth-child(2) input")
        page.clock.run_for(3_100)
        values = "[...document.querySelectorAll('figcaption .value')].map((e) => e.textContent).filter(Boolean)"
        until(page, f"String({values}) === '5'")
        assert "since=812-9" in fake.asked[-1]


def test_archived_runs_are_reached_when_all_are(chromium: Browser, fake: FakeDashboard) -> None:
    for row in fake.runs:
        row["archived"] = True
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("main:has-text('Every run is archived')")
        assert "No runs yet" not in (page.locator("main").text_content() or "")
        page.check("label:has-text('Archived') input")
        until(page, "document.querySelectorAll('table.runs tbody tr').length === 6")


def test_a_login_by_the_form_opens_the_view_of_the_address(chromium: Browser, tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.source.set("log:drop 10%", name="dropped")
    served = Page(parts.guard())
    try:
        with opened(chromium, f"{served.url}/#/run/log%3Adrop%2010%25?x=time") as page:
            for key in ("tml-wrong", KEY):
                page.fill("input[name=key]", key)
                page.click("button")
            page.wait_for_selector("h1[title='log:drop 10%']")
            assert page.url == f"{served.url}/#/run/log%3Adrop%2010%25?x=time"
    finally:
        served.stop()
