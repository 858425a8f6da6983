"""What did training cost in tokens, useful FLOPs, padding and time?

`Work` adds up what each call cost; `flops` counts what a call needs.
Useful FLOPs per token are 4 N for the frozen weights (forward, and the gradient by the input; none by the weights),
6 for each adapter weight, and three times the forward attention, counted over the pairs that causality allows, and the
chunks of a gated delta rule. The limit is what the device would need for them at its measured matmul rate, with what
the remat setting recomputes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from jax_client.models.config import ModelConfig
from jax_client.models.lora_arrays import flatten, lora_arrays
from jax_client.models.parts.gated_delta.layer import DELTA, chunk_multiply_adds
from jax_client.models.parts.kind import Remat
from jax_client.models.parts.self_attention import ATTENTION
from jax_client.models.plan import count, layers
from jax_client.values import LoraSpec


@dataclass(kw_only=True, slots=True)
class Work:
    """Sums over training calls; two of them add up.

    Attributes:
        tokens: real ones; computed: with padding.
        flops: useful ones; hardware_flops: with recomputation, of real tokens.
        host_s: packing and unpacking. device_s: from the first launch to the last result, without compiling.
        compile_s: waiting for programs to be compiled.
        queue_s: from when a call was sent, and the calls before it were done, to its first turn on the device.
    """

    tokens: int = 0
    computed: int = 0
    flops: float = 0.0
    hardware_flops: float = 0.0
    host_s: float = 0.0
    device_s: float = 0.0
    compile_s: float = 0.0
    queue_s: float = 0.0

    def add(self, other: Work) -> None:
        """Add another's sums to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def rates(self, matmul_flops_per_s: float) -> dict[str, float]:
        """Return the figures that users see, given the mesh's matmul rate; empty before any training.

        Fractions are of the time on the device; `host_share` is of host and device time together, although the host's
        part runs while the device is busy with earlier calls.
        """
        if not self.tokens or not self.device_s:
            return {}
        return {
            "tokens": float(self.tokens),
            "tokens_per_second": self.tokens / self.device_s,
            "padding_waste": 1 - self.tokens / self.computed,
            "host_share": self.host_s / (self.host_s + self.device_s),
            "useful_flops_per_token": self.flops / self.tokens,
            "matmul_fraction": self.flops / self.device_s / matmul_flops_per_s,
            "limit_fraction": self.hardware_flops / self.device_s / matmul_flops_per_s,
            "host_seconds": self.host_s,
            "device_seconds": self.device_s,
            "compile_seconds": self.compile_s,
            "queue_seconds": self.queue_s,
        }


def flops(c: ModelConfig, spec: LoraSpec, lengths: Sequence[int], remat: Remat) -> tuple[float, float]:
    """Return the useful FLOPs of forward_backward over sequences of these lengths, and those with recomputation."""
    frozen, selective, full, adapters = _multiply_adds(c, spec)
    tokens = sum(lengths)
    pairs = sum(seen_pairs(n, window) * times for window, times in windows_of(c).items() for n in lengths)
    attention = 4 * pairs * c.n_heads * c.head_dim
    chunks = 0.0 if c.delta is None else 2 * tokens * count(c, DELTA) * chunk_multiply_adds(c)
    useful = tokens * (4 * frozen + 6 * adapters) + 3 * (attention + chunks)
    recomputed_matmuls = {"none": 0, "selective": selective, "full": full}[remat]
    # Whatever is kept, the backward pass of attention recomputes its scores, and that of chunks all of them.
    recomputed = tokens * (2 * recomputed_matmuls + (2 * adapters if remat == "full" else 0)) + 0.5 * attention + chunks
    return float(useful), float(useful + recomputed + (attention + chunks if remat == "full" else 0))


def seen_pairs(tokens: int, window: int | None) -> float:
    """Return how many pairs of a query and a key it sees a sequence has; half of a token's own, as is customary."""
    seen = tokens if window is None else min(tokens, window)
    return seen * seen / 2 + (tokens - seen) * seen


@functools.cache
def windows_of(c: ModelConfig) -> Counter[int | None]:
    """Return how many layers attend with each window; None is all of the context."""
    return Counter(layer.options.window for layer in layers(c) if ATTENTION in layer.kinds)


@functools.lru_cache(maxsize=64)  # asked for every micro-batch; a server meets many adapters
def _multiply_adds(c: ModelConfig, spec: LoraSpec) -> tuple[int, int, int, float]:
    """Return those of a token with the frozen weights, what of them "selective" and "full" recompute, and an adapter's.

    Of arrays that have a part for each expert a token meets those of its own experts.
    """
    parts = [kind.multiply_adds(c) for layer in layers(c) for kind in layer.kinds]
    every, selective, full = (sum(part[i] for part in parts) for i in range(3))
    met = 1.0 if c.experts is None else c.experts.per_token / c.experts.count
    arrays = flatten(lora_arrays(c, spec)).values()
    adapters = sum(math.prod(array.shape) * (met if "experts" in array.axes else 1) for array in arrays)
    return every + c.d_model * c.vocab_size, selective, full, adapters
