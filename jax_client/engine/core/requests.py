"""What can the engine be asked, and what does it answer? Frozen values of numpy arrays and scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

# Widths of what a sampling request can ask for; arrays of these sizes are part of the compiled programs.
MAX_TARGETS = 128  # scores per prompt position, that of the prompt's own token included
MAX_TOPK_PROMPT = 128
MAX_ALTERNATIVES = 16
MAX_TOPK_SAMPLE = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """A built-in loss by name, with every configuration value filled in."""

    name: str
    config: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """AdamW hyper-parameters of one step; `grad_clip_norm` 0 is off, `weight_decay` is decoupled."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Answer of `Engine.score_batch` or `Engine.train_batch`.

    Attributes:
        logprobs: one float32 array per datum, in the shape of its targets, in nats.
        metrics: by SDK name, `name:reduction`.
    """

    logprobs: list[np.ndarray]
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """Sample from one prompt, or score it.

    Attributes:
        tokens_T: int32 (T,), at least one.
        num_samples: rows to generate; 0 scores the prompt only.
        max_tokens: most tokens generated per row.
        temperature: 0 is greedy.
        top_k: -1 is off.
        top_p: 1 is off.
        seed: with the row's index decides what is sampled.
        stop_ids: token ids that end a row; the stop token is part of the output.
        find_stop: called between decode blocks with the row's tokens so far (int list); returns how many tokens to
            keep when a stop string is complete, else None.
        prompt_logprobs: report log p of each prompt token given those before it (NaN for the first).
        topk_prompt: report the k most likely tokens at each prompt position; 0 is off.
        topk_sample: report the k most likely tokens at each sampled position; 0 is off.
        targets_TK: int32 (T - 1, K), ids to score at the prompt positions after the first; -1 asks for nothing.
        alternatives: tokens to draw at each prompt position after the first, at the request's temperature; 0 is off.
        score_last: report logprobs and likeliest tokens of the last `score_last` prompt tokens; None reports all.
        owner: whose request it is. Owners share the device equally, and no prefixes.
    """

    tokens_T: np.ndarray
    num_samples: int = 1
    max_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    find_stop: Callable[[list[int]], int | None] | None = None
    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk_sample: int = 0
    targets_TK: np.ndarray | None = None
    alternatives: int = 0
    score_last: int | None = None
    owner: str = ""

    @property
    def scores_prompt(self) -> bool:
        """Whether anything about the prompt's own positions is asked for."""
        return self.prompt_logprobs or self.topk_prompt > 0 or self.targets_TK is not None or self.alternatives > 0

    @property
    def draws_in_prefill(self) -> bool:
        """Whether each row's one token is drawn where the prompt is scored, so that nothing is decoded."""
        return self.scores_prompt and self.num_samples > 0 and self.max_tokens == 1

    @property
    def stored_tokens(self) -> int:
        """Most tokens of a row that the cache holds: the prompt, and what is drawn, but for a token of prefill."""
        return len(self.tokens_T) + (0 if self.draws_in_prefill else self.max_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedRow:
    """One sampled continuation: int32 tokens (N,), float32 logprobs (N,) of the untempered, untruncated model.

    `top_ids` int32 and `top_logprobs` float32 (N, k) are the likeliest tokens at each position, if asked for.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stop_reason: Literal["stop", "length"]
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationResult:
    """Answer of a generation.

    Attributes:
        rows: one per sample.
        prompt_logprobs_T: float32 (T,), NaN at position 0 and where not scored; None if not asked for.
        topk_ids_Tk: int32 (T, k), topk_logprobs_Tk: float32 (T, k); id 0 and -99999.0 where not scored.
        target_logprobs_TK: float32 (T - 1, K), 0 where a target is -1 or not scored; None if not asked for.
        alternative_ids_Tk: int32 (T - 1, k), alternative_logprobs_Tk: float32 (T - 1, k); None if not asked for.
        cached_tokens: prompt tokens whose keys and values were in the cache.
    """

    rows: list[GeneratedRow]
    prompt_logprobs_T: np.ndarray | None = None
    topk_ids_Tk: np.ndarray | None = None
    topk_logprobs_Tk: np.ndarray | None = None
    target_logprobs_TK: np.ndarray | None = None
    alternative_ids_Tk: np.ndarray | None = None
    alternative_logprobs_Tk: np.ndarray | None = None
    cached_tokens: int = 0


# f(logprobs of each datum) -> (loss, its gradient by each datum's logprobs, metrics). Runs on a thread of its own.
CustomLoss = Callable[[list[np.ndarray]], tuple[float, list[np.ndarray], dict[str, float]]]
