"""Which Hugging Face tensors make up each stored leaf? A `Part` says where in the leaf one tensor goes.

Hugging Face keeps an [out, in] matrix per projection and layer, but for experts; the stored layout (`models.decoder`)
is [in, out], stacked by layer, with q|k|v and gate|up fused.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from jax_client.models.config import Experts, GatedDelta, ModelConfig
from jax_client.models.families.family import Files
from jax_client.models.families.registry import FAMILIES
from jax_client.models.parts.dense import DENSE
from jax_client.models.parts.gated_delta.layer import DELTA, OUT, PRODUCTS
from jax_client.models.parts.gated_delta.mixing import CONVOLUTIONS, GATES
from jax_client.models.parts.kind import Kind
from jax_client.models.parts.mixture.moe import MOE
from jax_client.models.parts.mixture.shared import PREFIX, SHARE
from jax_client.models.parts.self_attention import ATTENTION
from jax_client.models.plan import kinds, layers_of
from jax_client.weights.read.tensors import TensorReader

LeafPath = tuple[str, ...]
Leaves = dict[str, tuple["Part", ...]]


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
        pick: (axis, index) of `split`, the entries that belong to the leaf: of one index, and that axis is taken away
            before `order`, or of a range. None for all.
        expert: read of a tensor with all experts; `split` begins with an axis for it. None to read the whole tensor.
        plus: is added to the values.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    axis: int = 0
    start: int = 0
    apart: tuple[int, ...] = ()
    pick: tuple[int, int | range] | None = None
    expert: int | None = None
    plus: float = 0.0

    def read(self, reader: TensorReader, name: str) -> np.ndarray:
        """Return what belongs to the leaf of a tensor, in the leaf's order; a view where nothing is added."""
        whole = reader.read(name) if self.expert is None else reader.read_expert(name, self.expert)
        whole = whole.reshape(self.split)
        if self.pick is not None:
            axis, index = self.pick
            at = slice(index.start, index.stop) if isinstance(index, range) else index
            whole = whole[(slice(None),) * axis + (at,)]
        whole = whole.transpose(self.order)
        return whole.astype(np.float32) + np.float32(self.plus) if self.plus else whole


def leaf_parts(c: ModelConfig, present: Container[str] = ()) -> dict[LeafPath, tuple[Part, ...]]:
    """Return the parts of every stored leaf of a model, under the paths of `models.decoder.param_specs`.

    Args:
        c: the model.
        present: the tensors that the files have: experts come apart, or those of a layer as one tensor.
    """
    files, layer = FAMILIES[c.family].files, "model.layers.{layer}."
    norm = partial(_plain, c.d_model, plus=float(files.added_to_one))
    leaves: dict[LeafPath, tuple[Part, ...]] = {
        ("embed_VD",): _plain(c.vocab_size, c.d_model, name="model.embed_tokens.weight"),
        ("final_norm_D",): norm(name="model.norm.weight"),
    }
    if not c.tied_embeddings:
        leaves["unembed_VD",] = _plain(c.vocab_size, c.d_model, name="lm_head.weight")
    of_kinds: list[tuple[Kind, Leaves]] = [(ATTENTION, _attention(c, layer + "self_attn.", files))]
    if c.delta is not None:
        of_kinds.append((DELTA, _gated_delta(c, c.delta, layer + "linear_attn.", files)))
    if DENSE in kinds(c):
        of_kinds.append((DENSE, _mlp(c.d_model, c.d_ff, layer + "mlp.")))
    if c.experts is not None and MOE in kinds(c):
        of_kinds.append((MOE, _experts(c, c.experts, layer + "mlp.", files, present)))
    for kind, parts in of_kinds:
        first = (0 if kind.flag == "train_attn" else 1) * (1 + c.post_norms)
        for leaf, name in zip(("norm_LD", "post_norm_LD"), files.norms[first : first + 1 + c.post_norms], strict=False):
            parts[leaf] = norm(name=f"{layer}{name}.weight")
        leaves |= {("layers", kind.name, leaf): found for leaf, found in parts.items()}
    return leaves


def _plain(*shape: int, name: str, plus: float = 0.0) -> tuple[Part, ...]:
    return (Part(name=name, shape=shape, split=shape, order=tuple(range(len(shape))), plus=plus),)


