"""How does an adapter add to a frozen linear layer, forwards and backwards?

y = x W + s (x A) B with s = alpha / rank. A is stored (R, in) and B (R, out...), so that the products of the pair
contract their operands' last axes, or the right one's first: the orientations that keep every backend's fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jax_client.models.layers import contract

Adapter = Mapping[str, Mapping[str, jax.Array]]
# A (n, I), n = R times the modules of a fused layer, and each output's B (R, O).
Pair = tuple[jax.Array, list[jax.Array]]
# parts(y_MO) -> the outputs that are interleaved in the product with a fused W.
Parts = Callable[[jax.Array], list[jax.Array]]

# LoRA's alpha is fixed; only the rank is a user's choice.
LORA_ALPHA = 32.0


def lora_scale(a: jax.Array) -> float:
    """Return alpha / rank of the adapter whose A (R, ...) is given."""
    return LORA_ALPHA / a.shape[0]


def adapter_scale(lora: Adapter) -> float:
    """Return alpha / rank of a layer's adapter; 1 where it has none."""
    return next((lora_scale(module["A"]) for module in lora.values()), 1.0)


@jax.named_scope("lora")
def fused_pair(lora: Adapter, *modules: str) -> Pair:
    """Return the pair of a matmul that computes several modules, with their A's on top of each other."""
    bs_RO = [lora[name]["B"].reshape(len(lora[name]["B"]), -1) for name in modules]
    return jnp.concatenate([lora[name]["A"] for name in modules]), bs_RO


def side_by_side(pairs: Sequence[Pair]) -> Pair:
    """Return one pair with the ranks of several next to each other: where `mix` keeps a row's own, it acts alone."""
    outputs = len(pairs[0][1])
    a_nI = jnp.concatenate([a_nI.reshape(outputs, -1, *a_nI.shape[1:]) for a_nI, _ in pairs], axis=1)
    bs_RO = [jnp.concatenate(list(b_RO)) for b_RO in zip(*(bs_RO for _, bs_RO in pairs), strict=True)]
    return a_nI.reshape(-1, *a_nI.shape[2:]), bs_RO


@jax.named_scope("lora")
def mix(scale_MV: jax.Array, pair: Pair) -> jax.Array:
    """Return what u (M, n) of a `side_by_side` pair is multiplied by: s in the columns of a row's adapter, else 0."""
    (M, V), (a_nI, bs_RO) = scale_MV.shape, pair
    outputs, ranks = len(bs_RO), len(a_nI) // len(bs_RO) // V
    return jnp.broadcast_to(scale_MV[:, None, :, None], (M, outputs, V, ranks)).reshape(M, -1)


def linear(
    x_MI: jax.Array,
    ws_IO: Sequence[jax.Array],
    pair: Pair | None,
    scale: float | jax.Array,
    dtype: jnp.dtype,
    parts: Parts | None = None,
    out: jax.typing.DTypeLike = jnp.float32,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Return x W + s (x A) B of each W, in `out` (M, O), and u (M, n) = s (x A), float32, for `linear_backward`.

    Args:
        scale: s, a number, or (M, n) as `mix` gives it.
        parts: `parts(y_MO) -> outputs` takes the product with a single W apart, into outputs with a B each.
    """
    ys = [contract("MI,IO->MO", x_MI, w_IO, dtype, out) for w_IO in ws_IO]
    if parts is not None:
        ys = parts(*ys)
    if pair is None:
        return ys, None
    a_nI, bs_RO = pair
    with jax.named_scope("lora"):
        u_Mn = contract("MI,nI->Mn", x_MI, a_nI, dtype) * scale
        us_MR = jnp.split(u_Mn, len(bs_RO), axis=1)
        return [y + contract("MR,RO->MO", u, b, dtype, out) for y, u, b in zip(ys, us_MR, bs_RO, strict=True)], u_Mn


def linear_backward(
    dys_MO: Sequence[jax.Array],
    x_MI: jax.Array,
    u_Mn: jax.Array | None,
    ws_IO: Sequence[jax.Array],
    pair: Pair | None,
    scale: float,
    dtype: jnp.dtype,
    *,
    one_cpu: bool,
    whole_MO: jax.Array | None = None,
    out: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, Pair | None]:
    """Return dx (M, I) in `out`, and the gradients of the pair, float32; the frozen W's get none.

    Args:
        dys_MO: float32 cotangents of the outputs.
        x_MI, ws_IO, pair, scale, dtype: as for `linear`.
        u_Mn: as `linear` returned it.
        one_cpu: whether the program runs on one CPU, see `_transposed_copy`.
        whole_MO: the cotangent of the product with a single W, of which `dys_MO` are the parts.
    """
    wholes_MO = dys_MO if whole_MO is None else [whole_MO]
    dx_MI, *others = (contract("MO,IO->MI", dy, w, dtype, out) for dy, w in zip(wholes_MO, ws_IO, strict=True))
    for other_MI in others:
        dx_MI += other_MI
    if pair is None or u_Mn is None:
        return dx_MI, None
    a_nI, bs_RO = pair
    with jax.named_scope("lora"):
        us_RM = jnp.split(_transposed_copy(u_Mn, one_cpu), len(bs_RO))
        dbs_RO = [contract("RM,MO->RO", u, dy, dtype) for u, dy in zip(us_RM, dys_MO, strict=True)]
        dus_MR = [contract("MO,RO->MR", dy, b, dtype) for dy, b in zip(dys_MO, bs_RO, strict=True)]
        du_Mn = jnp.concatenate(dus_MR, axis=1) * scale
        da_nI = contract("nM,MI->nI", _transposed_copy(du_Mn, one_cpu), x_MI, dtype)
        return dx_MI + contract("Mn,nI->MI", du_Mn, a_nI, dtype, out), (da_nI, dbs_RO)


def _transposed_copy(u_Mn: jax.Array, one_cpu: bool) -> jax.Array:
    """Return a transpose that is materialised on one CPU.

    XLA would fold it into the matmul that follows, which then contracts the left operand's first axis: on a CPU that
    is two to three times slower in bfloat16. Not on a mesh: XLA does not split an array with a layout constraint, and
    each device would gather all devices' u. Nor on a GPU, where XLA would transpose the stacks of all layers for it.
    """
    return with_layout_constraint(u_Mn.T, Layout(major_to_minor=(0, 1))) if one_cpu else u_Mn.T
