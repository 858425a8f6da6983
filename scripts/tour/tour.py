"""What does the dashboard look like? Train on this machine, open every view in a browser, and write pictures of them.

It needs the extras `demo` and `dev`, and a chromium; it takes some minutes on two cores. The pictures are those of
docs/dashboard.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "examples"))

from tour_runs import MODEL, Runs  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OUT = ROOT / "docs" / "tour"
MOST_BYTES = 60_000
COLOURS = 160
WIDE, TALL = 1200, 760
PHONE = (360, 720)


@contextmanager
def command(*arguments: str, home: Path) -> Iterator[str]:
    """Run a command of the package that serves the page; yield the page's address."""
    environment = os.environ | {"JAX_CLIENT_HOME": str(home)}
    line = [str(Path(sys.executable).with_name("jax_client")), *arguments, "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        lines = iter(process.stdout or ())
        found = next(filter(None, (re.search(r"dashboard: (\S+)", line) for line in lines)), None)
        if found is None:
            raise SystemExit(f"{' '.join(arguments)} ended without an address")
        # What it says later must not fill the pipe.
        threading.Thread(target=list, args=(lines,), daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


class Camera:
    """Opens views and writes pictures of them.

    Args:
        browser: which one.
        url: of the page.
        out: the folder of the pictures.
    """

    def __init__(self, browser: Browser, url: str, out: Path) -> None:
        self._browser, self._url, self._out = browser, url, out

    @contextmanager
    def view(self, address: str, ready: str, *, dark: bool = False, phone: bool = False) -> Iterator[Page]:
        """Yield a page once an element is there."""
        width, height = PHONE if phone else (WIDE, TALL)
        context = self._browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        page = context.new_page()
        page.set_default_timeout(300_000)
        page.goto(self._url.partition("?")[0] + address if address else self._url)
        page.wait_for_selector(ready, state="attached")
        page.wait_for_timeout(600)
        yield page
        context.close()

    def keep(self, page: Page, name: str) -> None:
        """Write what is seen, in few colours, so that the picture is small."""
        from PIL import Image

        path = self._out / f"{name}.png"
        end = page.evaluate("document.querySelector('footer').getBoundingClientRect().top")
        size = page.viewport_size or {"width": WIDE, "height": TALL}
        page.screenshot(path=path, clip={"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], end)})
        with Image.open(path) as picture:
            few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", flush=True)


def of_run(page: Page, name: str) -> str:
    """Return the address of a run by its name."""
    rows = page.evaluate("fetch('/dashboard/api/runs').then((answer) => answer.json())")["runs"]
    return f"#/run/{quote(next(row['run'] for row in rows if row['name'] == name), safe='')}"


def train_and_watch(camera: Camera, runs: Runs, steps: int, log: Path) -> str:
    """Train while the page is open; return the path of weights to talk to."""
    late = threading.Event()

    def tell(step: int) -> None:
        if step > steps * 0.7:
            late.set()

    def train() -> str:
        try:
            runs.supervise("keeper-lr-3e-4", steps=steps // 2, rate=3e-4, rank=8)
            runs.reward("one-sentence", log, rounds=3)
            return runs.supervise("keeper-lr-2e-3", steps=steps, rate=2e-3, rank=16, after=tell)
        finally:
            late.set()

    # The browser's driver runs an event loop on this thread, on which the SDK does not want to wait.
    training = ThreadPoolExecutor(1).submit(train)
    late.wait()
    with camera.view("#/runs", "table.runs tbody tr:nth-child(3)") as page:
        camera.keep(page, "runs")
        run = of_run(page, "keeper-lr-2e-3")
    with camera.view(run, "figure.chart canvas", dark=True) as page:
        camera.keep(page, "run-dark")
    with camera.view(run, "figure.chart canvas", phone=True) as page:
        camera.keep(page, "run-phone")
    with camera.view("#/device", ".stack") as page:
        camera.keep(page, "device")
    return training.result()


def after_training(camera: Camera, path: str) -> None:
    """Show what is there once runs have ended."""
    with camera.view("#/checkpoints", "table.checkpoints tbody tr") as page:
        page.click("tbody tr:first-child button:has-text('Verify')")
        page.wait_for_selector(".badge.good")
        page.wait_for_timeout(6000)
        camera.keep(page, "checkpoints")
    with camera.view("#/compare", "input[type=checkbox]") as page:
        for name in ("keeper-lr-2e-3", "keeper-lr-3e-4"):
            page.check(f"li:has-text('{name}') input")
        page.click("main button:has-text('Compare')")
        page.wait_for_selector("figure.chart canvas")
        page.wait_for_selector("h2:has-text('Differences')")
        page.wait_for_timeout(600)
        camera.keep(page, "compare")
    with camera.view(f"#/playground?path={quote(path, safe='')}", "form.play-form option:nth-child(2)") as page:
        page.fill("textarea", "What is a computer?")
        for label, value in (("Most tokens", "40"), ("Samples", "1"), ("Seed", "7")):
            page.fill(f"label:has-text('{label}') input", value)
        page.select_option("label:has-text('Beside it') select", f"model {MODEL}")
        page.click("button[type=submit]")
        page.wait_for_selector("select[aria-label=Colours]")
        page.focus(".sample .token >> nth=5")
        camera.keep(page, "playground")
        page.click("#tools button[title='Light or dark']")
        page.select_option("select[aria-label=Colours]", "difference")
        page.hover(".sample .token >> nth=3")
        camera.keep(page, "difference-dark")


def main() -> None:
    """Make every picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=32, help="of the longest run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pictures")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no chromium is installed; on Debian: apt-get install chromium")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        home, log = Path(folder) / "state", Path(folder) / "logs" / "one-sentence"
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with command("serve", "--model", MODEL, home=home) as url:
            camera = Camera(browser, url, args.out)
            path = train_and_watch(camera, Runs(url.rstrip("/")), args.steps, log)
            after_training(camera, path)
        with command("dashboard", "--logs", str(log.parent), home=home) as url:
            camera = Camera(browser, url, args.out)
            with camera.view("", "table.runs tbody tr") as page:
                page.click("nav a:has-text('Rollouts')")
                page.wait_for_selector("article.sample pre")
                camera.keep(page, "rollouts")
        browser.close()
    large = [path.name for path in args.out.glob("*.png") if path.stat().st_size > MOST_BYTES]
    if large:
        raise SystemExit(f"over {MOST_BYTES:,} bytes: {', '.join(large)}")


if __name__ == "__main__":
    main()
