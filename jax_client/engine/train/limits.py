"""How many tokens does a micro-batch have, and what does its backward pass recompute? Both follow from the free memory.

On an accelerator the two are chosen together: fewer tokens at once cost a little, recomputing costs more. A CPU gains
nothing from more tokens than its caches hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax_client.engine.core import accounting, memory
from jax_client.engine.core.memory import PassMemory
from jax_client.engine.train.packing import ROW_LENGTHS, Limits
from jax_client.models.kernels.blockwise import SHORT_ROW
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.kind import Remat
from jax_client.sharding import ways_of
from jax_client.values import LoraSpec

# Of what the weights, the cache and the adapter leave, what a training pass may take on an accelerator.
TRAINING_SHARE = 0.85
# The adapter for which there is to be room; what a client opens is not known when this is chosen.
TYPICAL = LoraSpec(rank=32, seed=0)
# What a micro-batch costs an accelerator beside its tokens, in tokens of a way: gathering the weights, small matmuls.
OVERHEAD = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """Chooses the sizes of the training passes of one model on one mesh.

    Attributes:
        memory: what a pass takes.
        attention: that it runs.
        free: bytes of a device after the weights.
        cache: bytes of them that the sampler's cache will take.
        setting: the user's remat, or "auto".
    """

    memory: PassMemory
    attention: Attention
    free: int
    cache: int
    setting: str

    def remat(self, tokens: int) -> Remat:
        """Return the remat setting where `tokens` tokens per way are computed at the same time."""
        if self.setting != "auto":
            return self.setting  # type: ignore[return-value]
        if self.memory.on_cpu:
            return memory.choose_remat(self.memory.config, self.memory.dtype, tokens, self.free)
        for remat in ("none", "selective"):
            if self._fits(tokens, remat):
                return remat
        return "full"

    def limits(self, max_tokens: int | None) -> Limits:
        """Return the bounds of a micro-batch.

        Args:
            max_tokens: the user's ceiling of the tokens that are computed at once, all devices together; None chooses.
        """
        mesh = self.memory.mesh
        ways, concurrent = ways_of(mesh), memory.choose_concurrency(mesh)
        tokens = self._tokens() if max_tokens is None else max(1, max_tokens // (ways * concurrent))
        return Limits(
            ways=ways,
            tokens=min(tokens, ROW_LENGTHS[-1]),
            concurrent=concurrent,
            row_length=self.attention.row_length,
            segments=self.attention.max_segments,
        )

    def _tokens(self) -> int:
        """Return the tokens per way with which a call costs least, of those that fit; the fewest if none do."""
        if self.memory.on_cpu:
            return SHORT_ROW
        fitting = [tokens for tokens in ROW_LENGTHS if self._fits(tokens, self.remat(tokens))]
        return min(fitting, key=self._cost, default=ROW_LENGTHS[0])

    def _cost(self, tokens: int) -> float:
        length = min(tokens, self.attention.row_length or tokens)
        computed = accounting.flops(self.memory.config, TYPICAL, [length], self.remat(tokens))[1] / length
        return computed * (1 + OVERHEAD / tokens)

    def _fits(self, tokens: int, remat: Remat) -> bool:
        room = TRAINING_SHARE * (self.free - self.cache - 3 * self.memory.adapter(TYPICAL))
        return sum(self.memory.step(remat, tokens, TYPICAL).values()) <= room
