"""What do the experts of one device compute for the tokens that are sent to them, forwards and backwards?

Experts are split over the "fsdp" and "expert" axes of a mesh, and never gathered: tokens travel. The ways that share
the experts gather their tokens, each computes what its experts add, and the sums go back to the tokens' ways. The
hidden width is split over "tensor".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jax_client.models.kernels.grouped import Groups, Tile, for_tiles, group, in_rounds
from jax_client.models.layers import InStack, contract
from jax_client.models.parts.activations import Activation

Tree = TypeVar("Tree")
Arrays = dict[str, jax.Array]
Sums = list[jax.Array]
# Of x, the weights and u.
Cotangents = tuple[jax.Array, jax.Array, jax.Array | None]
MATRICES = ("experts_gate_LEDF", "experts_up_LEDF", "experts_down_LEFD")
BIASES = ("experts_gate_bias_LEF", "experts_up_bias_LEF", "experts_down_bias_LED")
# Rows for which a device of several has buffers, times those that it gets if experts are equally busy.
ROUND = 2


class Split(NamedTuple):
    """How a mesh splits experts, for a function that runs on each of its devices.

    Attributes:
        ways: mesh axes that split the experts, and the tokens.
        replicas: those that split the tokens alone: each has all experts.
        tensor: those that split the hidden width.
        count: of ways.
    """

    ways: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    count: int = 1

    def gather(self, tree: Tree) -> Tree:
        """Return arrays (M, ...) with the tokens of all ways."""
        if not self.ways:
            return tree
        return jax.tree.map(lambda a: jax.lax.all_gather(a, self.ways, axis=0, tiled=True), tree)

    def scatter(self, tree: Tree) -> Tree:
        """Return, of sums (M, ...) over the experts of each way, those over all of them for this way's tokens."""
        if self.tensor:
            tree = jax.tree.map(lambda a: jax.lax.psum(a, self.tensor), tree)
        if not self.ways:
            return tree
        return jax.tree.map(lambda a: jax.lax.psum_scatter(a, self.ways, scatter_dimension=0, tiled=True), tree)

    def own(self, choice_Mk: jax.Array, experts: int) -> jax.Array:
        """Return choices as numbers of the `experts` that this device has, and `experts` for those of others."""
        if not self.ways:
            return choice_Mk
        local_Mk = choice_Mk - jax.lax.axis_index(self.ways) * experts
        return jnp.where((local_Mk >= 0) & (local_Mk < experts), local_Mk, experts)


class Sent(NamedTuple):
    """Tokens on their way to experts.

    Attributes:
        x_MD: the normed stream in the matmul type.
        choice_Mk, weight_Mk: as the router says.
        u_Mn: of gate and up, side by side, in the matmul type; None without an adapter.
    """

    x_MD: jax.Array
    choice_Mk: jax.Array
    weight_Mk: jax.Array
    u_Mn: jax.Array | None


class Lora(NamedTuple):
    """What an adapter has for each expert: the B's of gate and of up, and the A of down."""

    bs_REF: tuple[jax.Array, jax.Array]
    a_REF: jax.Array


class Owned(NamedTuple):
    """The experts of a device.

    Attributes:
        matrices: under the names of `MATRICES`, (E, D, F) or (E, F, D) each.
        lora: None without an adapter.
        biases: under the names of `BIASES`, (E, F), (E, F) and (E, D), float32; empty for experts without.
    """

    matrices: Mapping[str, InStack]
    lora: Lora | None
    biases: Mapping[str, InStack]

    def cut(self, e: jax.Array) -> Sums:
        """Return the matrices of one expert."""
        return [self.matrices[name].cut(e) for name in MATRICES]

    @property
    def sizes(self) -> tuple[int, int]:
        """E and F."""
        return self.matrices[MATRICES[0]].stack.shape[1], self.matrices[MATRICES[0]].stack.shape[3]


class How(NamedTuple):
    """How a device computes: the matmul type, that of wide results, on a CPU or not, what, and beside which others."""

    dtype: jnp.dtype
    result: jnp.dtype
    on_cpu: bool
    activation: Activation
    split: Split

    def down_bias(self, owned: Owned, e: jax.Array) -> jax.Array | None:
        """Return the bias that this device adds behind an expert's down; None where experts have none."""
        if not owned.biases:
            return None
        bias_D = owned.biases[BIASES[2]].cut(e)
        # Of the devices that split a hidden width one adds it, as their results are summed.
        return jnp.where(jax.lax.axis_index(self.split.tensor) == 0, bias_D, 0) if self.split.tensor else bias_D

    def groups(self, sent: Sent, owned: Owned) -> tuple[Groups, int]:
        """Return the rows by expert of this device, and of how many a round is."""
        groups = group(self.split.own(sent.choice_Mk, owned.sizes[0]), owned.sizes[0])
        return groups, rows_of_round(groups.rows, self.split.count)


