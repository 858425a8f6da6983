"""What do the recipes read from the working directory? Tokenizer folders, and data made or converted here."""

from __future__ import annotations

import json
import re
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
# A sentence of our own in each language, and the label that the recipe of prompt distillation has for it.
SENTENCES = {
    "The train to the coast leaves at nine, and we will have lunch by the sea.": "en",
    "Le train pour la côte part à neuf heures, et nous mangerons près de la mer.": "fr",
    "Der Zug an die Küste fährt um neun Uhr ab, und wir essen am Meer.": "de",
    "El tren a la costa sale a las nueve, y comeremos cerca del mar.": "es",
    "Поезд на побережье уходит в девять часов, и мы пообедаем у моря.": "ru",
    "去海边的火车九点开,我们在海边吃午饭。": "zh",
    "Το τρένο για την ακτή φεύγει στις εννέα και θα φάμε δίπλα στη θάλασσα.": "el",
    "Sahile giden tren saat dokuzda kalkıyor ve deniz kenarında yemek yiyeceğiz.": "tr",
}
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


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


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


def write_datasets(folder: Path, *, rows: int = 48, tests: int = 8, seed: int = 0) -> None:
    """Write small sums under the names and in the columns of the hub's data sets that the recipes load.

    Args:
        folder: the recipes' working directory; `datasets` takes a relative folder before the hub.
        rows, tests: how many there are of each.
        seed: of the numbers.
    """
    pairs = np.random.default_rng(seed).integers(1, 10, (rows + tests, 2)).tolist()
    asked = [(f"What is {x} + {y}?", x + y) for x, y in pairs]
    conversations = [{"messages": [_user(question), _assistant(str(answer))]} for question, answer in asked]
    _write_lines(folder / "HuggingFaceH4" / "no_robots" / "train.jsonl", conversations[:rows])
    _write_lines(folder / "HuggingFaceH4" / "no_robots" / "test.jsonl", conversations[rows:])
    _write_lines(folder / "allenai" / "tulu-3-sft-mixture" / "train.jsonl", conversations)
    _write_lines(folder / "zwhe99" / "DeepMath-103K" / "train.jsonl", ({"question": question} for question, _ in asked))
    names = {"user": "human", "assistant": "gpt"}
    turns = ([{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]] for row in conversations)
    _write_lines(
        folder / "open-thoughts" / "OpenThoughts3-1.2M" / "train.jsonl", ({"conversations": row} for row in turns)
    )
    # The answer of the recipes' own example, which a small model likes to repeat: some answers are right, some are not.
    threes = [(f"What is {x} + {3 - x}?", 3) for x, _ in pairs if x <= 3]
    _write_gsm8k(folder / "openai" / "gsm8k", threes, tests)
    _write_lines(folder / "hicai-zju" / "SciKnowEval" / "test.jsonl", (_choice(*each) for each in asked))
    examples = folder / "tinker_cookbook" / "example_data"
    graded = [_rubric(*each) for each in asked]
    _write_lines(examples / "example_rubric_train.jsonl", graded[:rows])
    _write_lines(examples / "example_rubric_test.jsonl", graded[rows : rows + 2])
    (examples / "multilingual.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    labelled = ({"messages": [_user(text), _assistant(label)]} for text, label in SENTENCES.items())
    _write_lines(folder / "languages.jsonl", labelled)


def _write_gsm8k(folder: Path, asked: list[tuple[str, int]], tests: int) -> None:
    """Write questions with worked answers, and the README that declares the configuration "main"."""
    worked = [{"question": question, "answer": f"The sum is {answer}.\n#### {answer}"} for question, answer in asked]
    _write_lines(folder / "main" / "train.jsonl", worked[tests:])
    _write_lines(folder / "main" / "test.jsonl", worked[:tests])
    files = [{"split": split, "path": f"main/{split}.jsonl"} for split in ("train", "test")]
    header = yaml.safe_dump({"configs": [{"config_name": "main", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{header}---\n", encoding="utf-8")


def _choice(question: str, answer: int) -> dict[str, Any]:
    """Return a question with four answers, in the columns of SciKnowEval; the right one is C."""
    texts = [str(answer + offset) for offset in (-2, -1, 0, 1)]
    return {
        "question": question,
        "choices": {"text": texts, "label": list("ABCD")},
        "answerKey": "C",
        "type": "mcq-4-choices",
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "sums", "subtask": "sums", "source": "made here"},
    }


def _rubric(question: str, answer: int) -> dict[str, Any]:
    """Return a conversation with the one question that a grader answers about it."""
    item = {
        "rubric_str": f"Does the chatbot correctly get the answer {answer}?",
        "extraction_regex": r"<score>(.*?)</score>",
        "grader_output_format_instruction": "Please output your score between 0 and 1 wrapped in <score> ... </score>",
    }
    return {"convo": [*ONE_SHOT, _user(question)], "rubric_items": [item]}


def write_pictures(folder: Path, *, each: int = 4) -> None:
    """Write pictures of one colour, in folders named as their labels, as `datasets` reads pictures.

    Args:
        folder: gets train/LABEL/*.ppm and test/LABEL/*.ppm.
        each: of a label.
    """
    for split in ("train", "test"):
        for label, colour in {"red_square": (255, 0, 0), "blue_square": (0, 0, 255)}.items():
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(each):
                (place / f"{i}.ppm").write_bytes(b"P6 64 64 255\n" + bytes(colour) * 64 * 64)


def write_short_model(gguf: Path, path: Path, context: int) -> None:
    """Copy a GGUF model with another context length: a short one fills at once.

    Args:
        gguf: the model.
        path: of the copy.
        context: tokens.

    Raises:
        ValueError: the file does not say how long its context is.
    """
    content = bytearray(gguf.read_bytes())
    # A key, its type (4: unsigned, 32 bits), its value.
    found = re.search(rb"\.context_length\x04\x00\x00\x00", content)
    if found is None:
        raise ValueError(f"{gguf} has no context_length of 32 bits")
    content[found.end() : found.end() + 4] = context.to_bytes(4, "little")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file that may still grow; none if there is no such file yet."""
    if not path.is_file():
        return []
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in complete.splitlines() if line.strip()]
