"""Do a model's files arrive on the mesh unchanged?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_client.models.decoder import param_specs
from jax_client.weights.read.gguf import GgufReader, read_gguf
from jax_client.weights.read.identity import fingerprint
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import EMBEDDED_MODEL, known_models, resolve
from support.meshes.devices import with_devices
from support.weight_files import FAMILIES, hf_tensors, write_gguf, write_hf
from support.weights.loading import config, load, one_device

pytestmark = pytest.mark.usefixtures("empty_hub_cache")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_shards", [1, 3])
def test_every_tensor_reaches_its_place(family: str, n_shards: int, tmp_path: Path) -> None:
    c = config(family)
    t = hf_tensors(c)
    path = write_hf(tmp_path / "m", c, t, n_shards)
    params, found = load(path), read_config(resolve(str(path)))
    specs = param_specs(found, np.dtype("float32"))
    jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype) or pytest.fail(str(s)), params, specs)
    K, G, H = found.n_kv_heads, found.group, found.head_dim
    layers = params["layers"]["attention"] | params["layers"]["dense"]
    qkv_LDKJH = layers["qkv_LDO"].reshape(found.n_layers, found.d_model, K, G + 2, H)
    for i in range(found.n_layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for k in range(K):
            rows = slice(k * H, k * H + H)
            np.testing.assert_array_equal(qkv_LDKJH[i, :, k, G], t[attn + "k_proj.weight"][rows].T)
            np.testing.assert_array_equal(qkv_LDKJH[i, :, k, G + 1], t[attn + "v_proj.weight"][rows].T)
            for g in range(G):
                rows = slice((k * G + g) * H, (k * G + g + 1) * H)
                np.testing.assert_array_equal(qkv_LDKJH[i, :, k, g], t[attn + "q_proj.weight"][rows].T)
                np.testing.assert_array_equal(layers["o_LKGHD"][i, k, g], t[attn + "o_proj.weight"][:, rows].T)
                if found.qkv_bias:
                    np.testing.assert_array_equal(layers["qkv_bias_LKJH"][i, k, g], t[attn + "q_proj.bias"][rows])
            if found.qkv_bias:
                rows = slice(k * H, k * H + H)
                np.testing.assert_array_equal(layers["qkv_bias_LKJH"][i, k, G], t[attn + "k_proj.bias"][rows])
                np.testing.assert_array_equal(layers["qkv_bias_LKJH"][i, k, G + 1], t[attn + "v_proj.bias"][rows])
        np.testing.assert_array_equal(layers["gate_up_L2DF"][i, 0], t[mlp + "gate_proj.weight"].T)
        np.testing.assert_array_equal(layers["gate_up_L2DF"][i, 1], t[mlp + "up_proj.weight"].T)
        np.testing.assert_array_equal(layers["down_LFD"][i], t[mlp + "down_proj.weight"].T)
        for kind, name in (("attention", "input_layernorm"), ("dense", "post_attention_layernorm")):
            np.testing.assert_array_equal(params["layers"][kind]["norm_LD"][i], t[f"model.layers.{i}.{name}.weight"])
        if found.qk_norm:
            np.testing.assert_array_equal(layers["q_norm_LH"][i], t[attn + "q_norm.weight"])
            np.testing.assert_array_equal(layers["k_norm_LH"][i], t[attn + "k_norm.weight"])
    np.testing.assert_array_equal(params["embed_VD"], t["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm_D"], t["model.norm.weight"])
    assert ("unembed_VD" in params) == ("lm_head.weight" in t)
    if "unembed_VD" in params:
        np.testing.assert_array_equal(params["unembed_VD"], t["lm_head.weight"])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_are_converted_once(stored: Any, wanted: str, tmp_path: Path) -> None:
    t = {name: x.astype(stored) for name, x in hf_tensors(config()).items()}
    params = load(write_hf(tmp_path / "m", config(), t), wanted)
    assert params["embed_VD"].dtype == wanted
    assert params["final_norm_D"].dtype == params["layers"]["attention"]["norm_LD"].dtype == np.float32
    down = t["model.layers.1.mlp.down_proj.weight"].astype(wanted).T
    np.testing.assert_array_equal(params["layers"]["dense"]["down_LFD"][1], down)


SHARDED = """
import sys, jax, numpy as np
from jax_client.sharding import make_mesh
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import resolve
found = resolve(sys.argv[1])
one = load_params(found, read_config(found), "float32", make_mesh("auto", jax.devices()[:1]))
for axes in ("auto", {"fsdp": 4, "tensor": 2}, {"data": 4, "tensor": 2}):
    many = load_params(found, read_config(found), "float32", make_mesh(axes))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), many, one)
    sizes = {s.data.size for s in many["layers"]["dense"]["gate_up_L2DF"].addressable_shards}
    print(len(jax.devices()), sizes)
"""


@pytest.mark.parametrize("layout", ["hf", "gguf"])
def test_eight_devices_hold_the_same_numbers(layout: str, tmp_path: Path) -> None:
    c = config("llama-untied")
    t = hf_tensors(c)
    path = write_hf(tmp_path / "m", c, t) if layout == "hf" else write_gguf(tmp_path / "m.gguf", c, t)
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, path], env=with_devices(8), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    whole = 2 * 32 * 2 * 96
    assert run.stdout.split("\n")[:3] == [f"8 {{{whole // 8}}}", f"8 {{{whole // 8}}}", f"8 {{{whole // 2}}}"]


def test_fingerprint_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    c, t = config(), hf_tensors(config())
    paths = [
        write_hf(tmp_path / "a", c, t),
        write_hf(tmp_path / "b", c, t),
        write_hf(tmp_path / "c", c, hf_tensors(c, seed=1)),
        write_gguf(tmp_path / "m.gguf", c, t),
    ]
    a, b, other, gguf = (fingerprint(resolve(str(p))) for p in paths)
    assert a == b
    assert len({a, other, gguf}) == 3
    assert len(a) == 64


@pytest.mark.real
def test_the_embedded_model_loads() -> None:
    found = resolve(EMBEDDED_MODEL)
    assert (found.kind, known_models()[0]) == ("gguf", EMBEDDED_MODEL)
    c = read_config(found)
    assert (c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.vocab_size) == (30, 576, 9, 3, 49152)
    assert (c.norm_eps, c.rope_theta, c.max_context, c.eos_token_ids) == (1e-5, 1e5, 8192, (2,))
    params = load_params(found, c, "bfloat16", one_device())
    assert "unembed_VD" not in params
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008


@pytest.mark.full
@pytest.mark.real
@pytest.mark.torch
def test_the_embedded_model_equals_transformers() -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    found = resolve(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(str(found.path.parent), gguf_file=found.path.name)
    want = {name: x.float().numpy() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    reader = GgufReader(read_gguf(found.path))
    assert set(reader.tensors) == set(want)
    assert [name for name in want if not np.array_equal(reader.read(name), want[name])] == []
