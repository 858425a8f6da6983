"""Is the prose plain? No name, docstring or page uses a word that the project has agreed to do without."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("jax_client", "models", "losses") for path in sorted((ROOT / folder).rglob("*.py"))]
FOLDERS_OF_PAGES = ("docs", "jax_client", "models", "losses", "scripts")
# The map is made of docstrings.
PAGES = [
    path
    for path in (*sorted(ROOT.glob("*.md")), *(p for f in FOLDERS_OF_PAGES for p in sorted((ROOT / f).rglob("*.md"))))
    if path.name != "map.md"
]
GLOSSARY = ROOT / "docs" / "how-it-works" / "glossary.md"
MOST_NOUNS = 60
MOST_README_LINES = 170
# Phrases of docstrings and pages, each with what to write instead.
PHRASES = {
    r"\baloud\b": "log, announce",
    r"\bcomes? again\b": "retry",
    r"\bcomes? further\b": "advance",
    r"\bdebts?\b": "pending",
    r"\bgo(es|ing)? on\b": "continue",
    r"\bholdings\b": "live objects",
    r"\b(let|lets|letting) go\b": "release, evict",
    r"\bnobody\b": "no one, or name the actor in the active voice",
    r"\bowe[ds]?\b": "pending",
    r"\bpromis(e|es|ed|ing)\b": "guarantee; pending request",
    r"\bresident\b(?! (set|memory))": "loaded, in memory, evictable",
    r"\breally carried out\b": "materialised",
    r"\bso many\b": "the number, the limit, or nothing",
    r"\bstill_s(econds)?\b": "stalled_seconds",
    r"\bwhoever\b": "the caller, the client, the user",
}
# Said of a function: it does not say, it returns, warns or logs.
STARTS = {r"say (that|what|which|whether|who|why)\b": "return, warn or log", r"tell (that|whether)\b": "return"}
# Words of names, between underscores or capitals.
WORDS = {
    "aloud": "log",
    "debts": "pending",
    "holdings": "live_objects",
    "keeper": "run_checkpointer",
    "levers": "hints",
    "nobody": "no one",
    "owed": "pending",
    "promise": "pending_request",
    "promised": "pending",
    "promises": "request_ledger",
    "resident": "evictable",
    "strange": "unknown",
    "whoever": "the actor",
}
# Whole names.
NAMES = {
    "Claim": "RunLock",
    "KEPT": "SAVED_FOR_BACKWARD, or the noun",
    "Lease": "ModelRef",
    "Observed": "RunMetrics",
    "Published": "WeightsFeed",
    "Recorder": "MetricsWriter",
    "TakenError": "RunLockedError",
    "about": "the noun",
    "again": "retry, attempt",
    "at_once": "concurrent",
    "come_further": "advance",
    "decode_row_places": "decode_slots",
    "let_go": "release, evict",
    "let_go_of_all_but": "release_unused",
    "stands_for": "register_as_sdk_class",
    "still_s": "stalled_s",
    "still_seconds": "stalled_seconds",
    "there": "the noun",
    "turned": "transposed",
    "what": "the noun",
    "whats": "the noun",
}


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node.body[0].lineno, text


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what the file itself names: functions, classes, arguments and variables."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


def in_prose(text: str, first_line: int) -> Iterator[tuple[int, str, str]]:
    """Yield (line, what is written, what to write) for each phrase."""
    flat = re.sub(r"\s", " ", text)
    for phrase, better in PHRASES.items():
        for match in re.finditer(phrase, flat, re.IGNORECASE):
            yield first_line + text.count("\n", 0, match.start()), match[0], better


def in_source(path: Path) -> Iterator[tuple[int, str, str]]:
    tree = ast.parse(path.read_text())
    for line, text in docstrings(tree):
        yield from in_prose(text, line)
        for start, better in STARTS.items():
            if match := re.match(start, text, re.IGNORECASE):
                yield line, match[0], better
    for line, name in names(tree):
        if (better := NAMES.get(name.lstrip("_"))) is not None:
            yield line, name, better
        for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name):
            if (better := WORDS.get(word.lower())) is not None:
                yield line, name, better


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_and_docstrings_are_plain(path: Path) -> None:
    found = [f"{path.relative_to(ROOT)}:{line}: {text!r}, say: {better}" for line, text, better in in_source(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_are_plain(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}, say: {better}"
        for line, text, better in in_prose(path.read_text(), 1)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_are_wrapped(path: Path) -> None:
    """Tables and code keep their lines; so does a line without a place to break it."""
    long, code = [], False
    for number, line in enumerate(path.read_text().split("\n"), 1):
        code ^= line.startswith("```")
        if len(line) > 120 and " " in line.strip() and not (code or line.startswith("|")):
            long.append(number)
    assert not long, f"{path.relative_to(ROOT)}: lines of over 120 characters: {long}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split("\n")) <= MOST_README_LINES + 1


def test_the_glossary_is_short() -> None:
    nouns = re.findall(r"^\| (?!noun )([^|]+) \|", GLOSSARY.read_text(), re.MULTILINE)
    assert len(set(nouns)) == len(nouns) <= MOST_NOUNS
