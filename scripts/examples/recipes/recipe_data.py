"""What do the recipes read from the working directory? Tokenizer folders, and data made or converted here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jax_client.weights.read.source import resolve
from jax_client.weights.read.tokenizer import load_tokenizer

# Every number from 0 to this one, as in the cookbook's arithmetic environment.
LARGEST = 100
# The example with which that environment begins each conversation: a model that is trained on sums is asked as there.
ONE_SHOT = [{"role": "user", "content": "What is 4 + 5?"}, {"role": "assistant", "content": "9"}]
# Characters; the corpus also has programs and lists as answers.
LONGEST_ANSWER = 300


def write_tokenizers(model: str, names: Iterable[str], folder: Path) -> None:
    """Write the model's tokenizer below `folder` under every name; transformers takes a relative folder before the hub.

    The cookbook loads a tokenizer by the name of the model, from its working directory.
    """
    tokenizer = load_tokenizer(resolve(model))
    for name in names:
        tokenizer.save_pretrained(str(folder / name))


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_sums(train: Path, test: Path, *, rows: int = 4000, tests: int = 200, seed: int = 0) -> None:
    """Write conversations that add two numbers from 0 to 100, and sums that are not among them.

    Args:
        train: JSON lines {"messages": [...]}, the one-shot example first.
        test: JSON lines {"messages": [...], "answer": sum}, up to the question.
        rows, tests: how many; all pairs of numbers are distinct.
        seed: of the choice and the order.
    """
    width = LARGEST + 1
    chosen = np.random.default_rng(seed).choice(width * width, rows + tests, replace=False)
    asked = []
    for x, y in (divmod(int(pair), width) for pair in chosen):
        asked.append(([*ONE_SHOT, {"role": "user", "content": f"What is {x} + {y}?"}], x + y))
    learned = ({"messages": [*messages, _assistant(str(answer))]} for messages, answer in asked[:rows])
    _write_lines(train, learned)
    _write_lines(test, ({"messages": messages, "answer": answer} for messages, answer in asked[rows:]))


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_pairs(corpus: Path, folder: Path, *, train: int = 600, test: int = 60, seed: int = 0) -> None:
    """Write preference pairs in the layout of Anthropic/hh-rlhf: the right answer, and that of another question.

    The questions come from chatterbot-corpus, a wheel that is installed beside the recipes (BSD licence, by its
    metadata's classifier). Nothing of it is kept in this repository.

    Args:
        corpus: the package's data/english.
        folder: gets train.jsonl and test.jsonl, with the columns "chosen" and "rejected".
        train, test: how many pairs; no question is in both.
        seed: of the choice and the order.

    Raises:
        ValueError: the corpus has too few questions.
    """
    known = _questions(corpus)
    if len(known) < train + test:
        raise ValueError(
            f"{corpus} has {len(known)} questions for {train + test} pairs; is it chatterbot-corpus 1.3.3?"
        )
    order = np.random.default_rng(seed).permutation(len(known))[: train + test]
    questions = [list(known)[i] for i in order]
    rows = []
    for i, question in enumerate(questions):
        # Of the next question, unless it is an answer of this one too.
        others = (known[other][0] for other in (*questions[i + 1 :], *questions[:i]))
        wrong = next(answer for answer in others if answer not in known[question])
        rows.append({"chosen": _dialogue(question, known[question][0]), "rejected": _dialogue(question, wrong)})
    _write_lines(folder / "train.jsonl", rows[:train])
    _write_lines(folder / "test.jsonl", rows[train:])


def _questions(corpus: Path) -> dict[str, list[str]]:
    """Return the answers of each question, in the order of the files. Many questions are there more than once."""
    found: dict[str, list[str]] = {}
    for file in sorted(corpus.glob("*.yml")):
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(text).strip() for text in talk[:2]) if len(talk) >= 2 else ("", "")
            # The recipe splits the text at these words.
            marked = any(mark in question + answer for mark in ("Human:", "Assistant:"))
            if question and answer and len(answer) <= LONGEST_ANSWER and not marked:
                found.setdefault(question, []).append(answer)
    return found


def _dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file that may still grow; none if there is no such file yet."""
    if not path.is_file():
        return []
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in complete.splitlines() if line.strip()]
