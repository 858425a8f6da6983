"""What is the gated delta rule, token by token? The reference of all tests of its chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.models.kernels.delta import Tokens, delta_step


@jax.jit
def by_token(tokens: Tokens, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Run the rule token by token; a new segment begins with an empty state."""
    B, _, P, X = tokens.k_BTPX.shape
    empty = jnp.zeros((B, P, X, tokens.v_BTPY.shape[-1]), tokens.k_BTPX.dtype)
    begins = jnp.concatenate([segments[:, :1] < 0, segments[:, 1:] != segments[:, :-1]], 1)

    def step(state: jax.Array, at: tuple[Tokens, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, begins = at
        state = jnp.where(begins[:, None, None, None], empty, state)
        o, state = delta_step(Tokens(*(a[:, None] for a in token)), state)
        return state, o[:, 0]

    state, o = jax.lax.scan(step, empty, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (tokens, begins)))
    return jnp.moveaxis(o, 0, 1), state
