"""Does reinforcement learning work here? Teach a model to answer in one short sentence, or to add.

    python scripts/examples/rl.py --loss ppo                               # answers of --words words that end
    python scripts/examples/rl.py --task arithmetic --sft-steps 30         # sums, after a start with right answers

Each step samples a group of answers to every prompt, and an answer's advantage is its reward less its group's mean
(as in GRPO, without the division by the deviation). What is rewarded: `rl_tasks.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import jax_client
from chat_data import prompt_tokens, render
from jax_client import types
from rl_tasks import QUESTIONS, Arithmetic, Length, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sampled answer with the sampler's log-probabilities, and what it earned."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    reward: float
    advantage: float

    @property
    def datum(self) -> types.Datum:
        """Score the answer's tokens only: positions inside the prompt have advantage zero."""
        masked = len(self.prompt) - 1
        inputs = {
            "target_tokens": np.asarray(self.prompt[1:] + self.tokens, np.int64),
            "logprobs": np.asarray([0.0] * masked + self.logprobs, np.float32),
            "advantages": np.asarray([0.0] * masked + [self.advantage] * len(self.tokens), np.float32),
        }
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.prompt + self.tokens[:-1]),
            loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", choices=("length", "arithmetic"), default="length")
    parser.add_argument("--sft-steps", type=int, default=0, help="steps on 16 right answers each, before the rounds")
    parser.add_argument("--loss", choices=("importance_sampling", "ppo"), default="importance_sampling")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or directory")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base model")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument(
        "--no-train-unembed", action="store_true", help="no adapter on the output projection: vLLM, SGLang take it then"
    )
    parser.add_argument("--steps", type=int, default=10, help="sampling rounds")
    parser.add_argument("--prompts", type=int, default=3, help="prompts per round")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt")
    parser.add_argument("--substeps", type=int, help="optimizer steps per round (default: 1, ppo 2)")
    parser.add_argument("--max-tokens", type=int, default=40, help="length at which an answer is cut")
    parser.add_argument("--words", type=int, default=12, help="length that is rewarded most")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="append one JSON object per round to this file")
    args = parser.parse_args()
    if args.group < 2:
        parser.error("--group is below 2: an answer is compared with the others of its group")
    if args.sft_steps and args.task != "arithmetic":
        parser.error("--sft-steps needs right answers to learn from; they are there for --task arithmetic")
    if not 1 <= args.prompts <= len(QUESTIONS):
        parser.error(f"--prompts is {args.prompts}; choose 1 to {len(QUESTIONS)}")
    args.substeps = args.substeps or (2 if args.loss == "ppo" else 1)
    return args


def learn_right_answers(
    client: Any, tokenizer: Any, task: Arithmetic, order: random.Random, args: argparse.Namespace
) -> None:
    """Take the supervised steps, all in flight together; print the first and the last loss per token."""
    flying = []
    for _ in range(args.sft_steps):
        examples = [task.example(order) for _ in range(16)]
        chats = [[{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for ask, say in examples]
        rendered = [render(tokenizer, chat) for chat in chats]
        fwdbwd = client.forward_backward([example.datum for example in rendered], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=args.lr))
        flying.append((fwdbwd, sum(example.scored for example in rendered)))
    losses = [future.result().metrics["loss:sum"] / scored for future, scored in flying]
    print(f"{args.sft_steps} steps on right answers: loss {losses[0]:.2f} -> {losses[-1]:.2f} per token", flush=True)


def rollout(
    sampler: Any, tokenizer: Any, task: Task, prompts: Sequence[str], step: int, args: argparse.Namespace
) -> list[Answer]:
    """Sample a group per prompt, all prompts in flight together, and compare each group's rewards."""
    flying = []
    for index, prompt in enumerate(prompts):
        tokens = prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])
        seed = args.seed * 1_000_003 + step * len(QUESTIONS) + index
        params = types.SamplingParams(max_tokens=args.max_tokens, temperature=1.0, seed=seed)
        flying.append((prompt, tokens, sampler.sample(types.ModelInput.from_ints(tokens), args.group, params)))
    answers = []
    for prompt, tokens, future in flying:
        sequences = future.result().sequences
        texts = [tokenizer.decode(sequence.tokens, skip_special_tokens=True) for sequence in sequences]
        pairs = zip(texts, sequences, strict=True)
        rewards = [task.reward(prompt, text, sequence.stop_reason == "stop") for text, sequence in pairs]
        baseline = fmean(rewards)
        for sequence, text, value in zip(sequences, texts, rewards, strict=True):
            answers.append(
                Answer(
                    prompt=tokens,
                    tokens=sequence.tokens,
                    logprobs=sequence.logprobs,
                    text=text.strip(),
                    reward=value,
                    advantage=value - baseline,
                )
            )
    return answers


def update(client: Any, answers: Sequence[Answer], args: argparse.Namespace) -> dict[str, float]:
    """Take the round's optimizer steps; return the last one's metrics. Answers without advantage teach nothing.

    Under "trainer_sampler_kl" is the first step's estimate of KL(sampler || trainer) per token, in nats: then both have
    the same weights, and it tells how well the two agree.
    """
    data = [answer.datum for answer in answers if answer.advantage != 0.0]
    if not data:
        return {}
    flying = []
    for _ in range(args.substeps):
        fwdbwd = client.forward_backward(data, args.loss)
        flying.append((fwdbwd, client.optim_step(types.AdamParams(learning_rate=args.lr))))
    for fwdbwd, optim in flying:
        metrics = dict(fwdbwd.result().metrics) | (optim.result().metrics or {})
    return metrics | {"trainer_sampler_kl": flying[0][0].result().metrics["kl_sample_train:mean"]}


def main() -> int:
    args = arguments()
    service = jax_client.ServiceClient(config=jax_client.EngineConfig(dtype=args.dtype))
    client = service.create_lora_training_client(
        base_model=args.model, rank=args.rank, seed=args.seed, train_unembed=not args.no_train_unembed
    ).result()
    tokenizer = client.get_tokenizer()
    order = random.Random(args.seed)
    task: Task = Arithmetic() if args.task == "arithmetic" else Length(args.words)
    if isinstance(task, Arithmetic) and args.sft_steps:
        learn_right_answers(client, tokenizer, task, order, args)
    means: list[float] = []
    for step in range(args.steps):
        began = time.perf_counter()
        sampler = client.save_weights_and_get_sampling_client().result()
        answers = rollout(sampler, tokenizer, task, task.prompts(order, args.prompts), step, args)
        sampled = time.perf_counter() - began
        metrics = update(client, answers, args)
        means.append(fmean(answer.reward for answer in answers))
        length = fmean(len(answer.tokens) for answer in answers)
        seconds = time.perf_counter() - began
        print(
            f"step {step + 1}/{args.steps}: reward {means[-1]:.3f}, {length:.1f} tokens per answer, "
            f"{seconds:.1f} s ({sampled:.1f} s sampling), KL {metrics.get('trainer_sampler_kl', 0.0):.1e} | "
            f"{answers[0].text[:60]!r}",
            flush=True,
        )
        if args.log:
            row = {"step": step + 1, "reward": means[-1], "tokens": length, "seconds": seconds} | metrics
            with args.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    last = min(3, len(means))
    print(f"mean reward: first {last} steps {fmean(means[:last]):.3f} -> last {last} steps {fmean(means[-last:]):.3f}")
    print(f"sampler weights: {client.save_weights_for_sampler('rl').result().path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
