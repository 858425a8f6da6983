"""Are positions rotated as transformers rotates them, for every scaling, by layer type, and in part of a head?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope, YarnScaling, config_from_fields
from jax_client.models.families.hf_config import read_rope
from jax_client.models.families.registry import config_from_hf
from jax_client.models.rope import frequencies, rope_table, rotate
from support.weights.loading import config

WHERE = "config.json"
ORIGINAL = {"original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
GPT_OSS = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "rope_theta": 150000.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "qwen3 releases": YARN | {"original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "yarn without truncation": YARN | {"truncate": False},
    "gpt-oss": GPT_OSS,
    "deepseek": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "two mscales": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "one mscale": YARN | {"mscale": 0.707},
    "yarn with a factor of its own": YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn whose ends meet": YARN | {"beta_fast": 1.0001, "beta_slow": 1.0, "truncate": False, "rope_theta": 3.0},
}


def model(rope: Rope, head_dim: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=64, d_model=32, d_ff=48, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=head_dim,
        norm_eps=1e-5, rope_theta=rope.theta, rope_scaling=rope.scaling, rope_dim=rope.dim, tied_embeddings=True,
        max_context=256,
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("part", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("keys", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers(keys: dict[str, Any], part: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    H = 64
    rope_keys = {"rope_theta": 10000.0, **keys} | ({} if part == 1 else {"partial_rotary_factor": part})
    theirs = transformers.LlamaConfig(
        hidden_size=4 * H, num_attention_heads=4, head_dim=H, max_position_embeddings=256, rope_parameters=rope_keys
    )
    kind = keys["rope_type"]
    if kind == "default":
        dim = int(H * part)
        inverse, factor = 1e4 ** (-np.arange(0, dim, 2) / dim), 1.0
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](theirs)
        inverse = inverse.numpy()
    old = {"rope_theta": rope_keys["rope_theta"], "rope_scaling": {"type": kind} | keys}
    old["rope_scaling"].pop("rope_type")
    for form in ({"rope_parameters": rope_keys}, old | {"partial_rotary_factor": part}):
        hf = config(head_dim=H) | form
        if "rope_parameters" in form:
            del hf["rope_theta"]
        rope = read_rope(hf, WHERE)
        assert rope.dim == (None if part == 1 else H * part)
        np.testing.assert_allclose(frequencies(rope, H), inverse, rtol=1e-6)
        positions = np.array([[0, 1]])
        cos, sin = rope_table(jnp.asarray(positions), model(rope, H))
        angle = positions[..., None] * inverse.astype(np.float64)
        np.testing.assert_allclose(cos, np.cos(angle) * factor, atol=1.5e-6)
        np.testing.assert_allclose(sin, np.sin(angle) * factor, atol=1.5e-6)
        assert rope_table(jnp.zeros((1, 1), jnp.int32), model(rope, H))[0].max() == np.float32(factor)


@pytest.mark.torch
def test_each_layer_type_of_gemma_3_has_its_own_table() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    H = 16
    new = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    theirs = Gemma3RotaryEmbedding(
        transformers.Gemma3TextConfig(hidden_size=64, num_attention_heads=4, head_dim=H, rope_parameters=new)
    )
    positions = np.arange(48)[None]
    plain = model(Rope(theta=1e4), H)
    for layer_type in new:
        with torch.no_grad():
            expected = theirs(torch.zeros(1, 48, H), torch.tensor(positions), layer_type=layer_type)
        for form in ({"rope_parameters": new}, old):
            rope = read_rope({"num_attention_heads": 4, "head_dim": H, **form}, WHERE, layer_type)
            for mine, right in zip(rope_table(jnp.asarray(positions), plain, rope), expected, strict=True):
                np.testing.assert_allclose(mine, right.numpy()[..., : H // 2], atol=1e-5)
    with pytest.raises(UnsupportedError, match=r"by layer type \(full_attention, sliding_attention\)"):
        read_rope({"num_attention_heads": 4, "head_dim": H, "rope_parameters": new}, WHERE)


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                         original_context=16)])  # fmt: skip
def test_the_usual_tables_keep_their_bits(scaling: Llama3Scaling | None) -> None:
    """The expressions stood here alone before the other scalings came."""
    theta, half = 5e5, 32
    positions = jnp.arange(300)[None] * 401

    @jax.jit
    def before(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if scaling is not None:
            turns = scaling.original_context * freq / (2 * jnp.pi)
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            smooth = jnp.clip(smooth, 0.0, 1.0)
            freq = freq * (smooth + (1 - smooth) / scaling.factor)
        angle = positions[..., None].astype(jnp.float32) * freq
        return jnp.cos(angle), jnp.sin(angle)

    now = jax.jit(lambda positions: rope_table(positions, model(Rope(theta=theta, scaling=scaling), 2 * half)))
    for mine, right in zip(now(positions), before(positions), strict=True):
        np.testing.assert_array_equal(mine, right)


def test_a_part_of_a_head_rotates_and_the_rest_passes() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    positions = jnp.arange(10).reshape(2, 5)
    table = rope_table(positions, model(Rope(theta=1e4, dim=4), 16))
    assert table[0].shape == (2, 5, 2)
    whole = rotate(x[..., :4], *rope_table(positions, model(Rope(theta=1e4), 4)))
    np.testing.assert_array_equal(rotate(x, *table), jnp.concatenate([whole, x[..., 4:]], axis=-1))
    back = jax.vjp(lambda x: rotate(x, *table), x)[1](x)[0]
    np.testing.assert_allclose(back, rotate(x, table[0], -table[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "'yarn' needs the key 'original_max_position_embeddings'"),
        ({"rope_type": "yarn", **ORIGINAL}, "'yarn' needs the key 'factor'"),
        ({"rope_type": "linear"}, "'linear' needs the key 'factor'"),
        ({"type": "linear", "factor": 0.5}, "factor of the rotary positions is 0.5; it must be 1 or more"),
        ({"type": "linear", "factor": "8"}, "factor of the rotary positions is '8'"),
        (YARN | {"beta_fast": 1.0}, "beta_fast 1 of the rope type 'yarn' must be above beta_slow 1"),
        (YARN | {"truncate": 1}, "truncate of the rotary positions is 1; it must be true or false"),
        (YARN | {"attention_factor": 0.0}, "attention_factor of the rotary positions is 0.0"),
        (YARN | {"rope_theta": 1.0}, "rope_theta of the rotary positions is 1.0; it must be 2 or more"),
        (LLAMA3 | {"high_freq_factor": 0.5}, "high_freq_factor 0.5 of .* must be above low_freq_factor 1"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor 2.0 makes 32 of 16 values"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor 0.01 makes 0 of 16 values"),
    ],
)
def test_what_cannot_be_is_named(rope: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_rope(config() | {"rope_parameters": rope}, WHERE)


@pytest.mark.parametrize("form", ["beside", "within"])
def test_families_that_rotate_whole_heads_refuse_a_part(form: str) -> None:
    part = {"partial_rotary_factor": 0.5}
    hf = config() | (part if form == "beside" else {"rope_parameters": {"rope_type": "default", **part}})
    with pytest.raises(UnsupportedError, match="partial_rotary_factor makes 8 of 16 values of a head rotate"):
        config_from_hf(hf, WHERE)


def test_a_model_with_a_scaling_comes_back_from_its_fields() -> None:
    for scaling in (
        LinearScaling(factor=2.0),
        YarnScaling(factor=4.0, original_context=64, attention_factor=1.1),
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16),
    ):
        whole = model(Rope(theta=1e4, scaling=scaling), 16)
        assert config_from_fields(json.loads(json.dumps(asdict(whole)))) == whole
