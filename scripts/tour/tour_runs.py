"""What does the tour show? Two supervised runs and one with rewards, all real, on the model that the wheel brings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import tinker
from tinker import types

from chat_data import batches, prompt_tokens, read_conversations, render, truncated
from jax_client.weights.read.source import resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from rl_tasks import Length

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = Path(__file__).parents[1] / "examples" / "data" / "lighthouse_keeper.jsonl"
BATCH, LENGTH = 8, 64
GROUP, MAX_TOKENS = 4, 32


class Runs:
    """Trains over a server, as any program with the SDK does.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._service = tinker.ServiceClient(base_url=url, api_key="tml-tour")
        self.tokenizer = load_tokenizer(resolve(MODEL))

    def _client(self, name: str, rank: int) -> Any:
        metadata = {"name": name}
        return self._service.create_lora_training_client(MODEL, rank=rank, seed=1, user_metadata=metadata).result()

    def supervise(
        self, name: str, *, steps: int, rate: float, rank: int, after: Callable[[int], None] = lambda step: None
    ) -> str:
        """Train a run on the keeper's answers; `after(step)` is called after each. Return the path of its weights."""
        client = self._client(name, rank)
        conversations = read_conversations(DATA)
        cut = (truncated(render(self.tokenizer, each), LENGTH) for each in conversations)
        stream = batches([each for each in cut if each is not None], BATCH, 0)
        for step in range(steps):
            passed = client.forward_backward([each.datum for each in next(stream)], "cross_entropy")
            stepped = client.optim_step(types.AdamParams(learning_rate=rate * min(1.0, (step + 1) / 4)))
            passed.result()
            stepped.result()
            if step == steps // 2:
                client.save_state("halfway").result()
            after(step)
        client.save_state("end").result()
        return client.save_weights_for_sampler("keeper").result().path

    def reward(self, name: str, log: Path, rounds: int) -> None:
        """Train a run for answers in one short sentence; write what the cookbook writes of it into a directory."""
        client, task, order = self._client(name, 8), Length(12), random.Random(1)
        for step in range(rounds):
            sampler = client.save_weights_and_get_sampling_client().result()
            groups = [
                list(self._group(sampler, task, prompt, step * 10 + i))
                for i, prompt in enumerate(task.prompts(order, 3))
            ]
            data = [each["datum"] for group in groups for each in group]
            passed = client.forward_backward(data, "importance_sampling")
            client.optim_step(types.AdamParams(learning_rate=5e-4)).result()
            passed.result()
            _write(log, step, groups)

    def _group(self, sampler: Any, task: Length, prompt: str, seed: int) -> Iterator[dict[str, Any]]:
        tokens = prompt_tokens(self.tokenizer, [{"role": "user", "content": prompt}])
        params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed)
        answer = sampler.sample(types.ModelInput.from_ints(tokens), GROUP, params).result()
        texts = [self.tokenizer.decode(each.tokens, skip_special_tokens=True).strip() for each in answer.sequences]
        finished = [each.stop_reason == "stop" for each in answer.sequences]
        rewards = [task.reward(prompt, text, done) for text, done in zip(texts, finished, strict=True)]
        for text, reward, done, each in zip(texts, rewards, finished, answer.sequences, strict=True):
            yield {
                "prompt": prompt,
                "text": text,
                "reward": reward,
                "parts": {"finished": float(done), "words": float(len(text.split()))},
                "tokens": len(each.tokens),
                "datum": _datum(tokens, each.tokens, each.logprobs or [], reward - fmean(rewards)),
            }


def _datum(prompt: list[int], answer: Sequence[int], logprobs: Sequence[float], advantage: float) -> types.Datum:
    masked = len(prompt) - 1
    inputs = {
        "target_tokens": np.asarray([*prompt[1:], *answer], np.int64),
        "logprobs": np.asarray([0.0] * masked + list(logprobs), np.float32),
        "advantages": np.asarray([0.0] * masked + [advantage] * len(answer), np.float32),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints([*prompt, *answer[:-1]]),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
    )


def _write(log: Path, step: int, groups: list[list[dict[str, Any]]]) -> None:
    """Append a round to metrics.jsonl, and write its rollouts as the cookbook does: numbers, and texts in a tree."""
    folder = log / f"iteration_{step:06d}"
    folder.mkdir(parents=True)
    rewards = [each["reward"] for group in groups for each in group]
    with (log / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward/mean": fmean(rewards), "reward/max": max(rewards)}) + "\n")
    with (folder / "train_rollout_summaries.jsonl").open("w") as file:
        for number, group in enumerate(groups):
            for each in group:
                line = {"group_idx": number, "total_reward": each["reward"], "trajectory_metrics": each["parts"]}
                file.write(json.dumps({**line, "steps": [{"ac_len": each["tokens"]}]}) + "\n")
    tree = {"root": {"tag": "body", "children": [_group_tree(group) for group in groups]}}
    (folder / "train_logtree.json").write_text(json.dumps(tree))


def _group_tree(group: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [_section("Prompt", _said("user", group[0]["prompt"]))]
    for each in group:
        parts.append(_section("Policy Response", _said("assistant", each["text"])))
        cells = [{"tag": "td", "children": [text]} for text in ("reward", str(each["reward"]))]
        parts.append(_section("Reward", {"tag": "tr", "children": cells}))
    return _section("Group Rollout", *parts)


def _section(title: str, *children: dict[str, Any]) -> dict[str, Any]:
    return {"tag": "section", "children": [{"tag": "h3", "children": [title]}, *children]}


def _said(role: str, text: str) -> dict[str, Any]:
    return {"tag": "div", "data": {"messages": [{"role": role, "content": text}]}, "children": []}
