"""Do the hand-written backward passes equal automatic differentiation of the forward passes?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.losses import logprob_head
from jax_client.models import attention
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import param_specs
from jax_client.models.transformer import backward_pass, context, forward_pass

F32 = jnp.dtype("float32")


def tiny(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "family": "llama", "vocab_size": 61, "d_model": 16, "d_ff": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 8, "norm_eps": 1e-5, "rope_theta": 1e4, "tied_embeddings": True, "max_context": 64,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def random_tree(specs: Any, seed: int, scale: float = 0.3) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * scale, s.dtype), specs)


def random_lora(c: ModelConfig, rank: int, seed: int) -> dict[str, Any]:
    L, D, F, K, G, H, R = c.n_layers, c.d_model, c.d_ff, c.n_kv_heads, c.group, c.head_dim, rank
    shapes = {
        "q": ((R, D), (R, K, G, H)), "k": ((R, D), (R, K, H)), "v": ((R, D), (R, K, H)), "o": ((R, K, G, H), (R, D)),
        "gate": ((R, D), (R, F)), "up": ((R, D), (R, F)), "down": ((R, F), (R, D)),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    return {n: {"A": jnp.asarray(rng.normal(size=(L, *a)) * 0.3, F32), "B": jnp.asarray(rng.normal(size=(L, *b)) * 0.3, F32)} for n, (a, b) in shapes.items()}  # fmt: skip # noqa: E501


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("changes", [{}, {"family": "qwen2", "qkv_bias": True}, {"family": "qwen3", "qk_norm": True}])
def test_layers_backward(changes: dict[str, Any], remat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    config = tiny(**changes)
    params, lora = random_tree(param_specs(config, F32), 0), random_lora(config, 3, 1)
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 61, (2, 20)))
    segments = jnp.asarray([[1] * 7 + [2] * 9 + [0] * 4, [1] * 20])
    c = context(jnp.asarray([list(range(7)) + list(range(9)) + [0] * 4, list(range(20))]), config, F32)
    g = jnp.asarray(rng.normal(size=(2, 20, 16)), F32)
    forward = lambda lora, remat: forward_pass(params, lora, tokens, segments, c, remat)  # noqa: E731
    expected_h, pullback = jax.vjp(lambda lora: forward(lora, None)[0], lora)
    h, saved = forward(lora, remat)
    np.testing.assert_allclose(h, expected_h, rtol=1e-5, atol=1e-5)
    grads = backward_pass(params, lora, segments, saved, g, c, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), grads, pullback(g)[0])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("targets_per_position", [1, 3])
def test_head(shards: int, with_lora: bool, targets_per_position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_head, "VOCAB_BLOCK", 12)
    rng = np.random.default_rng(3)
    h, w = jnp.asarray(rng.normal(size=(10, 8)), F32), jnp.asarray(rng.normal(size=(62, 8)), F32)
    lora = {"A": jnp.asarray(rng.normal(size=(4, 8)), F32), "B": jnp.asarray(rng.normal(size=(4, 62)), F32)}
    lora = lora if with_lora else {}
    targets = jnp.asarray(rng.integers(0, 62, (10, targets_per_position)))
    g = jnp.asarray(rng.normal(size=targets.shape), F32)

    def plain(h: jax.Array, lora: Any) -> jax.Array:
        logits = h @ w.T + ((h @ lora["A"].T) @ lora["B"] * 32 / 4 if lora else 0)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)

    expected, pullback = jax.vjp(plain, h, lora)
    options: dict[str, Any] = {"dtype": F32, "shards": shards}
    logprobs, saved = logprob_head.head_forward(h, w, lora, targets, with_backward=True, **options)
    dh, grads = logprob_head.head_backward(saved, w, lora, targets, g, **options)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-4, atol=1e-4)
    expected_dh, expected_grads = pullback(g)
    np.testing.assert_allclose(dh, expected_dh, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), grads, dict(expected_grads))
