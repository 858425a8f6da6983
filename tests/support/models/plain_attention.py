"""How does attention look that autodiff can take the derivative of? A masked softmax over all pairs."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jax_client.models.parts import attention
from jax_client.models.parts.attention import Extras


def plain_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: Any, **extras: Unpack[Extras]
) -> tuple[jax.Array, Any]:
    """Masked softmax over all pairs, which autodiff can take the derivative of."""
    (B, T, K, G, H), place = q.shape, jnp.arange(q.shape[1])
    seen = (segments[:, :, None] == segments[:, None]) & (place[:, None] >= place)
    if (window := extras.get("window")) is not None:
        seen &= place[:, None] - window < place
    s = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * (extras.get("scale") or H**-0.5)
    s = jnp.where(seen[:, None, None], s, -1e30)
    if (sinks := extras.get("sinks")) is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[..., None, None], (B, K, G, T, 1))], axis=-1)
    p = jax.nn.softmax(s, axis=-1)[..., :T]
    return jnp.einsum("BKGTS,BSKH->BTKGH", p, v), ()


PLAIN = attention.Attention(
    name="plain",
    forward=plain_attention,
    backward=lambda *_: (_ for _ in ()).throw(AssertionError),
    row_length=None,
)
