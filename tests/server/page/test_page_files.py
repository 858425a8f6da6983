"""Are the page's files small, complete and free of what lets data become markup?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.page.fake_server import STATIC

MOST_BYTES = 300_000
FILES = sorted(path for path in STATIC.rglob("*") if path.is_file())
OWN = [path for path in FILES if path.parent.name != "uplot"]
MODULES = [path for path in OWN if path.suffix == ".js"]
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc")


def name_of(path: Path) -> str:
    return str(path.relative_to(STATIC))


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < MOST_BYTES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_make_no_markup_of_data(path: Path) -> None:
    assert MARKUP.findall(path.read_text()) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_lead_to_files(path: Path) -> None:
    for imported in re.findall(r"(?:from|import)\s*\(?[\"'](\.[^\"'$]+)[\"']", path.read_text()):
        assert (path.parent / imported).resolve().is_file(), imported


def test_each_view_has_a_module() -> None:
    views = re.findall(r'^  \["(\w+)", "\w+", "\w"\]', (STATIC / "core" / "keys.js").read_text(), re.MULTILINE)
    assert len(views) == 6 and all((STATIC / "views" / f"{view}.js").is_file() for view in [*views, "run"])


def test_the_first_file_names_only_files_of_the_page() -> None:
    html = (STATIC / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    files = [name.removeprefix("/dashboard/static/") for name in named if name != "/dashboard/tables"]
    assert files and all((STATIC / file).is_file() for file in files)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|<style|\son\w+=", html)


def test_nothing_comes_from_elsewhere() -> None:
    for path in OWN:
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", path.read_text())
        assert [each for each in addresses if "www.w3.org/2000/svg" not in each] == [], path


def test_the_charts_library_has_its_licence() -> None:
    assert "MIT License" in (STATIC / "uplot" / "LICENSE").read_text()
