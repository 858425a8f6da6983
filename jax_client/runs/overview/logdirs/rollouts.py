"""What did the model say, and what was it worth? The rollouts that the cookbook wrote into a log directory, by group.

Rewards are in iteration_NNNNNN/train_rollout_summaries.jsonl, one line for each trajectory; the texts, of the groups
that the loop logs in full, in train_logtree.json beside it. A text belongs to the trajectory of its group that has the
same reward: the tree has them in the order in which they ended.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jax_client.runs.overview.logdirs.files import ITERATION, LogDirectory, read_bounded, read_object
from jax_client.runs.overview.small_file import file_stamp
from jax_client.values import JsonObject

SUMMARIES = "train_rollout_summaries.jsonl"
TREE = "train_logtree.json"
MAX_FILE = 64 * 2**20
MAX_TEXT = 20_000
MAX_ITERATIONS = 100_000
MAX_DEPTH = 60
_NAME = re.compile(rf"{ITERATION}(\d{{1,9}})")


@dataclass(slots=True)
class _Said:
    """What the tree has of one group: its prompt, and each answer with its reward."""

    prompt: str | None = None
    answers: list[tuple[str, float | None]] = field(default_factory=list)


class Rollouts:
    """The rollouts of one log directory. Not thread-safe: its user holds its lock.

    Args:
        log: the directory.

    Attributes:
        lock: of its user.
    """

    def __init__(self, log: LogDirectory) -> None:
        self._log = log
        self.lock = threading.Lock()
        self._counts: dict[Path, tuple[object, int]] = {}

    def page(self, offset: int, limit: int) -> JsonObject:
        """Return {"groups", "total"}: groups `offset` to `offset + limit`, those of the newest iteration first."""
        groups: list[JsonObject] = []
        total = 0
        for iteration, directory in self._iterations():
            count = self._count(directory / SUMMARIES)
            first, last = max(offset - total, 0), min(offset + limit - total, count)
            if first < last:
                groups += self._groups(iteration, directory)[first:last]
            total += count
        return {"groups": groups, "total": total}

    def _iterations(self) -> list[tuple[int, Path]]:
        found = []
        with suppress(OSError):
            for entry in sorted(self._log.path.iterdir())[:MAX_ITERATIONS]:
                if (match := _NAME.fullmatch(entry.name)) is not None and entry.is_dir() and not entry.is_symlink():
                    found.append((int(match[1]), entry))
        return sorted(found, reverse=True)

    def _count(self, path: Path) -> int:
        stamp = file_stamp(path)
        known = self._counts.get(path)
        if known is None or known[0] != stamp:
            known = self._counts[path] = stamp, len({record["group_idx"] for record in self._records(path)})
        return known[1]

    def _records(self, path: Path) -> Iterator[JsonObject]:
        for line in read_bounded(self._log.root, path, MAX_FILE).split(b"\n"):
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("group_idx"), int):
                    yield record

    def _groups(self, iteration: int, directory: Path) -> list[JsonObject]:
        by_group: dict[int, list[JsonObject]] = defaultdict(list)
        for record in self._records(directory / SUMMARIES):
            by_group[record["group_idx"]].append(record)
        said = said_in(read_object(self._log.root, directory / TREE, MAX_FILE))
        return [_group(iteration, by_group[number], said, number) for number in sorted(by_group)]


def _group(iteration: int, records: Sequence[JsonObject], said: list[_Said], number: int) -> JsonObject:
    rewards = [_number(record.get("total_reward")) for record in records]
    known = [reward for reward in rewards if reward is not None]
    mean = _mean(known) if known else 0.0
    tree = _of_group(said, known, number)
    samples = [
        {
            "text": None if tree is None else _take(tree.answers, reward),
            "reward": reward,
            "advantage": None if reward is None else reward - mean,
            "parts": _parts(record),
            "tokens": sum(int(_number(step.get("ac_len")) or 0) for step in _steps(record)),
        }
        for record, reward in zip(records, rewards, strict=True)
    ]
    return {"step": iteration, "prompt": None if tree is None else tree.prompt, "samples": samples}


def _mean(values: list[float]) -> float:
    try:
        return statistics.fmean(values)
    except OverflowError:  # a sum that no double holds, of numbers near the largest one
        return math.ldexp(statistics.fmean(math.ldexp(value, -64) for value in values), 64)


def _of_group(said: list[_Said], rewards: list[float], number: int) -> _Said | None:
    """Return what the tree has of a group: at its place, unless the rewards there are others'."""
    fits = lambda each: all(  # noqa: E731
        answer is None or any(abs(answer - reward) < 1e-3 for reward in rewards) for _, answer in each.answers
    )
    return said[number] if number < len(said) and said[number].answers and fits(said[number]) else None


