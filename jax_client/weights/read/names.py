"""Which Hugging Face tensors make up each stored leaf? A `Part` says where in the leaf one tensor goes.

Hugging Face keeps one [out, in] matrix per projection and layer; the stored layout (`models.decoder`) is [in, out],
stacked by layer, with q|k|v and gate|up fused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_client.models.config import ModelConfig

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
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    axis: int = 0
    start: int = 0
    apart: tuple[int, ...] = ()

    def arrange(self, tensor: np.ndarray) -> np.ndarray:
        """Return a view of the tensor in the leaf's order."""
        return tensor.reshape(self.split).transpose(self.order)


def leaf_parts(c: ModelConfig) -> dict[LeafPath, tuple[Part, ...]]:
    """Return the parts of every stored leaf of a model, under the paths of `models.decoder.param_specs`."""
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
        ("layers", "attn_norm_LD"): plain(layer + "input_layernorm.weight", D),
        ("layers", "qkv_LDO"): heads("weight"),
        ("layers", "o_LKGHD"): (
            Part(name=attn + "o_proj.weight", shape=(D, N * H), split=(D, K, G, H), order=(1, 2, 3, 0)),
        ),
        ("layers", "mlp_norm_LD"): plain(layer + "post_attention_layernorm.weight", D),
        ("layers", "gate_up_L2DF"): tuple(
            Part(name=f"{mlp}{which}_proj.weight", shape=(F, D), split=(1, F, D), order=(0, 2, 1), axis=0, start=start)
            for which, start in (("gate", 0), ("up", 1))
        ),
        ("layers", "down_LFD"): (Part(name=mlp + "down_proj.weight", shape=(D, F), split=(D, F), order=(1, 0)),),
    }
    if not c.tied_embeddings:
        leaves["unembed_VD",] = plain("lm_head.weight", V, D)
    if c.qkv_bias:
        leaves["layers", "qkv_bias_LKJH"] = heads("bias")
    if c.qk_norm:
        leaves["layers", "q_norm_LH"] = plain(attn + "q_norm.weight", H)
        leaves["layers", "k_norm_LH"] = plain(attn + "k_norm.weight", H)
    return leaves


def expected_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor a checkpoint of this model must hold, by Hugging Face name, with its shape."""
    return {
        part.name.format(layer=layer): part.shape
        for path, parts in leaf_parts(c).items()
        for part in parts
        for layer in range(c.n_layers if path[0] == "layers" else 1)
    }