def rows_of_round(rows: int, ways: int) -> int:
    """Return how many of all rows a device has buffers for, where `ways` devices split the experts."""
    return -(-rows * min(ROUND, ways) // ways)


def forward(sent: Sent, owned: Owned, how: How) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, ...]]:
    """Return what the experts add to this way's tokens.

    Returns:
        y_MD, float32, without the adapter of down; the weighted sum of a A (M, R) of that, None without; and gate and
        up (S, F) by row, where this device has all experts, in the matmul type.
    """
    sent = how.split.gather(sent)
    groups, rows = how.groups(sent, owned)
    (M, D), (_, F), dtype = sent.x_MD.shape, owned.sizes, how.dtype

    def one_round(sums: tuple[Sums, Sums], groups: Groups) -> tuple[Sums, Sums]:
        def tile(buffers: Arrays, e: jax.Array, matrices: Sums, tile: Tile) -> Arrays:
            gate_tF, up_tF = _gate_up(sent, owned, e, matrices, tile, dtype)
            a_tF, bias_D = how.activation.forward(gate_tF, up_tF), how.down_bias(owned, e)
            new = {"y": contract("tF,FD->tD", a_tF, matrices[2], dtype, how.result)}
            if bias_D is not None:
                new["y"] += bias_D
            if owned.lora is not None:
                new["a"] = contract("tF,RF->tR", a_tF, _of_expert(owned.lora.a_REF, e), dtype)
            if "gate" in buffers:
                new |= {"gate": gate_tF, "up": up_tF}
            return {name: tile.put(old, new[name]) for name, old in buffers.items()}

        S = len(groups.token_S)
        buffers = {"y": jnp.zeros((S, D), how.result)}
        if owned.lora is not None:
            buffers["a"] = jnp.zeros((S, len(owned.lora.a_REF)))
        if how.split.count == 1:
            buffers |= {name: jnp.zeros((S, F), dtype) for name in ("gate", "up")}
        buffers = for_tiles(groups, owned.cut, tile, buffers, on_cpu=how.on_cpu)
        new = [groups.total(buffers[name], sent.weight_Mk) for name in ("y", "a") if name in buffers]
        kept = [buffers[name] for name in ("gate", "up") if name in buffers]
        return [old + one for old, one in zip(sums[0], new, strict=True)], kept

    start = [jnp.zeros((M, D))] + ([] if owned.lora is None else [jnp.zeros((M, len(owned.lora.a_REF)))])
    sums, kept = in_rounds(groups, rows, one_round, (start, []))
    y_MD, *a_MR = how.split.scatter(sums)
    return y_MD, a_MR[0] if a_MR else None, tuple(kept)


