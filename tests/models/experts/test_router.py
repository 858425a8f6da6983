"""Does the router choose the lower of equal experts, and is its backward pass that of its forward pass?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.parts.mixture.router import route, route_backward

M, D, E, K = 7, 5, 6, 3


def test_of_equal_experts_the_lower_ones_are_chosen() -> None:
    router_DE = jnp.zeros((D, E)).at[:, 2].set(1.0)
    choice_Mk, weight_Mk = route(jnp.ones((M, D)), router_DE, K, normalized=True)
    np.testing.assert_array_equal(choice_Mk, [[2, 0, 1]] * M)
    np.testing.assert_array_equal(weight_Mk[:, 1], weight_Mk[:, 2])
    np.testing.assert_allclose(weight_Mk.sum(-1), 1.0, rtol=1e-6)


def test_a_difference_of_one_bit_decides() -> None:
    """The product is of full precision: bfloat16 would round both logits to one number."""
    larger = np.nextafter(np.float32(1), np.float32(2))
    for best in (1, 4):
        router_DE = np.full((1, E), -5, np.float32)
        router_DE[0, [1, 4]] = 1
        router_DE[0, best] = larger
        choice_Mk, _ = route(jnp.full((1, 1), 8.0), jnp.asarray(router_DE), 1, normalized=True)
        assert int(choice_Mk[0, 0]) == best


@pytest.mark.parametrize("normalized", [True, False])
def test_backward_is_the_transpose_of_forward(normalized: bool) -> None:
    rng = np.random.default_rng(0)
    h_MD, router_DE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((M, D), (D, E)))
    dweight_Mk = jnp.asarray(rng.normal(size=(M, K)), jnp.float32)
    choice_Mk, weight_Mk = route(h_MD, router_DE, K, normalized=normalized)
    _, pullback = jax.vjp(lambda h: route(h, router_DE, K, normalized=normalized)[1], h_MD)
    ours = route_backward(dweight_Mk, h_MD, choice_Mk, weight_Mk, router_DE, normalized=normalized)
    np.testing.assert_allclose(ours, pullback(dweight_Mk)[0], atol=2e-6)
