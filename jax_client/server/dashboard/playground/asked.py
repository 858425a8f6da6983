"""What may a page ask of a model? `SampleAsked` and `ScoreAsked` are requests whose fields were checked."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass

from jax_client.errors import BadRequestError, shown
from jax_client.server.dashboard.playground.chat import checked_messages
from jax_client.values import CheckpointKey, JsonObject

MAX_SAMPLES, MAX_TOKENS, MAX_ALTERNATIVES = 16, 8_192, 10
MAX_PROMPT_IDS, MAX_CHARACTERS = 131_072, 2**19
DEFAULT_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Which weights: a checkpoint's path, else a base model's name."""

    path: str
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleAsked:
    """Samples of a prompt, which is one of text, messages and token ids; `max_tokens` None is as much as fits."""

    weights: Weights
    prompt: str | None
    messages: list[JsonObject] | None
    prompt_ids: list[int] | None
    num_samples: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int
    alternatives: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreAsked:
    """Logprobs of tokens behind a prompt."""

    weights: Weights
    prompt_ids: list[int]
    ids: list[int]


def sample_asked(fields: JsonObject) -> SampleAsked:
    """Read a request to sample. Raises BadRequestError."""
    given = [name for name in ("prompt", "messages", "prompt_ids") if fields.get(name) is not None]
    if len(given) != 1:
        raise BadRequestError(
            f"{' and '.join(given) or 'no prompt'} is given; give one of prompt, messages, prompt_ids."
        )
    prompt = fields.get("prompt")
    if prompt is not None and (not isinstance(prompt, str) or not 1 <= len(prompt) <= MAX_CHARACTERS):
        raise BadRequestError(f"prompt is {shown(prompt)}; give a text of 1 to {MAX_CHARACTERS:,} characters.")
    return SampleAsked(
        weights=_weights(fields),
        prompt=prompt,
        messages=checked_messages(fields["messages"]) if given == ["messages"] else None,
        prompt_ids=_ids(fields, "prompt_ids", 1) if given == ["prompt_ids"] else None,
        num_samples=_integer(fields, "num_samples", 1, 1, MAX_SAMPLES),
        max_tokens=None if fields.get("max_tokens") is None else _integer(fields, "max_tokens", 0, 1, MAX_TOKENS),
        temperature=_number(fields, "temperature", 1.0),
        top_p=_number(fields, "top_p", 1.0),
        top_k=_integer(fields, "top_k", -1, -1, 2**31 - 1),
        seed=_integer(fields, "seed", secrets.randbits(31), 0, 2**63 - 1),
        alternatives=_integer(fields, "alternatives", 0, 0, MAX_ALTERNATIVES),
    )


def score_asked(fields: JsonObject) -> ScoreAsked:
    """Read a request to score. Raises BadRequestError."""
    return ScoreAsked(weights=_weights(fields), prompt_ids=_ids(fields, "prompt_ids", 1), ids=_ids(fields, "ids", 1))


def _weights(fields: JsonObject) -> Weights:
    path, model = fields.get("path"), fields.get("model")
    if path is not None:
        return Weights(path=str(CheckpointKey.parse(path)), model="")
    if not isinstance(model, str) or not model.strip():
        raise BadRequestError(f"model is {shown(model)}; give the name of a model, or the path of a checkpoint.")
    return Weights(path="", model=model)


def _ids(fields: JsonObject, name: str, least: int) -> list[int]:
    value = fields.get(name)
    if not isinstance(value, list) or not least <= len(value) <= MAX_PROMPT_IDS:
        raise BadRequestError(f"{name} is {shown(value)}; give a list of {least} to {MAX_PROMPT_IDS:,} token ids.")
    for each in value:
        if type(each) is not int or not 0 <= each < 2**31:
            raise BadRequestError(f"{name} has {shown(each)}; give token ids.")
    return value


def _integer(fields: JsonObject, name: str, default: int, least: int, most: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise BadRequestError(f"{name} is {shown(value)}; give a whole number from {least} to {most:,}.")
    return value


def _number(fields: JsonObject, name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    # An integer of JSON may be larger than any float.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise BadRequestError(f"{name} is {shown(value)}; give a number.")
    return float(value)
