"""Is the hand-written backward pass of a mixture of experts that of its forward pass, and does its memory know no E?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.config import Experts, ModelConfig, SwigluClamp
from jax_client.models.decoder import param_specs
from jax_client.models.lora_arrays import lora_arrays
from jax_client.models.parts.activations import activation_of
from jax_client.models.parts.attention import blockwise
from jax_client.models.parts.kind import Remat
from jax_client.models.specs import LoraArray, ParamSpec
from jax_client.models.transformer import backward_pass, context, forward_pass
from jax_client.values import LoraSpec
from support.models.plain_attention import PLAIN

F32 = jnp.dtype("float32")


def model(
    E: int,
    k: int = 2,
    *,
    dense_layers: tuple[int, ...] = (),
    normalized: bool = True,
    biased: bool = False,
    shared: int | None = None,
) -> ModelConfig:
    return ModelConfig(
        family="qwen3_moe", vocab_size=32, d_model=16, d_ff=24, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=8,
        norm_eps=1e-5, rope_theta=1e4, tied_embeddings=True, max_context=64, qk_norm=True,
        experts=Experts(
            count=E, per_token=k, d_ff=12, normalized=normalized, biased=biased, dense_layers=dense_layers,
            shared_d_ff=shared,
        ),
        clamp=SwigluClamp(limit=1.0, alpha=1.5) if biased else None,
    )  # fmt: skip


def arrays(c: ModelConfig) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, F32)  # noqa: E731
    params = jax.tree.map(draw, param_specs(c, F32), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    every = lora_arrays(c, LoraSpec(rank=2, seed=0))["layers"]
    return params, jax.tree.map(draw, every, is_leaf=lambda leaf: isinstance(leaf, LoraArray))


MODELS = [
    ((), True, False, None),
    ((0, 2, 4), False, False, None),
    ((), False, True, None),
    ((0, 2, 4), True, False, 20),
]
# Each model with one way to save memory, and each way with a model; all of both with --full.
FEW = [(0, "none"), (1, "full"), (2, "selective"), (3, "selective")]


@pytest.mark.parametrize(
    ("dense_layers", "normalized", "biased", "shared", "remat"),
    [
        pytest.param(*parts, remat, marks=() if (i, remat) in FEW else pytest.mark.full)
        for i, parts in enumerate(MODELS)
        for remat in ("none", "selective", "full")
    ],
)
def test_backward_is_that_of_the_forward_pass(
    dense_layers: tuple[int, ...], normalized: bool, biased: bool, shared: int | None, remat: Remat
) -> None:
    """Layers that are scanned, and such that are cut out of their stacks: with and without dense ones between."""
    config = model(6, dense_layers=dense_layers, normalized=normalized, biased=biased, shared=shared)
    params, lora = arrays(config)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 32, (2, 20)), jnp.int32)
    segments = jnp.asarray([[1] * 7 + [2] * 9 + [0] * 4, [1] * 20])
    positions = jnp.asarray([list(range(7)) + list(range(9)) + [0] * 4, list(range(20))])
    g = jnp.asarray(rng.normal(size=(2, 20, 16)), F32)

    def plain(lora: Any) -> jax.Array:
        return _reference(params, lora, tokens, segments, positions, config)

    @jax.jit
    def ours(lora: Any) -> Any:
        c = context(positions, config, F32, blockwise(one_cpu=True), on_cpu=True)
        h, saved = forward_pass(params, lora, tokens, segments, c, remat)
        return h, backward_pass(params, lora, segments, saved, g, c, jax.tree.map(jnp.zeros_like, lora))

    (h, grads), (expected_h, pullback) = ours(lora), jax.vjp(jax.jit(plain), lora)
    np.testing.assert_allclose(h, expected_h, rtol=1e-5, atol=2e-5)
    expected = pullback(g)[0]
    for module, pair in grads.items():
        for ab, grad in pair.items():
            error = jnp.linalg.norm(grad - expected[module][ab]) / jnp.linalg.norm(expected[module][ab])
            assert error < 1e-4, (module, ab, error)


def _reference(
    params: Any, lora: Any, tokens: jax.Array, segments: jax.Array, positions: jax.Array, config: ModelConfig
) -> jax.Array:
    """Compute every expert for every token, and attention and dense layers by the package's forward pass."""
    from jax_client.models.layers import rms_norm
    from jax_client.models.parts.block import layer_forward, mixing_of_rows
    from jax_client.models.parts.linears import Linears
    from jax_client.models.parts.mixture.moe import MOE
    from jax_client.models.plan import layers

    c = context(positions, config, F32, PLAIN)
    x, used = params["embed_VD"][tokens], {"attention": 0, "dense": 0, "moe": 0}
    experts = config.experts
    assert experts is not None
    for layer in layers(config):
        for kind in layer.kinds:
            i = used[kind.name]
            used[kind.name] += 1
            w = {name: a[i] for name, a in params["layers"][kind.name].items()}
            own = {m: {ab: a[i] for ab, a in lora[m].items()} for m in kind.modules(config, 2)}
            if kind is not MOE:
                x, _, _ = layer_forward(x, [kind], [w], [Linears(kind, own, c)], c, mixing_of_rows(segments, c))
                continue
            h = rms_norm(x, w["norm_LD"], config.norm_eps)
            add = lambda m, own=own: 16 * jnp.einsum("rd,ref->edf", own[m]["A"], own[m]["B"])  # noqa: E731
            gate = jnp.einsum("btd,edf->btef", h, w["experts_gate_LEDF"] + add("experts_gate"))
            up = jnp.einsum("btd,edf->btef", h, w["experts_up_LEDF"] + add("experts_up"))
            down = 16 * jnp.einsum("ref,rd->efd", own["experts_down"]["A"], own["experts_down"]["B"])
            logits = h @ w["router_LDE"]
            if experts.biased:
                gate, up = gate + w["experts_gate_bias_LEF"], up + w["experts_up_bias_LEF"]
                logits += w["router_bias_LE"]
            y = jnp.einsum("btef,efd->bted", activation_of(config).forward(gate, up), w["experts_down_LEFD"] + down)
            y += w["experts_down_bias_LED"] if experts.biased else 0
            probability = jax.nn.softmax(logits)
            best, which = jax.lax.top_k(probability, experts.per_token)
            best = best / best.sum(-1, keepdims=True) if experts.normalized else best
            x += jnp.einsum("btk,btkd->btd", best, jnp.take_along_axis(y, which[..., None], 2))
            if experts.shared_d_ff is not None:
                plus = lambda name, own=own: 16 * own[f"shared_{name}"]["A"].T @ own[f"shared_{name}"]["B"]  # noqa: E731
                both = [h @ (w["shared_gate_up_L2DF"][i] + plus(name)) for i, name in enumerate(("gate", "up"))]
                y = activation_of(config).forward(*both) @ (w["shared_down_LFD"] + plus("down"))
                x += jax.nn.sigmoid(h @ w["shared_share_LD"])[..., None] * y
    return rms_norm(x, params["final_norm_D"], config.norm_eps)


def test_temporaries_do_not_grow_with_the_number_of_experts() -> None:
    """With 16 times the experts, what a pass has beside its arguments and results grows by their gradients at most."""
    tokens = jax.ShapeDtypeStruct((1, 512), np.int32)
    sizes = []
    for E in (8, 128):
        config = model(E)
        params, lora = arrays(config)

        def both(params: Any, lora: Any, tokens: jax.Array, c: ModelConfig = config) -> Any:
            at = context(jnp.arange(512)[None], c, F32, blockwise(one_cpu=True), on_cpu=True)
            h, saved = forward_pass(params, lora, tokens, jnp.ones_like(tokens), at, "none")
            zeros = jax.tree.map(jnp.zeros_like, lora)
            return backward_pass(params, lora, jnp.ones_like(tokens), saved, h, at, zeros)

        analysis = jax.jit(both).lower(params, lora, tokens).compile().memory_analysis()
        assert analysis is not None
        sizes.append(analysis.temp_size_in_bytes)
    gradients = 4 * 2 * (3 * 128 * 12 * 5)  # of all layers' experts, float32
    assert sizes[1] < 1.1 * sizes[0] + 2 * gradients, sizes
