"""With which browser are pages tested? The machine's own chromium, driven by playwright; tests skip without either."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jax_client-tests"


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield a browser; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


@contextmanager
def opened(found: Browser, url: str, *, width: int = 1280, scheme: str = "light") -> Iterator[Page]:
    """Yield a page at an address; errors of its scripts, and what its policy forbids, fail the test."""
    context = found.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    page.set_default_timeout(10_000)
    try:
        page.goto(url)
        yield page
        assert not errors, errors
    finally:
        context.close()


def until(page: Page, expression: str, seconds: float = 10.0) -> None:
    """Wait until an expression is true. The driver's own waiting evaluates text in the page, which forbids that."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        time.sleep(0.02)


def axe_source() -> str:
    """Return the script of axe-core, kept between runs; skips the test where it cannot be had."""
    kept = CACHE / "axe.min.js"
    if not kept.exists():
        if shutil.which("npm") is None:
            pytest.skip("axe-core is not in the cache, and there is no npm to fetch it")
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "axe-core"], cwd=CACHE, check=True, capture_output=True, timeout=60)
            archive = next(CACHE.glob("axe-core-*.tgz"))
            with tarfile.open(archive) as packed:
                source = packed.extractfile("package/axe.min.js")
                assert source is not None
                kept.write_bytes(source.read())
        except (subprocess.SubprocessError, OSError, StopIteration) as error:
            pytest.skip(f"axe-core cannot be had: {error}")
    return kept.read_text()


def findings(page: Page) -> list[str]:
    """Return what axe finds serious or critical on a page."""
    # By the driver, not as a script of the page: its policy stays as it is.
    page.evaluate(axe_source() + "; null")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:160]} ({len(each['nodes'])})"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
