"""What does `rl.py` reward? Tasks whose reward needs no judge."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod

QUESTIONS = (
    "What is a river?", "Why do birds sing?", "What does a baker do?", "How do fish breathe?", "What is music?",
    "Why is sleep important?", "What is a desert?", "How do bees make honey?", "What is a library for?",
    "Why do we laugh?", "What is a bridge?", "How does a kite fly?", "What is snow?", "Why do people travel?",
    "What is a garden?", "How do wheels help us?", "What is friendship?", "Why is the night dark?",
    "What does a doctor do?", "What is a volcano?", "How do trees drink?", "What is a clock for?",
    "Why do dogs bark?", "What is history?",
)  # fmt: skip


class Task(ABC):
    """Prompts, and what an answer to one earns."""

    @abstractmethod
    def prompts(self, order: random.Random, count: int) -> list[str]:
        """Draw different prompts."""

    @abstractmethod
    def reward(self, prompt: str, text: str, finished: bool) -> float:
        """Return 0 to 1 for an answer; `finished` is whether the model ended it."""


class Length(Task):
    """Answer in one short, finished sentence: half for a full stop at the end, half for its length in words."""

    def __init__(self, words: int) -> None:
        self.words = words

    def prompts(self, order: random.Random, count: int) -> list[str]:
        return order.sample(QUESTIONS, count)

    def reward(self, prompt: str, text: str, finished: bool) -> float:
        ends = finished and re.search(r"[.!?]$", text.strip()) is not None
        distance = abs(len(text.split()) - self.words)
        return 0.5 * ends + 0.5 * max(0.0, 1.0 - distance / (2 * self.words))


class Arithmetic(Task):
    """Add two numbers up to 30, and say nothing but the sum: 1 for the sum, 0 for anything else."""

    LARGEST = 30

    def prompts(self, order: random.Random, count: int) -> list[str]:
        return [f"What is {a} + {b}?" for a, b in order.sample(self._pairs(), count)]

    def reward(self, prompt: str, text: str, finished: bool) -> float:
        return float(finished and text.strip() == self._sum(prompt))

    def example(self, order: random.Random) -> tuple[str, str]:
        """Draw a prompt with its right answer, to begin with."""
        (prompt,) = self.prompts(order, 1)
        return prompt, self._sum(prompt)

    def _pairs(self) -> list[tuple[int, int]]:
        numbers = range(self.LARGEST + 1)
        return [(a, b) for a in numbers for b in numbers]

    def _sum(self, prompt: str) -> str:
        return str(sum(int(number) for number in re.findall(r"\d+", prompt)))
