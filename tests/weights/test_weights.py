"""Do a model's files arrive on the mesh unchanged, and is every damaged or foreign file refused by name?"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants, errors

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, RequestFailedError, UnsupportedError
from jax_client.models.decoder import param_specs
from jax_client.sharding import make_mesh
from jax_client.weights.read import hub, source
from jax_client.weights.read.gguf import GgufReader, read_gguf
from jax_client.weights.read.load import fingerprint, load_params, read_config
from jax_client.weights.read.source import EMBEDDED_MODEL, ModelSource, known_models, resolve
from support.weight_files import FAMILIES, HF_CONFIG, hf_tensors, tokenizer_metadata, write_gguf, write_hf

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return HF_CONFIG | FAMILIES[family] | changes


def load(path: Path, dtype: Any = "float32") -> dict[str, Any]:
    found = resolve(str(path))
    return jax.tree.map(np.asarray, load_params(found, read_config(found), dtype, one_device()))


def one_device() -> jax.sharding.Mesh:
    return make_mesh("auto", jax.devices()[:1])


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- layout -----------------------------------------------------------------------------------------------------------


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
    layers = params["layers"]
    for i in range(found.n_layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for k in range(K):
            rows = slice(k * H, k * H + H)
            np.testing.assert_array_equal(layers["qkv_LDKJH"][i, :, k, G], t[attn + "k_proj.weight"][rows].T)
            np.testing.assert_array_equal(layers["qkv_LDKJH"][i, :, k, G + 1], t[attn + "v_proj.weight"][rows].T)
            for g in range(G):
                rows = slice((k * G + g) * H, (k * G + g + 1) * H)
                np.testing.assert_array_equal(layers["qkv_LDKJH"][i, :, k, g], t[attn + "q_proj.weight"][rows].T)
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
        for leaf, name in (("attn_norm_LD", "input_layernorm"), ("mlp_norm_LD", "post_attention_layernorm")):
            np.testing.assert_array_equal(layers[leaf][i], t[f"model.layers.{i}.{name}.weight"])
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
    assert params["final_norm_D"].dtype == params["layers"]["attn_norm_LD"].dtype == np.float32
    down = t["model.layers.1.mlp.down_proj.weight"].astype(wanted).T
    np.testing.assert_array_equal(params["layers"]["down_LFD"][1], down)


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
    sizes = {s.data.size for s in many["layers"]["gate_up_L2DF"].addressable_shards}
    print(len(jax.devices()), sizes)
"""


@pytest.mark.parametrize("layout", ["hf", "gguf"])
def test_eight_devices_hold_the_same_numbers(layout: str, tmp_path: Path) -> None:
    c = config("llama-untied")
    t = hf_tensors(c)
    path = write_hf(tmp_path / "m", c, t) if layout == "hf" else write_gguf(tmp_path / "m.gguf", c, t)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", SHARDED, path], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    whole = 2 * 32 * 2 * 96
    assert run.stdout.split("\n")[:3] == [f"8 {{{whole // 8}}}", f"8 {{{whole // 8}}}", f"8 {{{whole // 2}}}"]


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "arch"), [("llama", "llama"), ("llama-untied", "llama"), ("qwen2", "qwen2"),
                                              ("qwen3", "qwen3")])  # fmt: skip
def test_gguf_equals_hf(family: str, arch: str, tmp_path: Path) -> None:
    c = config(family)
    t = hf_tensors(c)
    gguf, hf = write_gguf(tmp_path / "m.gguf", c, t, arch), write_hf(tmp_path / "m", c, t)
    assert read_config(resolve(str(gguf))) == read_config(resolve(str(hf)))
    assert_same(load(gguf), load(hf))


@pytest.mark.parametrize(("quantization", "error"), [("F16", 1e-2), ("BF16", 2e-2), ("Q8_0", 3e-2), ("Q4_1", 0.3)])
def test_gguf_types_are_dequantised(quantization: str, error: float, tmp_path: Path) -> None:
    t = hf_tensors(config())
    params = load(write_gguf(tmp_path / "m.gguf", config(), t, quantization=quantization))
    assert 0 < np.abs(params["embed_VD"] - t["model.embed_tokens.weight"]).max() < error


