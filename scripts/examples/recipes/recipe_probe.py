"""What do a recipe's weights do? Asked through the tinker SDK and the cookbook's renderer; prints one JSON object.

Runs in the recipes' environment and working directory, as the recipes do, with TINKER_BASE_URL set.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker_cookbook import renderers
from tinker_cookbook.supervised.common import compute_mean_nll
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

RENDERER = "qwen3_instruct"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="name, and folder of the tokenizer")
    what = parser.add_subparsers(dest="what", required=True)
    nll = what.add_parser("nll", help="loss of the first batch, by torch in float32")
    nll.add_argument("--gguf", type=Path, required=True)
    nll.add_argument("--data", required=True, help="JSON lines of conversations")
    nll.add_argument("--batch", type=int, required=True)
    sums = what.add_parser("sums", help="how many sums end in time, how many are right")
    sums.add_argument("--sampler", required=True)
    sums.add_argument("--data", type=Path, required=True, help="JSON lines of messages and answer")
    sums.add_argument("--max-tokens", type=int, required=True)
    prefix = what.add_parser("prefix", help="how much of one prompt in many requests comes from the cache")
    prefix.add_argument("--sampler", required=True)
    prefix.add_argument("--prompt", required=True)
    prefix.add_argument("--requests", type=int, required=True)
    prefix.add_argument("--max-tokens", type=int, required=True)
    download = what.add_parser("download", help="fetch a training checkpoint as a PEFT adapter")
    download.add_argument("--state", required=True, help="tinker:// path")
    download.add_argument("--folder", required=True)
    return parser.parse_args()


def nll(args: argparse.Namespace) -> dict[str, float]:
    """Compute the recipe's train_mean_nll of its first batch with transformers, which reads the weights itself."""
    from transformers import AutoModelForCausalLM

    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=args.model, renderer_name=RENDERER, max_length=16384, batch_size=args.batch
    )
    dataset, _ = FromConversationFileBuilder(common_config=common, file_path=args.data)()
    dataset.set_epoch(seed=0)
    data = dataset.get_batch(0)
    model = AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32)
    logprobs, weights = [], []
    with torch.no_grad():
        for datum in data:
            logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
            targets = datum.loss_fn_inputs["target_tokens"].to_torch()
            chosen = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
            logprobs.append(tinker.TensorData.from_torch(chosen))
            weights.append(datum.loss_fn_inputs["weights"])
    return {"nll": float(compute_mean_nll(logprobs, weights))}


def sums(args: argparse.Namespace) -> dict[str, float]:
    """Sample one answer per sum at temperature 1; an answer that does not stop in time can still be right."""
    renderer = renderers.get_renderer(RENDERER, get_tokenizer(args.model))
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    prompts = [renderer.build_generation_prompt(row["messages"]) for row in rows]
    answers = _sample(args, renderer, prompts)
    stopped = correct = 0
    for row, answer in zip(rows, answers, strict=True):
        sequence = answer.sequences[0]
        stopped += sequence.stop_reason == "stop"
        message, _ = renderer.parse_response(sequence.tokens)
        numbers = re.findall(r"-?\d+", renderers.get_text_content(message).replace(",", ""))
        correct += bool(numbers) and int(numbers[-1]) == row["answer"]
    return {"asked": len(rows), "stopped": stopped / len(rows), "correct": correct / len(rows)}


def prefix(args: argparse.Namespace) -> dict[str, float]:
    """Send one prompt in requests of their own, all at once, as the reinforcement-learning loop does."""
    renderer = renderers.get_renderer(RENDERER, get_tokenizer(args.model))
    prompt = renderer.build_generation_prompt([{"role": "user", "content": args.prompt}])
    answers = _sample(args, renderer, [prompt] * args.requests)
    hits = sum(answer.prompt_cache_hit_tokens or 0 for answer in answers)
    return {"prompt_tokens": prompt.length * len(answers), "hit_tokens": hits}


def download(args: argparse.Namespace) -> dict[str, float]:
    """Download a state path with the cookbook's own function; count the tensors, and which of them are trained."""
    from safetensors.torch import load_file
    from tinker_cookbook import weights

    folder = Path(weights.download(tinker_path=args.state, output_dir=args.folder))
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    # B is zero until it is trained.
    trained = [bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name]
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return {"tensors": len(tensors), "rank": rank, "finite": finite, "trained": sum(trained) / max(1, len(trained))}


def _sample(args: argparse.Namespace, renderer: Any, prompts: list[tinker.ModelInput]) -> list[tinker.SampleResponse]:
    client = tinker.ServiceClient().create_sampling_client(model_path=args.sampler).result()
    params = tinker.SamplingParams(max_tokens=args.max_tokens, temperature=1.0, stop=renderer.get_stop_sequences())
    futures = [client.sample(prompt=prompt, num_samples=1, sampling_params=params) for prompt in prompts]
    return [future.result() for future in futures]


def main() -> None:
    args = arguments()
    print(json.dumps({"nll": nll, "sums": sums, "prefix": prefix, "download": download}[args.what](args)))


if __name__ == "__main__":
    main()