def _attention(c: ModelConfig, attn: str, files: Files) -> Leaves:
    D, N, K, G, H = c.d_model, c.n_heads, c.n_kv_heads, c.group, c.head_dim

    def heads(kind: str) -> tuple[Part, ...]:
        tails, order = ((D,), (3, 0, 1, 2)) if kind == "weight" else ((), (0, 1, 2))
        each = 1 + c.output_gate  # a query's rows, and those of its gate
        axis, apart = len(order) - 2, (K, each * G + 2, H) if kind == "weight" else ()
        return (
            *(
                Part(
                    name=f"{attn}q_proj.{kind}",
                    shape=(each * N * H, *tails),
                    split=(K, G, each, H, *tails),
                    pick=(2, i),
                    order=order,
                    axis=axis,
                    start=i * G,
                    apart=apart,
                )
                for i in range(each)
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
                for which, start in (("k", each * G), ("v", each * G + 1))
            ),
        )

    o = Part(name=attn + "o_proj.weight", shape=(D, N * H), split=(D, K, G, H), order=(1, 2, 3, 0))
    leaves: Leaves = {"qkv_LDO": heads("weight"), "o_LKGHD": (o,)}
    if c.qkv_bias:
        leaves["qkv_bias_LKJH"] = heads("bias")
    if c.o_bias:
        leaves["o_bias_LD"] = _plain(D, name=attn + "o_proj.bias")
    if c.sinks:
        leaves["sinks_LKG"] = (Part(name=attn + "sinks", shape=(N,), split=(K, G), order=(0, 1)),)
    if c.qk_norm:
        plus = float(files.added_to_one)
        leaves |= {f"{q}_norm_LH": _plain(H, name=f"{attn}{q}_norm.weight", plus=plus) for q in "qk"}
    return leaves


def _gated_delta(c: ModelConfig, delta: GatedDelta, prefix: str, files: Files) -> Leaves:
    D, P, X, Y = c.d_model, delta.value_heads, delta.key_dim, delta.value_dim
    heads, shared = delta.key_heads, delta.value_heads // delta.key_heads
    keys, values = heads * X, P * Y
    # The rows of q, k and v behind each other: of the convolution, and of the matrix where z has one of its own.
    rows = range(keys), range(keys, 2 * keys), range(2 * keys, 2 * keys + values)
    one_by_one = {"in_proj_z.weight": values, "in_proj_a.weight": P, "in_proj_b.weight": P}

    def of_head(name: str, widths: Sequence[int]) -> list[tuple[Part, ...]]:
        """Return the parts of a matrix that has a few rows of each of several leaves for every key head in turn."""
        ends, split = list(accumulate(widths)), (heads, sum(widths), D)
        return [
            (
                Part(
                    name=prefix + name,
                    shape=(heads * sum(widths), D),
                    split=split,
                    pick=(1, range(end - width, end)),
                    order=(2, 0, 1),
                    axis=1,
                    apart=(heads, width),
                ),
            )
            for width, end in zip(widths, ends, strict=True)
        ]

    if files.delta == "by head":
        found = of_head("in_proj_qkvz.weight", (X, X, shared * Y, shared * Y))
        found += of_head("in_proj_ba.weight", (shared, shared))[::-1]
    else:
        both = {"name": prefix + "in_proj_qkv.weight", "shape": (delta.channels, D), "split": (delta.channels, D)}
        found = [(Part(**both, order=(1, 0), pick=(0, of)),) for of in rows]
        found += [
            (Part(name=prefix + name, shape=(width, D), split=(width, D), order=(1, 0)),)
            for name, width in one_by_one.items()
        ]
    leaves: Leaves = dict(zip((*PRODUCTS, "delta_a_LDP", "delta_b_LDP"), found, strict=True))
    kernel = {"name": prefix + "conv1d.weight", "shape": (delta.channels, 1, delta.taps)}
    for leaf, of in zip(CONVOLUTIONS, rows, strict=True):
        leaves[leaf] = (Part(**kernel, split=(delta.channels, delta.taps), order=(1, 0), pick=(0, of)),)
    leaves |= {leaf: _plain(P, name=prefix + name) for leaf, name in zip(GATES, ("A_log", "dt_bias"), strict=True)}
    leaves["out_norm_LY"] = _plain(Y, name=prefix + "norm.weight")
    leaves[OUT] = (Part(name=prefix + "out_proj.weight", shape=(D, values), split=(D, P, Y), order=(1, 2, 0)),)
    return leaves


