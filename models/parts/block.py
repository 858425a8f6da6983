"""What does one decoder layer compute, and what is its backward pass?

A layer is a tuple of residual parts: x + f(norm(x)) each, or x + norm(f(norm(x))), `f` of the part's kind. The backward
passes are written by hand, because that decides what is kept: only the inputs of the matmuls and of the attention, in
the matmul type. They recompute norms and gated activations, and more where memory is short (`Kind.saved`). Frozen
weights get no gradient. The tests compare them with `jax.vjp` of the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jax_client.models.config import ModelConfig
from jax_client.models.layers import rms_norm, rms_norm_backward
from jax_client.models.parts.attention import Extras
from jax_client.models.parts.gated_delta.mixing import Inputs, mix_rows
from jax_client.models.parts.kind import Context, Kept, Kind, Mixing, Remat, Saved, Weights
from jax_client.models.parts.linears import Linears, MixedLinears
from jax_client.models.parts.lora import Adapter


def saved_for_backward(layer: Sequence[Kind], remat: Remat, c: ModelConfig) -> list[tuple[str, ...]]:
    """Return the names that are kept of each part of a layer for its backward pass.

    Where the outputs of parts have norms, "y" is among them: an output before its norm.
    """
    if remat == "full":
        return [("x",) * (i == 0) + kind.always for i, kind in enumerate(layer)]
    return [kind.saved[remat] + ("y",) * c.post_norms for kind in layer]


def kept_widths(kind: Kind, c: ModelConfig, tensor: int) -> dict[str, int]:
    """Return values per token of the names that `saved_for_backward` has, on each of `tensor` devices."""
    return kind.widths(c, tensor) | ({"y": c.d_model} if c.post_norms else {})


def _needed(kind: Kind, c: Context) -> set[str]:
    return set(kind.needed) | ({"y"} if c.config.post_norms else set())


def layer_forward(
    x_BTD: jax.Array,
    layer: Sequence[Kind],
    ws: Sequence[Weights],
    linears: Sequence[Linears] | Sequence[MixedLinears],
    c: Context,
    mixing: Mixing,
) -> tuple[jax.Array, list[Saved], Kept]:
    """Apply one layer.

    Args:
        x_BTD: float32 residual stream.
        layer: the kinds of its parts.
        ws: the parameters of each part, without the leading axis of the stacks.
        linears: the matmuls of each part with their adapters.
        c: what all layers of the pass share.
        mixing: what mixes tokens: within the rows (training), or with what is stored of them (sampling).

    Returns:
        The new residual stream, everything that `layer_backward` reads of each part, and what `mixing` kept.
    """
    x_MD, every, kept = x_BTD.reshape(-1, x_BTD.shape[-1]), [], None
    for kind, w, own in zip(layer, ws, linears, strict=True):
        x_MD, saved, found = _part_forward(x_MD, x_BTD.shape[:2], kind, w, own, c, mixing, {})
        kept = kept if found is None else found
        every.append(_rounded(saved, kind, c))
    return x_MD.reshape(x_BTD.shape), every, kept


def _part_forward(
    x_MD: jax.Array,
    rows: tuple[int, ...],
    kind: Kind,
    w: Weights,
    linears: Linears | MixedLinears,
    c: Context,
    mixing: Mixing,
    known: Saved,
) -> tuple[jax.Array, Saved, Kept]:
    with jax.named_scope(kind.scope):
        h_MD = rms_norm(x_MD, w["norm_LD"], c.config.norm_eps)
        y_MD, saved, kept = kind.forward(h_MD, rows, w, linears, c, mixing, known)
        saved = {"x": x_MD} | saved | linears.us
        if c.config.post_norms:
            saved["y"] = y_MD
            y_MD = rms_norm(y_MD, w["post_norm_LD"], c.config.norm_eps)
    return x_MD + y_MD, saved if kept is None else saved | {"attention": kept}, kept


def _rounded(saved: Saved, kind: Kind, c: Context) -> Saved:
    """Return what is saved as it is kept: in the matmul type but for what is exact, and what the attention keeps."""
    exact = kind.exact | {"attention"}
    return _row_major({name: a if name in exact else a.astype(c.dtype) for name, a in saved.items()}, c)


def _row_major(saved: Any, c: Context) -> Any:
    """Fix the layout of what is kept: a GPU would lay out the stacks of all layers as the products of one like them.

    They would be copied whole at the end of the forward pass, and before the backward pass. XLA does not split what has
    a fixed layout over a mesh.
    """
    if not c.one_gpu:
        return saved
    return jax.tree.map(lambda s: with_layout_constraint(s, Layout(major_to_minor=tuple(range(s.ndim)))), saved)


def layer_backward(
    dy_BTD: jax.Array,
    kept: Sequence[Saved],
    segments_BT: jax.Array,
    layer: Sequence[Kind],
    ws: Sequence[Weights],
    loras: Sequence[Adapter],
    c: Context,
) -> tuple[jax.Array, list[Mapping[str, Mapping[str, jax.Array]]]]:
    """Return the cotangent of the layer's input and the gradients of each part's adapters.

    Args:
        dy_BTD: float32 cotangent of the residual stream after the layer.
        kept: of each part what `saved_for_backward` names, of all that `layer_forward` saved and, under "attention",
            that the attention kept; the rest is recomputed.
        segments_BT: int32; segment 0 is padding.
        layer, ws, c: as for `layer_forward`.
        loras: the adapters of each part.
    """
    every = _recompute(_row_major(kept, c), segments_BT, layer, ws, loras, c)
    dx_MD, grads = dy_BTD.reshape(-1, c.config.d_model), []
    for kind, w, lora, saved in reversed(list(zip(layer, ws, loras, every, strict=True))):
        linears = Linears(kind, lora, c, us=saved)

        def h(w: Weights = w, saved: Saved = saved) -> jax.Array:
            return rms_norm(saved["x"], w["norm_LD"], c.config.norm_eps)

        with jax.named_scope(kind.scope):
            dy_MD = dx_MD
            if c.config.post_norms:
                dy_MD = rms_norm_backward(saved["y"], w["post_norm_LD"], c.config.norm_eps, dx_MD)
            dh_MD = kind.backward(dy_MD, h, saved, w, linears, c, segments_BT)
            dx_MD += rms_norm_backward(saved["x"], w["norm_LD"], c.config.norm_eps, dh_MD)
        grads.append(linears.adapter_grads())
    return dx_MD.reshape(dy_BTD.shape), grads[::-1]


@jax.named_scope("recompute")
def _recompute(
    kept: Sequence[Saved],
    segments_BT: jax.Array,
    layer: Sequence[Kind],
    ws: Sequence[Weights],
    loras: Sequence[Adapter],
    c: Context,
) -> list[Saved]:
    """Return everything that the backward pass reads; XLA drops the products that it does not read."""
    mixing = mixing_of_rows(segments_BT, c)
    x_MD: Any = None  # a layer begins with a part whose input is kept
    whole = not _needed(layer[0], c) <= set(kept[0])
    every = []
    for kind, w, lora, found in zip(layer, ws, loras, kept, strict=True):
        if _needed(kind, c) <= set(found):
            every.append(found)
            continue
        if "x" in found:
            x_MD = found["x"].astype(jnp.float32)
        linears = Linears(kind, lora, c)
        x_MD, rerun, _ = _part_forward(x_MD, segments_BT.shape, kind, w, linears, c, mixing, found)
        # A whole layer as if it had been kept; of a part alone nothing need be rounded.
        every.append((_rounded(rerun, kind, c) if whole else rerun) | found)
    return every


def mixing_of_rows(segments_BT: jax.Array, c: Context) -> Mixing:
    """Return what mixes tokens in training: causal, within the segments of a row."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, **extras: Unpack[Extras]) -> tuple[jax.Array, Kept]:
        return c.attention.forward(q, k, v, segments_BT, c.dtype, **extras)

    def recur(inputs: Inputs, w: Weights) -> tuple[jax.Array, Kept]:
        return mix_rows(inputs, w, segments_BT, c), None

    return Mixing(attend=attend, recur=recur)