def _take(answers: list[tuple[str, float | None]], reward: float | None) -> str | None:
    for place, (text, known) in enumerate(answers):
        if known is None or (reward is not None and abs(known - reward) < 1e-3):
            del answers[place]
            return text
    return None


def _steps(record: JsonObject) -> list[JsonObject]:
    steps = record.get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _parts(record: JsonObject) -> dict[str, float]:
    parts: dict[str, float] = {}
    final = _number(record.get("final_reward"))
    if final is not None:
        parts["final_reward"] = final
    for metrics in (record.get("trajectory_metrics"), *(step.get("metrics") for step in _steps(record))):
        if isinstance(metrics, dict):
            parts |= {str(n)[:200]: v for n, value in list(metrics.items())[:50] if (v := _number(value)) is not None}
    return parts


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        number = float(value)
        return number if number - number == 0 else None
    return None


def said_in(tree: JsonObject) -> list[_Said]:
    """Return the prompts and answers of the groups of a tree, in the order of its sections."""
    root = tree.get("root") if isinstance(tree.get("root"), dict) else tree
    return [_said(section) for section in _sections(root, "Group Rollout")]


def _said(section: JsonObject) -> _Said:
    said = _Said()
    for prompt in _sections(section, "Prompt"):
        said.prompt = said.prompt or _conversation(prompt)
    rewards = [_reward(each) for each in _sections(section, "Reward")]
    answers = [_conversation(each) for each in _sections(section, "Policy Response")]
    for place, answer in enumerate(answers):
        said.answers.append((answer, rewards[place] if len(rewards) == len(answers) else None))
    return said


def _walk(node: object, depth: int = 0) -> Iterator[JsonObject]:
    if isinstance(node, dict) and depth < MAX_DEPTH:
        yield node
        children = node.get("children")
        for child in children if isinstance(children, list) else ():
            yield from _walk(child, depth + 1)


def _sections(node: object, title: str) -> Iterator[JsonObject]:
    for each in _walk(node):
        children = each.get("children")
        if each.get("tag") == "section" and isinstance(children, list) and children and _text(children[0]) == title:
            yield each


def _text(node: object, depth: int = 0) -> str:
    if isinstance(node, str):
        return html.unescape(node)
    children = node.get("children") if isinstance(node, dict) and depth < MAX_DEPTH else None
    return "".join(_text(child, depth + 1) for child in children) if isinstance(children, list) else ""


def _conversation(section: JsonObject) -> str:
    lines: list[str] = []
    for node in _walk(section):
        data = node.get("data")
        messages = data.get("messages") if isinstance(data, dict) else None
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
            if isinstance(content, str):
                role = message.get("role")
                lines.append(content if role == "assistant" else f"{role}: {content}")
    return "\n".join(lines)[:MAX_TEXT]


def _reward(section: JsonObject) -> float | None:
    cells = [_text(node).strip() for node in _walk(section) if node.get("tag") in ("td", "th")]
    for name, value in itertools.pairwise(cells):
        if name == "reward":
            with suppress(ValueError):
                return float(value)
    return None
