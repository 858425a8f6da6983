"""Which programs train? Forward with the loss, backward, and the optimizer step.

Built-in and custom losses share the path: forward gives logprobs, their cotangents and the saved activations; backward
turns cotangents, the loss's or the host's, into adapter gradients, added to the accumulated ones. So the programs do
not multiply by loss, and a custom loss costs one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypedDict, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.programs import AnyProgram, CompileRecord, Program, shardings_of
from jax_client.engine.train.packing import MicroBatch
from jax_client.losses import registry
from jax_client.losses.logprob_head import Blocks, Order, head_backward, head_forward
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, output_head_VD
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.kind import Remat, Saved
from jax_client.models.transformer import backward_pass, context, expert_load, forward_pass
from jax_client.sharding import replicated, split_rows

Tree = TypeVar("Tree")
EXPERT_LOAD = "expert_load"  # among the sums
NO_ADAPTER: Weights = {"layers": {}, "unembed": {}}
# The values that the layers and the head saved for their backward passes.
Kept = tuple[Saved, dict[str, jax.Array]]


class Batch(TypedDict):
    """A `packing.MicroBatch` on the device."""

    tokens_BT: jax.Array
    segments_BT: jax.Array
    positions_BT: jax.Array
    targets_BTC: jax.Array
    real_BTC: jax.Array
    inputs: dict[str, jax.Array]
    order_BT: jax.Array
    place_BT: jax.Array
    with_gradient: jax.Array
    scored: jax.Array


def laid_out(
    batch: MicroBatch, rows: Callable[[np.ndarray], jax.Array], whole: Callable[[np.generic], jax.Array]
) -> Batch:
    """Return a micro-batch on the mesh, or its shapes there.

    Args:
        batch: on the host.
        rows: `rows(array) -> array`, whose first axis is split over the ways.
        whole: `whole(scalar) -> array`, the same on every device.
    """
    return Batch(
        tokens_BT=rows(batch.tokens_BT),
        segments_BT=rows(batch.segments_BT),
        positions_BT=rows(batch.positions_BT),
        targets_BTC=rows(batch.targets_BTC),
        real_BTC=rows(batch.real_BTC),
        inputs={name: rows(array) for name, array in batch.inputs.items()},
        order_BT=rows(batch.order_BT),
        place_BT=rows(batch.place_BT),
        with_gradient=whole(batch.with_gradient),
        scored=whole(batch.scored),
    )


class StepMetrics(TypedDict):
    """Scalars of an optimizer step.

    Attributes:
        grad_norm, update_norm: global L2 norms.
        finite: whether the gradient's norm is; otherwise weights and moments are those of before.
        in_range: whether the norms of the update and of the new weights are finite, and so every weight and moment.
    """

    grad_norm: jax.Array
    update_norm: jax.Array
    finite: jax.Array
    in_range: jax.Array


class TrainPrograms:
    """The compiled programs of one model on one mesh. All of them are pure and donate nothing.

    Attributes:
        blocks: how large the head's blocks of scores may be.
    """

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, mesh: Mesh, attention: Attention, log: list[CompileRecord]
    ):
        self._config = config
        self._dtype = dtype
        self._attention = attention
        platform = mesh.devices.flat[0].platform
        self._mesh_options = {
            "split_rows": partial(split_rows, mesh=mesh),
            "on_cpu": platform == "cpu",
            "one_cpu": platform == "cpu" and mesh.size == 1,
            "one_gpu": platform == "gpu" and mesh.size == 1,
            "accelerator": platform != "cpu",
            "mesh": mesh if mesh.size > 1 else None,
        }
        self.blocks = Blocks.of(platform)
        tensor = mesh.shape["tensor"]
        self._shards = tensor if config.vocab_size % tensor == 0 else 1
        size = lambda _, __, batch, *rest: "x".join(map(str, batch["targets_BTC"].shape))  # noqa: E731
        # Cotangents lie as a custom loss's do that come from the host, so that `backward` is compiled once for both.
        # On one device all places are known, so that `backward` can be compiled before `forward` is. On several hosts
        # each reads from its own devices, so the outputs that it reads are whole on all of them.
        kept = replicated(mesh) if mesh.size == 1 else None
        read = replicated(mesh) if mesh.size == 1 or mesh.is_multi_process else None
        forwards = lambda *args: (read, args[2]["targets_BTC"].sharding, read, kept)  # noqa: E731
        model = Program.model_text(config, dtype, mesh, attention)
        self.forward = Program("forward", self._forward, log, forwards, size, model=model)
        self.backward = Program("backward", self._backward, log, lambda *args: shardings_of(args[-1]), size)
        self.zeros = Program("zeros", _zeros, log, shardings_of)
        self.add = Program("add", _add, log, lambda total, _: shardings_of(total))
        self.optim_step = Program("optim_step", adamw_step, log, lambda *args: (*shardings_of(args[:3]), read))

    @property
    def all(self) -> list[AnyProgram]:
        """The programs."""
        return [self.forward, self.backward, self.zeros, self.add, self.optim_step]

    @jax.named_scope("forward")
    def _forward(
        self, params: Params, weights: Weights, batch: Batch, loss: jax.Array, *, remat: Remat | None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], Kept]:
        """Score a micro-batch.

        Args:
            loss: int32 scalar, see `registry.loss_number`.
            remat: what to keep for `backward`; None keeps nothing.

        Returns:
            logprobs_BTC, their cotangents g_BTC, the loss's sums, and what `backward` needs. With experts, and where a
            backward pass follows, the load of each (L, E) is among the sums.
        """
        c = context(batch["positions_BT"], self._config, self._dtype, self._attention, **self._mesh_options)
        h_BTD, saved = forward_pass(params, weights["layers"], batch["tokens_BT"], batch["segments_BT"], c, remat)
        logprobs_BTC, head_saved = head_forward(
            h_BTD,
            output_head_VD(params),
            weights["unembed"],
            batch["targets_BTC"],
            _order(batch),
            dtype=self._dtype,
            shards=self._shards,
            blocks=self.blocks,
            with_backward=remat is not None,
        )
        g_BTC, sums = registry.apply_loss(loss, logprobs_BTC, batch["inputs"], batch["real_BTC"], batch["segments_BT"])
        if remat is not None and (load_LE := expert_load(saved, batch["segments_BT"], self._config)) is not None:
            sums |= {EXPERT_LOAD: load_LE}
        return logprobs_BTC, g_BTC, sums, (saved, head_saved)

    @jax.named_scope("backward")
    def _backward(
        self, params: Params, weights: Weights, batch: Batch, saved: Kept, g_BTC: jax.Array, accumulated: Weights
    ) -> Weights:
        """Return the accumulated gradients plus those of d(sum g x logprobs) by the adapter."""
        layers_saved, head_saved = saved
        c = context(batch["positions_BT"], self._config, self._dtype, self._attention, **self._mesh_options)
        dh_BTD, unembed = head_backward(
            head_saved,
            output_head_VD(params),
            weights["unembed"],
            batch["targets_BTC"],
            g_BTC,
            _order(batch),
            dtype=self._dtype,
            shards=self._shards,
            blocks=self.blocks,
        )
        lora, total = weights["layers"], accumulated["layers"]
        layers = backward_pass(params, lora, batch["segments_BT"], layers_saved, dh_BTD, c, total)
        return {"layers": layers, "unembed": _add(accumulated["unembed"], unembed)}


@jax.named_scope("accumulate")
def _zeros(like: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, like)


@jax.named_scope("accumulate")
def _add(total: Tree, part: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, part)


def _order(batch: Batch) -> Order:
    return Order(batch["order_BT"], batch["place_BT"], batch["with_gradient"], batch["scored"])


@jax.named_scope("optimizer")
def adamw_step(
    weights: Weights, mu: Weights, nu: Weights, grads: Weights, step: jax.Array, settings: dict[str, jax.Array]
) -> tuple[Weights, Weights, Weights, StepMetrics]:
    """Return new weights and moments, and the step's metrics.

    AdamW as torch's: eps outside the root, decoupled decay. Clipping scales the gradient to `grad_clip_norm` where its
    global norm exceeds it, 0 is off. A gradient that is not finite changes nothing and is reported. Weights and moments
    that leave float32's range are returned and reported: the caller keeps the old ones.

    Args:
        step: int32, steps taken before this one.
        settings: float32 scalars under the names of `AdamSettings`.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    limit = settings["grad_clip_norm"]
    scale = jnp.where(limit > 0, jnp.minimum(1.0, limit / (norm + 1e-6)), 1.0)
    adam = optax.scale_by_adam(settings["beta1"], settings["beta2"], settings["eps"])
    state = optax.ScaleByAdamState(count=step, mu=cast(optax.Updates, mu), nu=cast(optax.Updates, nu))
    updates, after = adam.update(jax.tree.map(lambda g: g * scale, grads), state)
    moments = cast(optax.ScaleByAdamState, after)
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    delta = jax.tree.map(lambda u, w: -rate * (u + decay * w), updates, weights)

    def keep(new: optax.Updates, old: Weights) -> Weights:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    new, new_nu = keep(jax.tree.map(jnp.add, weights, delta), weights), keep(moments.nu, nu)
    update_norm = optax.tree.norm(delta)
    # The first moments need no sum: they are means of gradients whose norm is finite.
    reach = sum(jnp.sum(w * w + v) for w, v in zip(jax.tree.leaves(new), jax.tree.leaves(new_nu), strict=True))
    metrics: StepMetrics = {
        "grad_norm": norm,
        "update_norm": update_norm,
        "finite": finite,
        "in_range": jnp.isfinite(update_norm) & jnp.isfinite(reach),
    }
    return new, keep(moments.mu, mu), new_nu, metrics
