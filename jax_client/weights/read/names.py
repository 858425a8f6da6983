"""Which Hugging Face tensors make up each stored leaf? A `Part` says where in the leaf one tensor goes.

Hugging Face keeps one [out, in] matrix per projection and layer; the stored layout (`models.decoder`) is [in, out],
stacked by layer, with q|k|v and gate|up fused.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from jax_client.models.config import Experts, ModelConfig
from jax_client.models.parts.dense import DENSE
from jax_client.models.parts.moe import MOE
from jax_client.models.plan import kinds, layers_of

LeafPath = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One Hugging Face tensor (of each layer) and its place in a stored leaf.

    Attributes:
        name: with "{layer}" where the leaf is stacked.
        shape: as stored by Hugging Face.
        split: the shape to view it in, with heads apart.
        order: transposition of `split` to the leaf's order, without the layer axis.
        axis, start: it fills the leaf from `start` along `axis`, and all of the other axes.
        apart: (K, J, H), the leaf's last axis with the heads apart, as `order` and `axis` count them; empty where the
            leaf has no such axis.
        half: which half of axis 1 of `split` belongs to the leaf, and is taken away before `order`; None for all.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    axis: int = 0
    start: int = 0
    apart: tuple[int, ...] = ()
    half: int | None = None

    def arrange(self, tensor: np.ndarray) -> np.ndarray:
        """Return a view of the tensor, or of its half, in the leaf's order."""
        whole = tensor.reshape(self.split)
        return (whole if self.half is None else whole[:, self.half]).transpose(self.order)


def leaf_parts(c: ModelConfig, present: Container[str] = ()) -> dict[LeafPath, tuple[Part, ...]]:
    """Return the parts of every stored leaf of a model, under the paths of `models.decoder.param_specs`.

    Args:
        c: the model.
        present: the tensors that the files have: experts come apart, or those of a layer as one tensor.
    """
    V, D, F, N, K, G, H = c.vocab_size, c.d_model, c.d_ff, c.n_heads, c.n_kv_heads, c.group, c.head_dim
    layer = "model.layers.{layer}."
    attn, mlp = layer + "self_attn.", layer + "mlp."

    def plain(name: str, *shape: int) -> tuple[Part, ...]:
        return (Part(name=name, shape=shape, split=shape, order=tuple(range(len(shape)))),)

    def heads(kind: str) -> tuple[Part, ...]:
        tails, order = ((D,), (3, 0, 1, 2)) if kind == "weight" else ((), (0, 1, 2))
        axis, apart = len(order) - 2, (K, G + 2, H) if kind == "weight" else ()
        return (
            Part(
                name=f"{attn}q_proj.{kind}",
                shape=(N * H, *tails),
                split=(K, G, H, *tails),
                order=order,
                axis=axis,
                apart=apart,
            ),
            *(
                Part(
                    name=f"{attn}{which}_proj.{kind}",
                    shape=(K * H, *tails),
                    split=(K, 1, H, *tails),
                    order=order,
                    axis=axis,
                    start=start,
                    apart=apart,
                )
                for which, start in (("k", G), ("v", G + 1))
            ),
        )

    leaves: dict[LeafPath, tuple[Part, ...]] = {
        ("embed_VD",): plain("model.embed_tokens.weight", V, D),
        ("final_norm_D",): plain("model.norm.weight", D),
        ("layers", "attention", "norm_LD"): plain(layer + "input_layernorm.weight", D),
        ("layers", "attention", "qkv_LDO"): heads("weight"),
        ("layers", "attention", "o_LKGHD"): (
            Part(name=attn + "o_proj.weight", shape=(D, N * H), split=(D, K, G, H), order=(1, 2, 3, 0)),
        ),
    }
    norm = plain(layer + "post_attention_layernorm.weight", D)
    if DENSE in kinds(c):
        leaves["layers", "dense", "norm_LD"] = norm
        leaves["layers", "dense", "gate_up_L2DF"] = tuple(
            Part(name=f"{mlp}{which}_proj.weight", shape=(F, D), split=(1, F, D), order=(0, 2, 1), axis=0, start=start)
            for which, start in (("gate", 0), ("up", 1))
        )
        down = Part(name=mlp + "down_proj.weight", shape=(D, F), split=(D, F), order=(1, 0))
        leaves["layers", "dense", "down_LFD"] = (down,)
    if c.experts is not None and MOE in kinds(c):
        leaves["layers", "moe", "norm_LD"] = norm
        router = Part(name=mlp + "gate.weight", shape=(c.experts.count, D), split=(c.experts.count, D), order=(1, 0))
        leaves["layers", "moe", "router_LDE"] = (router,)
        leaves |= {("layers", "moe", name): parts for name, parts in _experts(c, c.experts, mlp, present).items()}
    if not c.tied_embeddings:
        leaves["unembed_VD",] = plain("lm_head.weight", V, D)
    if c.qkv_bias:
        leaves["layers", "attention", "qkv_bias_LKJH"] = heads("bias")
    if c.qk_norm:
        leaves["layers", "attention", "q_norm_LH"] = plain(attn + "q_norm.weight", H)
        leaves["layers", "attention", "k_norm_LH"] = plain(attn + "k_norm.weight", H)
    return leaves


def _experts(c: ModelConfig, experts: Experts, mlp: str, present: Container[str]) -> dict[str, tuple[Part, ...]]:
    D, E, F = c.d_model, experts.count, experts.d_ff
    leaves = {"gate": "experts_gate_LEDF", "up": "experts_up_LEDF", "down": "experts_down_LEFD"}
    fused = mlp + "experts.gate_up_proj"
    if fused.format(layer=layers_of(c, MOE)[0]) in present:
        both = {"name": fused, "shape": (E, 2 * F, D), "split": (E, 2, F, D), "order": (0, 2, 1)}
        down = Part(name=mlp + "experts.down_proj", shape=(E, D, F), split=(E, D, F), order=(0, 2, 1))
        halves = {leaves[which]: (Part(**both, half=i),) for i, which in enumerate(("gate", "up"))}
        return halves | {leaves["down"]: (down,)}

    def apart(which: str, *shape: int) -> tuple[Part, ...]:
        name = f"{mlp}experts.%d.{which}_proj.weight"
        return tuple(
            Part(name=name % e, shape=shape, split=(1, *shape), order=(0, 2, 1), axis=0, start=e) for e in range(E)
        )

    sizes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return {leaf: apart(which, *sizes[which]) for which, leaf in leaves.items()}


def numbers(path: LeafPath, c: ModelConfig) -> tuple[int, ...]:
    """Return the number of the layer of every entry of a stacked leaf; (0,) for a leaf that is not stacked."""
    if path[0] != "layers":
        return (0,)
    return next(layers_of(c, kind) for kind in kinds(c) if kind.name == path[1])


def expected_tensors(c: ModelConfig, present: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return every tensor a checkpoint of this model must hold, by Hugging Face name, with its shape.

    Args:
        c, present: as for `leaf_parts`.
    """
    return {
        part.name.format(layer=layer): part.shape
        for path, parts in leaf_parts(c, present).items()
        for part in parts
        for layer in numbers(path, c)
    }