def test_gguf_damage_is_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config())).read_bytes()
    cases = {
        "truncated": (whole[:-100], "bytes, but the file has"),
        "header only": (whole[:300], "the header needs at least"),
        "trailing": (whole + bytes(64), "bytes, but the file has"),
        "version": (whole[:4] + b"\x01" + whole[5:], "GGUF version 1"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(BadRequestError, match=words):
            load(path)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(NotFoundError, match=r"expected a GGUF file.*b'not '"):
        resolve(str(tmp_path / "text.gguf"))


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), metadata=tokenizer_metadata()).read_bytes()
    rng = np.random.default_rng(0)
    header = read_gguf(tmp_path / "m.gguf").data_start
    path, refused = tmp_path / "x.gguf", 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(4, header)] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_config(ModelSource(name="x", path=path, kind="gguf"))
            GgufReader(read_gguf(path))
        except JaxClientError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(("key", "value"), [("llama.rope.scaling.type", "yarn"), ("llama.expert_count", 8),
                                            ("llama.rope.dimension_count", 8)])  # fmt: skip
def test_gguf_features_that_are_not_computed(key: str, value: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), metadata={key: value})
    with pytest.raises(UnsupportedError, match=f"{key} is {value!r}"):
        read_config(resolve(str(path)))


def test_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), arch="gemma3")
    with pytest.raises(UnsupportedError, match=r"'gemma3'.*llama, qwen2, qwen3"):
        read_config(resolve(str(path)))


# --- directories that are refused -------------------------------------------------------------------------------------


