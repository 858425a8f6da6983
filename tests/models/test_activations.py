"""Are the gated activations what torch computes, and do their backward passes equal automatic differentiation?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.models.parts.activations import Activation, clamped_swiglu, geglu, swiglu

ACTIVATIONS = [swiglu(), clamped_swiglu(), clamped_swiglu(limit=2.0, alpha=1.0), geglu()]
BY_NAME: dict[str, Any] = {"argvalues": ACTIVATIONS, "ids": [f"{a.name}-{i}" for i, a in enumerate(ACTIVATIONS)]}


def operands(scale: float) -> tuple[jax.Array, ...]:
    """Return gate, up and a cotangent; at a scale of 6 some values lie beyond every limit."""
    draw = np.random.default_rng(0).standard_normal
    return tuple(jnp.asarray(draw((3, 401)) * scale, jnp.float32) for _ in range(3))


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("activation", **BY_NAME)
def test_backward_equals_autodiff(activation: Activation, scale: float) -> None:
    gate, up, da = operands(scale)
    a, pull = jax.vjp(activation.forward, gate, up)
    again, *cotangents = activation.backward(da, gate, up)
    np.testing.assert_allclose(again, a, rtol=1e-5, atol=1e-6)
    for mine, right in zip(cotangents, pull(da), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("activation", **BY_NAME)
def test_what_is_kept_in_bfloat16_is_computed_in_float32(activation: Activation) -> None:
    gate, up, da = (x.astype(jnp.bfloat16) for x in operands(3.0))
    wide = [x.astype(jnp.float32) for x in (gate, up, da)]
    np.testing.assert_array_equal(activation.forward(gate, up), activation.forward(*wide[:2]))
    for mine, right in zip(activation.backward(da, gate, up), activation.backward(wide[2], *wide[:2]), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, right)


def test_clamped_values_have_no_gradient_and_those_at_the_limit_have() -> None:
    gate, up = jnp.asarray([7.0, 7.5, -20.0, 1.0, 1.0, 1.0]), jnp.asarray([1.0, 1.0, 1.0, 7.0, 7.5, -7.5])
    _, dgate, dup = clamped_swiglu().backward(jnp.ones(6), gate, up)
    assert (np.asarray(dgate) != 0).tolist() == [True, False, True, True, True, True]
    assert (np.asarray(dup) != 0).tolist() == [True, True, True, True, False, False]


@pytest.mark.torch
def test_activations_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    gate, up, _ = (torch.tensor(np.asarray(x)) for x in operands(6.0))
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
    theirs = {
        "swiglu": torch.nn.functional.silu(gate) * up,
        "geglu": torch.nn.functional.gelu(gate, approximate="tanh") * up,
        "clamped swiglu": experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2)),
    }
    for activation in (swiglu(), geglu(), clamped_swiglu()):
        mine = activation.forward(jnp.asarray(gate.numpy()), jnp.asarray(up.numpy()))
        np.testing.assert_allclose(mine, theirs[activation.name].detach().numpy(), rtol=1e-5, atol=1e-5)
