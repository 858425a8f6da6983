"""Does a model that was never run here compute what transformers computes? A text's logprobs and a greedy continuation.

Run it once for each release that is new on a machine. Without a reference it prints what to compare by hand: the mean
logprob of a fixed text, and what the model writes behind a fixed prompt. With `--reference` transformers computes both,
in float32 on this machine's CPU; the exit code is 1 where they differ by more than the limits.

    python scripts/probes/check_release.py /models/gpt-oss-20b
    python scripts/probes/check_release.py /models/Qwen3-0.6B --reference --dtype float32
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import jax_client
from jax_client import types
from jax_client.weights.read.source import resolve

TEXT = (
    "A tide table is a list of promises. For every day of the year it names the minutes at which the sea will stand "
    "highest and lowest in one harbour, and it is printed two years ahead. The moon makes most of it, the sun some, "
    "and the shape of the bay decides the rest."
)
PROMPT, WRITTEN = "The capital of France is", 24
# Largest gap of a logprob, in nats: float32 rounds each sum of a layer, bfloat16 each matrix product's operands.
LIMITS = {"float32": 1e-2, "bfloat16": 0.5}


def ours(model: str, dtype: str) -> tuple[list[int], np.ndarray, list[int], list[int], Any]:
    """Return the text's tokens and logprobs (T,), the prompt's tokens, what is written behind it, and the tokenizer."""
    service = jax_client.ServiceClient(config=jax_client.EngineConfig(dtype=dtype))
    client = service.create_sampling_client(base_model=model)
    tokenizer = client.get_tokenizer()
    text, prompt = tokenizer.encode(TEXT), tokenizer.encode(PROMPT)
    logprobs = client.compute_logprobs(types.ModelInput.from_ints(text)).result()
    params = types.SamplingParams(max_tokens=WRITTEN, temperature=0.0)
    written = list(client.sample(types.ModelInput.from_ints(prompt), 1, params).result().sequences[0].tokens)
    return text, np.array(logprobs, float), prompt, written, tokenizer


def reference(model: str, text: list[int], prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    """Return what transformers has for the text's logprobs (T,) and the continuation."""
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve(model)
    where = (source.path, {}) if source.kind == "hf" else (source.path.parent, {"gguf_file": source.path.name})
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | where[1]
    network = AutoModelForCausalLM.from_pretrained(where[0], **options).eval()
    with torch.no_grad():
        logits = network(torch.tensor([text])).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(text[1:])[:, None])[:, 0]
        written = network.generate(torch.tensor([prompt]), max_new_tokens=WRITTEN, do_sample=False)[0, len(prompt) :]
    return np.array([np.nan, *logprobs.tolist()]), written.tolist()


def main() -> int:
    """Print what the model says, and compare it where a reference is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="a directory, a GGUF file or a hub name")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default="bfloat16", help="of the weights (%(default)s)")
    parser.add_argument("--reference", action="store_true", help="compare with transformers, which needs torch")
    args = parser.parse_args()
    text, logprobs, prompt, written, tokenizer = ours(args.model, args.dtype)
    print(f"{args.model} in {args.dtype}, jax_client {jax_client.__version__}")
    print(f"mean logprob of the text's {len(text)} tokens: {np.nanmean(logprobs):.4f}")
    print(f"{PROMPT!r} goes on with {tokenizer.decode(written)!r}")
    if not args.reference:
        print("compare both with a program that is known to run this release, or add --reference")
        return 0
    expected, expected_written = reference(args.model, text, prompt)
    gap, limit = float(np.nanmax(np.abs(logprobs - expected))), LIMITS[args.dtype]
    same = next((i for i, pair in enumerate(zip(written, expected_written, strict=False)) if len(set(pair)) > 1), None)
    print(f"transformers: mean logprob {np.nanmean(expected):.4f}, largest gap {gap:.2e} nats (limit {limit:g})")
    print("transformers writes the same" if same is None else f"transformers writes another token at place {same}")
    return 0 if gap <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