def test_directory_without_a_model(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFoundError, match=r"looked for config\.json.*empty"):
        resolve(str(empty))
    (empty / "notes.txt").write_text("x")
    with pytest.raises(NotFoundError, match=r"looked for config\.json.*notes\.txt"):
        resolve(str(empty))
    (empty / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(NotFoundError, match=r"looked for model\.safetensors.*notes\.txt"):
        resolve(str(empty))
    (empty / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=r"pickle weights are not loaded.*save_pretrained"):
        resolve(str(empty))


def test_custom_code_is_refused(tmp_path: Path) -> None:
    c = config(auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    path = write_hf(tmp_path / "m", c, hf_tensors(c))
    (path / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match=r"custom code is never executed.*LlamaForCausalLM"):
        resolve(str(path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_config(text: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadRequestError, match=r"config\.json: "):
        resolve(str(path))


def test_eos_ids_of_generation_config_are_joined(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_config(resolve(str(path))).eos_token_ids == (2, 5)


def test_damaged_shard(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()))
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for data, words in (
        (whole[:-1], f"describes {len(whole)} bytes, but the file has {len(whole) - 1}"),
        (whole + b"x", f"describes {len(whole)} bytes, but the file has {len(whole) + 1}"),
        (whole[:50], "header would need"),
        (b"", "header would need"),
        (b"\xff" * 8 + whole[8:], "header would need"),
        (whole[:8] + b"x" + whole[9:], "not JSON"),
    ):
        file.write_bytes(data)
        with pytest.raises(BadRequestError, match=rf"model\.safetensors: .*{words}.*delete it and download it again"):
            load(path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    t = hf_tensors(config())
    t["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    path = write_hf(tmp_path / "m", config(), t)
    with pytest.raises(
        BadRequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    ):
        load(path)


@pytest.mark.parametrize(
    "entry", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "gone.safetensors"]
)
def test_index_entries_outside_the_directory(entry: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()), n_shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = entry
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=entry):
        resolve(str(path))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(), hf_tensors(config()), n_shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.extra"] = index["weight_map"]["model.norm.weight"]
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=r"tensor model\.extra should be in"):
        load(path)


def test_link_out_of_the_directory(tmp_path: Path) -> None:
    real = write_hf(tmp_path / "real", config(), hf_tensors(config()))
    path = tmp_path / "linked"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    (path / "model.safetensors").symlink_to(real / "model.safetensors")
    with pytest.raises(BadRequestError, match=r"'model\.safetensors' is a link to .*outside"):
        resolve(str(path))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    t = hf_tensors(config())
    t["model.layers.0.mlp.up_proj.weight"] = np.zeros((95, 32), np.float32)
    t["model.layers.0.surprise.weight"] = np.zeros(3, np.float32)
    del t["model.norm.weight"]
    path = write_hf(tmp_path / "m", config(), t)
    with pytest.raises(BadRequestError) as caught:
        load(path)
    for words in (
        "1 missing, 1 misshapen, 1 extra",
        "model.norm.weight: expected (32,)",
        "expected (96, 32), found (95, 32)",
        "surprise.weight: not expected, found (3,)",
    ):
        assert words in str(caught.value)


def test_first_five_of_many(tmp_path: Path) -> None:
    t = {"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}
    with pytest.raises(BadRequestError, match="19 missing") as caught:
        load(write_hf(tmp_path / "m", config(), t))
    assert str(caught.value).count("not there") == 5


def test_ignored_extras(tmp_path: Path) -> None:
    t = hf_tensors(config())
    plain = load(write_hf(tmp_path / "a", config(), t))
    t["lm_head.weight"] = t["model.embed_tokens.weight"].copy()
    t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert_same(load(write_hf(tmp_path / "b", config(), t)), plain)


@pytest.mark.parametrize(("dtype", "name"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8")])
def test_unsupported_dtypes(dtype: Any, name: str, tmp_path: Path) -> None:
    t: dict[str, Any] = hf_tensors(config())
    t["model.layers.0.mlp.up_proj.weight"] = t["model.layers.0.mlp.up_proj.weight"].astype(dtype)
    with pytest.raises(UnsupportedError, match=rf"dtype {name}.*F32, F16, BF16"):
        load(write_hf(tmp_path / "m", config(), t))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, ""])
def test_a_name_is_required(name: str | None) -> None:
    with pytest.raises(BadRequestError, match=r"base_model is required.*known_models"):
        resolve(name)


@pytest.mark.parametrize(("name", "meant"), [("qwen3-8b", "Qwen/Qwen3-8B"), ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
                                             ("SmolLM2-135M-Instuct", EMBEDDED_MODEL)])  # fmt: skip
def test_misspelled_names_are_answered_at_once(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError, match=f"Did you mean '{meant}'"):
        resolve(name)


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing.gguf", "a/b/c", "../x/y"])
def test_paths_that_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError, match="no such file or directory"):
        resolve(name)


def hub_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def http_client() -> Any:
    """Return huggingface_hub's HTTP library, which differs between its versions."""
    return importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    http = http_client()
    return kind("refused", response=http.Response(status, request=http.Request("GET", "https://hub.invalid")))


def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Exception, type[Exception], str, str | None]] = [
        (errors.LocalEntryNotFoundError("x"), RequestFailedError, "cannot be reached.*HF_TOKEN.*local dir", "user"),
        (http_client().ReadTimeout("slow"), RequestFailedError, "cannot be reached", "user"),
        (http_error(errors.GatedRepoError, 401), RequestFailedError, "is gated.*HF_TOKEN", "user"),
        (http_error(errors.RepositoryNotFoundError, 404), NotFoundError, "the hub has no model", None),
        (http_error(errors.HfHubHTTPError, 503), RequestFailedError, "refused", "user"),
        (OSError(28, "No space left on device"), RequestFailedError, "disk is full.*bytes are free", "server"),
    ]  # fmt: skip
    for error, kind, words, category in cases:
        hub_raises(error, monkeypatch)
        with pytest.raises(kind, match=words) as caught:
            resolve("some-org/some-model")
        assert getattr(caught.value, "category", None) == category


def test_a_near_name_is_offered_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(errors.LocalEntryNotFoundError("offline"), monkeypatch)
    with pytest.raises(NotFoundError, match="Did you mean 'Qwen/Qwen3-8B'"):
        resolve("Qwen/Qwen3-88B")
    with pytest.raises(RequestFailedError):
        resolve("Qwen/Qwen3-8B")


def fill_cache(cache: Path, name: str) -> Path:
    """Lay a model out as the hub cache does: a snapshot of links into the blobs."""
    model = cache / f"models--{name.replace('/', '--')}"
    blobs = write_hf(model / "blobs", config(), hf_tensors(config()))
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_the_cache_is_used_before_the_hub(empty_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    snapshot = fill_cache(empty_hub_cache, "some-org/some-model")
    found = resolve("some-org/some-model")
    assert (found.path, found.kind) == (snapshot, "hf")
    assert "some-org/some-model" in known_models()
    assert load_params(found, read_config(found), "float32", one_device())["embed_VD"].shape == (64, 32)


def test_an_incomplete_snapshot_is_not_used(empty_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(empty_hub_cache, "some-org/some-model")
    (snapshot / "model.safetensors").unlink()
    hub_raises(errors.LocalEntryNotFoundError("offline"), monkeypatch)
    with pytest.raises(RequestFailedError, match="cannot be reached"):
        resolve("some-org/some-model")
    assert "some-org/some-model" not in known_models()


def test_a_tokenizer_directory_does_not_hide_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gguf = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()))
    monkeypatch.setattr(source, "embedded_gguf", lambda: gguf)
    here = tmp_path / EMBEDDED_MODEL
    here.mkdir(parents=True)
    (here / "tokenizer.json").write_text("{}")
    assert resolve(EMBEDDED_MODEL).path == gguf
    write_hf(here, config(), hf_tensors(config()))
    assert resolve(EMBEDDED_MODEL).kind == "hf"


# --- fingerprint ------------------------------------------------------------------------------------------------------


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


# --- the real model ---------------------------------------------------------------------------------------------------


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
