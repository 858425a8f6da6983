"""Does the page open in a browser? The runs, one run's charts, and a step that comes while it is open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.page.browser import opened, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.page.fake_server import FakeDashboard


def test_the_page_shows_runs_and_follows_one(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        page.click("a.run-name:has-text('math-rl-0423')")
        page.wait_for_selector("figure.chart canvas")
        assert page.locator("figcaption .name").first.text_content() == "Loss per token"
        fake.step("s1:train:0", 813, 0.9876)
        until(page, "document.querySelector('.facts').textContent.includes('0.9876')")
        assert page.title().startswith("(1 ▲) math-rl-0423 · step 813")