def _mlp(D: int, F: int, mlp: str) -> Leaves:
    down = Part(name=mlp + "down_proj.weight", shape=(D, F), split=(D, F), order=(1, 0))
    gate_up = tuple(
        Part(name=f"{mlp}{which}_proj.weight", shape=(F, D), split=(1, F, D), order=(0, 2, 1), axis=0, start=start)
        for which, start in (("gate", 0), ("up", 1))
    )
    return {"gate_up_L2DF": gate_up, "down_LFD": (down,)}


def _experts(c: ModelConfig, experts: Experts, mlp: str, files: Files, present: Container[str]) -> Leaves:
    D, E, F = c.d_model, experts.count, experts.d_ff
    router = mlp.removesuffix("mlp.") + files.router
    leaves: Leaves = {"router_LDE": (Part(name=router + ".weight", shape=(E, D), split=(E, D), order=(1, 0)),)}
    if experts.biased:
        fused, interleaved = mlp + "experts.gate_up_proj_bias", files.experts == "interleaved"
        split, axis = ((E, F, 2), 2) if interleaved else ((E, 2, F), 1)
        for i, which in enumerate(("gate", "up")):
            bias = Part(name=fused, shape=(E, 2 * F), split=split, order=(0, 1), pick=(axis, i))
            leaves[f"experts_{which}_bias_LEF"] = (bias,)
        leaves["experts_down_bias_LED"] = _plain(E, D, name=mlp + "experts.down_proj_bias")
        leaves["router_bias_LE"] = _plain(E, name=router + ".bias")
    if experts.shared_d_ff is not None:
        leaves |= {PREFIX + leaf: parts for leaf, parts in _mlp(D, experts.shared_d_ff, mlp + "shared_expert.").items()}
        share = Part(name=mlp + "shared_expert_gate.weight", shape=(1, D), split=(1, D), order=(0,), pick=(0, 0))
        leaves[SHARE] = (share,)
    names = {"gate": "experts_gate_LEDF", "up": "experts_up_LEDF", "down": "experts_down_LEFD"}
    fused = mlp + "experts.gate_up_proj"
    if files.experts != "rows" or fused.format(layer=layers_of(c, MOE)[0]) in present:
        found = _fused(E, D, F, mlp + "experts.", files.experts)
        return leaves | {names[which]: parts for which, parts in found.items()}

    def apart(which: str, *shape: int) -> tuple[Part, ...]:
        name = f"{mlp}experts.%d.{which}_proj.weight"
        return tuple(
            Part(name=name % e, shape=shape, split=(1, *shape), order=(0, 2, 1), axis=0, start=e) for e in range(E)
        )

    sizes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return leaves | {leaf: apart(which, *sizes[which]) for which, leaf in names.items()}


def _fused(E: int, D: int, F: int, prefix: str, order: str) -> Leaves:
    """Return the parts of gate, up and down where each layer has all experts in two tensors; read one by one."""
    name, down = prefix + "gate_up_proj", prefix + "down_proj"
    by_layout: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
        "rows": (
            {"shape": (E, 2 * F, D), "split": (1, 2, F, D), "order": (0, 2, 1)},
            1,
            {"shape": (E, D, F), "split": (1, D, F), "order": (0, 2, 1)},
        ),
        "columns": (
            {"shape": (E, D, 2 * F), "split": (1, D, 2, F), "order": (0, 1, 2)},
            2,
            {"shape": (E, F, D), "split": (1, F, D), "order": (0, 1, 2)},
        ),
        "interleaved": (
            {"shape": (E, D, 2 * F), "split": (1, D, F, 2), "order": (0, 1, 2)},
            3,
            {"shape": (E, F, D), "split": (1, F, D), "order": (0, 1, 2)},
        ),
    }
    both, axis, one = by_layout[order]
    of = lambda e: {"axis": 0, "start": e, "expert": e}  # noqa: E731
    found = {
        which: tuple(Part(name=name, pick=(axis, i), **both, **of(e)) for e in range(E))
        for i, which in enumerate(("gate", "up"))
    }
    return found | {"down": tuple(Part(name=down, **one, **of(e)) for e in range(E))}


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
