"""Does every row meet the matrices of its own expert, in both loops, in one round and in several, and none twice?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.kernels.grouped import Groups, Tile, for_tiles, group, in_rounds

E, D = 6, 4


def choices(which: str, M: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if which == "even":
        return np.stack([rng.permutation(E)[:k] for _ in range(M)])
    if which == "one expert":
        return np.full((M, k), 3)
    # Some are for experts of other devices, which have the number E here.
    return np.stack([rng.permutation(E + 3)[:k] for _ in range(M)]).clip(max=E)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("rows", [1000, 16])
@pytest.mark.parametrize("which", ["even", "one expert", "of others too"])
@pytest.mark.parametrize(("M", "k"), [(1, 2), (37, 2), (64, 3)])
def test_rows_are_multiplied_by_their_own_expert(which: str, M: int, k: int, rows: int, on_cpu: bool) -> None:
    rng = np.random.default_rng(1)
    x_MD, w_ED = rng.normal(size=(M, D)).astype(np.float32), rng.normal(size=(E + 1, D)).astype(np.float32)
    w_ED[E] = 0  # what others add is added elsewhere
    weight_Mk, choice_Mk = rng.random((M, k)).astype(np.float32), choices(which, M, k)

    @jax.jit
    def run(x_MD: jax.Array, choice_Mk: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one_round(sums: Any, groups: Groups) -> Any:
            def body(carry: Any, e: jax.Array, w_D: jax.Array, tile: Tile) -> Any:
                y_SD, seen_E = carry
                return tile.put(y_SD, x_MD[tile.token_t] * w_D), seen_E.at[e].add(jnp.sum(tile.own_t))

            cut = lambda e: jnp.asarray(w_ED)[e]  # noqa: E731
            start = jnp.zeros((len(groups.token_S), D)), sums[1]
            y_SD, seen_E = for_tiles(groups, cut, body, start, on_cpu=on_cpu)
            return sums[0] + groups.total(y_SD, jnp.asarray(weight_Mk)), seen_E

        return in_rounds(group(choice_Mk, E), rows, one_round, (jnp.zeros((M, D)), jnp.zeros(E, jnp.int32)))

    y_MD, seen_E = run(jnp.asarray(x_MD), jnp.asarray(choice_Mk, jnp.int32))
    expected = (w_ED[choice_Mk] * x_MD[:, None] * weight_Mk[..., None]).sum(1)
    np.testing.assert_allclose(y_MD, expected, atol=1e-5)
    np.testing.assert_array_equal(seen_E, np.bincount(choice_Mk.ravel(), minlength=E + 1)[:E])
