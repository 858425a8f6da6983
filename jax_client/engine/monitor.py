"""What does an engine say about itself: its settings, its memory, its compiles, and whether it works?

`EngineMonitor` reads the engine's parts; it launches nothing and takes no lock of the dispatcher.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.engine.core.adapters import Adapter
from jax_client.engine.core.dispatch import Dispatcher
from jax_client.engine.core.programs import CompileRecord, compiling
from jax_client.engine.devices.engine_hosts import EngineHosts
from jax_client.engine.protocol import Description, Health, Usage
from jax_client.engine.sample.loop import SamplingLoop
from jax_client.engine.train.trainer import Trainer
from jax_client.models.config import ModelConfig
from jax_client.models.parts.attention import Attention
from jax_client.weights.read.source import ModelSource

# Longer than any turn of the device should take; compiles are known by name and may take longer still.
STUCK_SECONDS = 300.0
COMPILE_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMonitor:
    """Implements `protocol.Monitor` over the parts of an engine.

    It refers neither to the engine, which refers to it, nor to the weights: a circle would keep them in memory.

    Attributes:
        weights_bytes: of the base model, all devices together.
        adapters: of the engine, which adds and removes them.
        log: the engine's compiles.
        matmul_flops_per_second: of the mesh.
        others: the other hosts of the mesh; None where there are none.
    """

    source: ModelSource
    model: ModelConfig
    mesh: Mesh
    dtype: jnp.dtype
    attention: Attention
    weights_bytes: int
    sampler: SamplingLoop
    trainer: Trainer
    dispatcher: Dispatcher
    adapters: list[Adapter]
    log: list[CompileRecord]
    matmul_flops_per_second: float
    others: EngineHosts | None = None

    def describe(self) -> Description:
        """Return the model, the mesh, every value that "auto" chose, memory by kind and the compiled programs."""
        device = self.mesh.devices.flat[0]
        limits, usage = self.trainer.limits, self.usage()
        return {
            "model": {"name": self.source.name, "path": str(self.source.path), "family": self.model.family},
            "device": {"platform": device.platform, "kind": device.device_kind, "count": self.mesh.size},
            "mesh": dict(self.mesh.shape),
            "hosts": [] if self.others is None else self.others.leader.health(),
            "dtype": self.dtype.name,
            "attention": self.attention.name,
            "sampling_attention": self.sampler.attention.name,
            "remat": self.trainer.remat(limits.tokens_at_once),
            "max_tokens_per_micro_batch": limits.tokens_at_once * limits.ways,
            "micro_batches_at_once": limits.concurrent,
            "max_context": self.model.max_context,
            "memory_bytes": usage["memory_bytes"],
            "sampling": usage["sampling"],
            "training": self.trainer.total.rates(self.matmul_flops_per_second),
            "matmul_flops_per_second": self.matmul_flops_per_second,
            "compiled": [asdict(record) for record in self.compiled()],
        }

    def usage(self) -> Usage:
        """Return what changes from step to step; walks the trees of the adapters once."""
        size = partial(jax.tree.reduce, lambda total, a: total + a.nbytes, initializer=0)
        known, sampling = list(self.adapters), self.sampler.describe()
        remat = self.trainer.remat(self.trainer.limits.tokens_at_once)
        return {
            "memory_bytes": {
                "weights": self.weights_bytes,
                "adapters": size([a.weights for a in known]),
                "optimizer": size([(a.mu, a.nu) for a in known]),
                "gradients": size([grads for a in known if (grads := a.grads) is not None]),
                "cache": int(sampling["cache_bytes"]),
                "decode_weights": int(sampling["decode_weights_bytes"]),
                "activations_per_token": self.trainer.memory.activations(remat),
                "available": self.trainer.available_bytes(),
            },
            "sampling": sampling,
            "training": asdict(self.trainer.total),
            "owner_seconds": self.dispatcher.device_s(),
        }

    def compiled(self, since: int = 0) -> list[CompileRecord]:
        """Return the compiles so far, but for the first `since`."""
        return self.log[since:]

    def health(self) -> Health:
        """Return how the engine does."""
        liveness, now = self.dispatcher.liveness(), compiling(self.log)
        if not liveness.alive:
            state = "closed" if liveness.closed else "dead"
        elif any(each["seconds"] < COMPILE_SECONDS for each in now):
            state = "compiling"
        elif liveness.stalled_s > STUCK_SECONDS:
            state = "stuck"
        else:
            state = "busy" if liveness.waiting else "idle"
        return {
            "state": state,
            "waiting": liveness.waiting,
            "stalled_seconds": round(liveness.stalled_s, 3),
            "compiling": now,
            "hosts": [] if self.others is None else self.others.leader.health(),
        }
