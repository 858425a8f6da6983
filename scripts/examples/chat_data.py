"""How does a conversation become a training example whose loss counts the assistant's tokens only?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_client import types

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation as tokens; `weights[i]` is 1 where token i belongs to an assistant's answer, else 0."""

    tokens: list[int]
    weights: list[float]

    @property
    def datum(self) -> types.Datum:
        """Shift by one: the target at position i is token i + 1."""
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(np.asarray(self.tokens[1:], np.int64)),
                "weights": types.TensorData.from_numpy(np.asarray(self.weights[1:], np.float32)),
            },
        )

    @property
    def scored(self) -> int:
        """Return how many targets the loss counts."""
        return int(sum(self.weights[1:]))


def read_conversations(path: Path) -> list[list[Message]]:
    """Read one {"messages": [{"role", "content"}, ...]} object per line; raise ValueError with the line's number."""
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}). Write one object per line.") from error
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not messages:
            raise ValueError(f'{where}: no messages. Each line is {{"messages": [{{"role": ..., "content": ...}}]}}.')
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise ValueError(f"{where}: messages[{index}] has no known role. The roles are {', '.join(ROLES)}.")
            if not isinstance(message.get("content"), str):
                raise ValueError(f"{where}: messages[{index}].content is not a string.")
        if messages[0]["role"] == "assistant":
            raise ValueError(f"{where}: the assistant speaks first; begin with a message of the user or the system.")
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(f"{where}: no message of the assistant, so there is nothing to learn.")
        conversations.append(messages)
    if not conversations:
        raise ValueError(f"{path} has no conversations.")
    return conversations


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Render messages up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def render(tokenizer: Any, messages: Sequence[Message]) -> Example:
    """Render a conversation with the tokenizer's chat template.

    Text between two borders of an answer is encoded by itself, so that a prompt rendered for sampling has exactly
    the tokens that it has in training. A turn's end marker belongs to the answer: the model must learn to stop.
    """
    tokens: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False) if text else []
        tokens.extend(ids)
        weights.extend([weight] * len(ids))

    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(list(messages[:index]), tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(list(messages[: index + 1]), tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("This chat template rewrites earlier turns, so a conversation has no single rendering.")
        answer = after[len(before) :]
        add(before[len(done) :], 0.0)
        add(answer.rstrip("\n"), 1.0)
        add(answer[len(answer.rstrip("\n")) :], 0.0)
        done = after
    return Example(tokens=tokens, weights=weights)


def truncated(example: Example, max_length: int) -> Example | None:
    """Keep the first `max_length` + 1 tokens; None when no answer is left in them."""
    cut = Example(tokens=example.tokens[: max_length + 1], weights=example.weights[: max_length + 1])
    return cut if cut.scored else None


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches for ever, in a new order each epoch; the order depends on the seed and the epoch alone."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        for start in range(0, len(order), batch_size):
            yield [examples[i] for i in order[start : start + batch_size]]
        epoch += 1