def backward(
    sent: Sent,
    owned: Owned,
    dy_MD: jax.Array,
    db_MR: jax.Array | None,
    kept: tuple[jax.Array, ...],
    how: How,
) -> tuple[jax.Array, jax.Array, jax.Array | None, tuple[jax.Array, ...]]:
    """Return the cotangents of what the experts were given, for that of y.

    Args:
        sent, owned, how: as for `forward`.
        dy_MD: in the matmul type.
        db_MR: float32, dy B^T of down times the scale; None without an adapter.
        kept: gate and up, as `forward` returned them; computed again where they are not.

    Returns:
        dx_MD without the adapter; dweight_Mk; du_Mn of gate and up, unscaled; and the gradients of the B's of gate and
        up and of the A of down, of this device's experts. Float32; the last two are None and empty without an adapter.
    """
    sent, dy_MD, db_MR = how.split.gather((sent, dy_MD, db_MR))
    groups, rows = how.groups(sent, owned)
    (M, D), dtype = sent.x_MD.shape, how.dtype
    lora, u_Mn = owned.lora, sent.u_Mn

    def one_round(sums: tuple[Cotangents, Sums], groups: Groups) -> tuple[Cotangents, Sums]:
        weight_S = groups.sort(sent.weight_Mk)

        def tile(carry: tuple[Arrays, Sums], e: jax.Array, matrices: Sums, tile: Tile) -> tuple[Arrays, Sums]:
            buffers, grads = carry
            if kept:
                gate_tF, up_tF = (tile.rows(a) for a in kept)
            else:
                gate_tF, up_tF = _gate_up(sent, owned, e, matrices, tile, dtype)
            da_tF = contract("tD,FD->tF", dy_MD[tile.token_t], matrices[2], dtype)
            if lora is not None and db_MR is not None:
                da_tF += contract("tR,RF->tF", db_MR[tile.token_t], _of_expert(lora.a_REF, e), dtype)
            a_tF, bias_D = how.activation.forward(gate_tF, up_tF), how.down_bias(owned, e)
            new = {"weight": jnp.sum(a_tF * da_tF, axis=-1)}
            if bias_D is not None:
                new["weight"] += jnp.sum(dy_MD[tile.token_t].astype(jnp.float32) * bias_D, axis=-1)
            # Rows of others get no cotangent: they are in the tile, but not in the sums over it.
            weight_t1 = jnp.where(tile.own_t, tile.rows(weight_S), 0.0)[:, None]
            ds_tF = how.activation.backward(da_tF * weight_t1, gate_tF, up_tF)[1:]
            into_tD = [
                contract("tF,DF->tD", d_tF, matrix, dtype, how.result)
                for d_tF, matrix in zip(ds_tF, matrices[:2], strict=True)
            ]
            new["x"] = into_tD[0] + into_tD[1]
            if lora is not None and u_Mn is not None and db_MR is not None:
                us_tR = jnp.split(u_Mn[tile.token_t], 2, axis=1)
                both = list(zip(us_tR, ds_tF, lora.bs_REF, strict=True))
                du_tR = [contract("tF,RF->tR", d_tF, _of_expert(b, e), dtype) for _, d_tF, b in both]
                new["u"] = jnp.concatenate(du_tR, axis=1)
                of_expert = [contract("tR,tF->RF", u_tR, d_tF, dtype) for u_tR, d_tF, _ in both]
                of_expert.append(contract("tR,tF->RF", db_MR[tile.token_t] * weight_t1, a_tF, dtype))
                grads = [tile.add(total, e, one) for total, one in zip(grads, of_expert, strict=True)]
            return {name: tile.put(old, new[name]) for name, old in buffers.items()}, grads

        (dx_MD, dweight_Mk, du_Mn), grads = sums
        S = len(groups.token_S)
        buffers = {"x": jnp.zeros((S, D), how.result), "weight": jnp.zeros(S)}
        if u_Mn is not None:
            buffers["u"] = jnp.zeros((S, u_Mn.shape[1]))
        buffers, grads = for_tiles(groups, owned.cut, tile, (buffers, grads), on_cpu=how.on_cpu)
        if du_Mn is not None:
            du_Mn += groups.total(buffers["u"])
        return (dx_MD + groups.total(buffers["x"]), dweight_Mk + groups.by_choice(buffers["weight"]), du_Mn), grads

    nothing = jnp.zeros((M, D)), jnp.zeros(sent.weight_Mk.shape), None if u_Mn is None else jnp.zeros(u_Mn.shape)
    grads = [] if lora is None else [jnp.zeros(a.shape) for a in (*lora.bs_REF, lora.a_REF)]
    sums, grads = in_rounds(groups, rows, one_round, (nothing, grads))
    if how.split.replicas:
        grads = jax.tree.map(lambda g: jax.lax.psum(g, how.split.replicas), grads)
    return (*how.split.scatter(sums), tuple(grads))


def _gate_up(
    sent: Sent, owned: Owned, e: jax.Array, matrices: list[jax.Array], tile: Tile, dtype: jnp.dtype
) -> list[jax.Array]:
    """Return gate and up of a tile's rows, float32."""
    x_tD = sent.x_MD[tile.token_t]
    both = [contract("tD,DF->tF", x_tD, matrix, dtype) for matrix in matrices[:2]]
    if owned.biases:
        both = [y + owned.biases[name].cut(e) for name, y in zip(BIASES[:2], both, strict=True)]
    if owned.lora is None or sent.u_Mn is None:
        return both
    us_tR = jnp.split(sent.u_Mn[tile.token_t], 2, axis=1)
    bs_RF = [_of_expert(b, e) for b in owned.lora.bs_REF]
    return [y + contract("tR,RF->tF", u, b, dtype) for y, u, b in zip(both, us_tR, bs_RF, strict=True)]


def _of_expert(array_REF: jax.Array, e: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array_REF, e, 1, keepdims=False)
