"""Does a quantised release load and export as its plain numbers do, and is a damaged one refused by name?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_client.errors import BadRequestError, JaxClientError, UnsupportedError
from jax_client.weights.read.hf import open_weights
from jax_client.weights.read.identity import fingerprint
from jax_client.weights.read.load import open_tensors, read_config
from jax_client.weights.read.source import resolve
from jax_client.weights.read.tensors import check_tensors
from jax_client.weights.write.merged import write_merged
from support.weight_files import hf_tensors, write_hf
from support.weights.exports import directory
from support.weights.loading import assert_same, config, load
from support.weights.quantized import FP8, MXFP4, fp8_release, plain, write_release

pytestmark = pytest.mark.usefixtures("empty_hub_cache")

BLOCK = (24, 20)  # neither divides a side of the projections
QUANTIZED = FP8 | {"weight_block_size": list(BLOCK)}
E8M0 = ml_dtypes.float8_e8m0fnu
UP = "model.layers.1.mlp.up_proj.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def release(path: Path, stored: dict[str, np.ndarray], **changes: Any) -> Path:
    return write_release(path, config("llama-untied", quantization_config=QUANTIZED | changes), stored, n_shards=3)


def stored_model(scale_dtype: Any = np.float32, block: tuple[int, int] = BLOCK) -> dict[str, np.ndarray]:
    return fp8_release(hf_tensors(config("llama-untied")), block, scale_dtype)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16, E8M0])
def test_a_llama_in_fp8_loads_as_its_numbers(scale_dtype: Any, tmp_path: Path) -> None:
    stored = stored_model(scale_dtype)
    numbers = plain(stored, BLOCK)
    assert 0 < np.abs(numbers[UP] - hf_tensors(config("llama-untied"))[UP]).max() < 0.5
    path = release(tmp_path / "fp8", stored)
    same = write_hf(tmp_path / "plain", config("llama-untied"), numbers)
    assert read_config(resolve(str(path))) == read_config(resolve(str(same)))
    for dtype in ("float32", "bfloat16"):
        assert_same(load(path, dtype), load(same, dtype))


def test_the_released_block_size(tmp_path: Path) -> None:
    """One block of 128 x 128 is larger than these projections."""
    stored = stored_model(block=(128, 128))
    assert stored[UP + "_scale_inv"].shape == (1, 1)
    path = release(tmp_path / "fp8", stored, weight_block_size=[128, 128])
    assert_same(load(path), load(write_hf(tmp_path / "plain", config("llama-untied"), plain(stored, (128, 128)))))


@pytest.mark.torch
def test_a_llama_in_fp8_equals_that_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    # transformers decodes blocks only where they divide the sides.
    stored = stored_model(block=(16, 32))
    settings = {"model_type": "llama", "quantization_config": QUANTIZED | {"weight_block_size": [16, 32]}}
    path = write_release(tmp_path / "fp8", config("llama-untied", **settings), stored, n_shards=3)
    plain_numbers = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32))
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=plain_numbers, dtype=torch.float32)
    reader = open_weights(path)
    assert model.state_dict().keys() == reader.tensors.keys()
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(reader.read(name).astype(np.float32), x.numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_export_is_plain(dtype: Any, tmp_path: Path) -> None:
    stored = stored_model()
    source = resolve(str(release(tmp_path / "fp8", stored)))
    out = directory(tmp_path)
    write_merged(out, source, read_config(source), None, dtype=dtype)
    found = load_file(out / "model.safetensors")
    numbers = plain(stored, BLOCK)
    assert found.keys() == numbers.keys()
    for name, x in numbers.items():
        np.testing.assert_array_equal(found[name], x.astype(dtype))
    written = json.loads((out / "config.json").read_text())
    assert written == config("llama-untied") | {"dtype": dtype, "torch_dtype": dtype}
    assert_same(load(out, dtype), load(source.path, dtype))


def test_the_fingerprint_of_a_release(tmp_path: Path) -> None:
    stored = stored_model()
    path = release(tmp_path / "fp8", stored)
    assert fingerprint(resolve(str(path))) == fingerprint(resolve(str(release(tmp_path / "copy", stored))))
    stored[UP + "_scale_inv"] *= 2
    assert fingerprint(resolve(str(path))) != fingerprint(resolve(str(release(tmp_path / "other", stored))))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"},
         r"'pack-quantized', which is not loaded: two published decoders .*u - 16.*u - 8.*unquantised release"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'float-quantized'.*unquantised release"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', which is not .*unquantised rel"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq', which is not loaded.*unquantised release"),
        ({"quant_method": "awq", "bits": 4}, "'awq', which is not loaded.*unquantised release"),
        ({"quant_method": "fp8"}, "without a weight_block_size.*unquantised release"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'.*only e4m3"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme 'static'.*scales of the activations"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_other_formats_are_refused_with_the_way_out(
    found: dict[str, Any], words: str, nested: bool, tmp_path: Path
) -> None:
    c = config(text_config={"quantization_config": found}) if nested else config(quantization_config=found)
    path = write_release(tmp_path / "m", c, {"x": np.zeros(1, np.float32)})
    for read in (lambda: read_config(resolve(str(path))), lambda: open_tensors(resolve(str(path)))):
        with pytest.raises(UnsupportedError, match=rf"config\.json: quantization_config: .*{words}"):
            read()


@pytest.mark.parametrize(
    "found",
    [[], "fp8", {}, {"quant_method": 8}, *(FP8 | {"weight_block_size": size} for size in ([128], [0, 128], "128"))],
)
def test_what_describes_no_format_is_refused(found: Any, tmp_path: Path) -> None:
    path = write_release(tmp_path / "m", config(quantization_config=found), {"x": np.zeros(1, np.float32)})
    with pytest.raises(BadRequestError, match="quantization_config"):
        read_config(resolve(str(path)))


def test_null_is_no_format(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", config(quantization_config=None), hf_tensors(config()))
    assert_same(load(path), load(write_hf(tmp_path / "n", config(), hf_tensors(config()))))


def changed(name: str, x: np.ndarray | None, **settings: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    stored = stored_model()
    if x is None:
        del stored[name]
    else:
        stored[name] = x
    return stored, settings


SCALES = UP + "_scale_inv"
DAMAGED = {
    "no scales": (changed(SCALES, None), rf"tensor {UP} has no {SCALES} in any"),
    "no weight": (changed(UP, None), rf"1 missing, 0 misshapen, 1 extra.*{UP}: expected \(96, 32\), not there"),
    "another block size": ((stored_model(), {"weight_block_size": [128, 128]}),
                           r"tensor model.*_scale_inv is F32 .*; expected F32 or .* blocks of 128 x 128"),
    "shape of scales": (changed(SCALES, np.ones((4, 3), np.float32)),
                        rf"tensor {SCALES} is F32 \(4, 3\); expected .* \(4, 2\), for {UP} of shape \(96, 32\)"),
    "one scale": (changed(SCALES, np.ones((1,), np.float32)), rf"tensor {SCALES} is F32 \(1,\); expected"),
    "dtype of scales": (changed(SCALES, np.ones((4, 2), np.float16)), rf"tensor {SCALES} is F16 \(4, 2\); expected"),
    "shape of a weight": (changed(UP, np.zeros((95, 32), ml_dtypes.float8_e4m3fn)), rf"{UP}: expected \(96, 32\)"),
    "a vector": (changed("model.norm.weight", np.zeros(32, ml_dtypes.float8_e4m3fn)), "model.norm.weight is F8_E4M3"),
    "scales of a plain weight": (changed(UP, np.zeros((96, 32), np.float32)), rf"{SCALES}: not expected"),
    "packed": (changed(UP, np.zeros((96, 8), np.int32)), rf"{UP}: expected \(96, 32\), found \(96, 8\)"),
    "not a number": (changed(UP, np.full((96, 32), 0xFF, np.uint8).view(ml_dtypes.float8_e4m3fn)),
                     rf"tensor {UP} holds values that are not finite"),
    "scales that are not numbers": (changed(SCALES, np.full((4, 2), 0xFF, np.uint8).view(E8M0)),
                                    rf"tensor {SCALES} holds values that are not finite"),
    "an infinite scale": (changed(SCALES, np.full((4, 2), np.inf, np.float32)), rf"{SCALES} holds values that"),
    "a product too large": (changed(SCALES, np.full((4, 2), 3e38, np.float32)), rf"tensor {UP} holds values that"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    (stored, settings), words = DAMAGED[case]
    with pytest.raises(BadRequestError, match=words):
        load(release(tmp_path / "m", stored, **settings))


def test_codes_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    stored = stored_model()
    codes = {name: x for name, x in stored.items() if not name.endswith("_scale_inv")}
    with pytest.raises(UnsupportedError, match=r"has dtype F8_E4M3, which is not loaded; supported are F32, F16, BF16"):
        load(write_release(tmp_path / "a", config("llama-untied"), codes))
    with pytest.raises(BadRequestError, match=r"_scale_inv: not expected"):
        load(write_release(tmp_path / "b", config("llama-untied"), stored))
    for dtype, name in ((np.uint8, "U8"), (np.int32, "I32"), (E8M0, "F8_E8M0")):
        with pytest.raises(UnsupportedError, match=rf"{UP} has dtype {name}, which is not loaded"):
            load(release(tmp_path / name, {n: x for n, x in stored.items() if n != SCALES}
                         | {UP: np.zeros((96, 32), np.uint8).astype(dtype)}))  # fmt: skip


def test_a_truncated_shard_is_named_before_anything_is_read(tmp_path: Path) -> None:
    path = release(tmp_path / "m", stored_model())
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BadRequestError, match=r"model-00002-of-00003\.safetensors: the header describes \d+ bytes"):
        open_tensors(resolve(str(path)))


def experts(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    stored: dict[str, np.ndarray | None] = {
        GATE_UP + "_blocks": np.zeros((4, 6, 2, 16), np.uint8),
        GATE_UP + "_scales": np.full((4, 6, 2), 127, np.uint8),
    }
    stored |= {GATE_UP + key: x for key, x in changes.items()}
    return {name: x for name, x in stored.items() if x is not None}


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (experts(_scales=None), r"gate_up_proj_blocks has no .*gate_up_proj_scales in any"),
        (experts(_blocks=None), r"1 missing, 0 misshapen, 1 extra.*gate_up_proj: expected \(4, 64, 6\), not there"),
        (experts(_blocks=np.zeros((4, 6, 2, 8), np.uint8)), r"gate_up_proj_blocks is U8 \(4, 6, 2, 8\); blocks"),
        (experts(_blocks=np.zeros((6, 2, 16), np.uint8)), r"gate_up_proj_blocks is U8 \(6, 2, 16\); blocks of MXFP4"),
        (experts(_blocks=np.zeros((4, 6, 2, 16), np.int32)), r"gate_up_proj_blocks is I32"),
        (experts(_scales=np.zeros((4, 6, 3), np.uint8)), r"_scales is U8 \(4, 6, 3\); expected U8 \(4, 6, 2\)"),
        (experts(_scales=np.zeros((4, 6, 2), np.float32)), r"gate_up_proj_scales is F32 \(4, 6, 2\); expected U8"),
        (experts(_blocks=np.zeros((3, 6, 2, 16), np.uint8), _scales=np.zeros((3, 6, 2), np.uint8)),
         r"1 misshapen.*gate_up_proj: expected \(4, 64, 6\), found \(3, 64, 6\)"),
        ({GATE_UP: np.zeros((4, 64, 6), np.float32)} | experts(), r"gate_up_proj is there beside .*_proj_blocks"),
    ],
)  # fmt: skip
def test_damaged_experts_are_named(stored: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    path = write_release(tmp_path / "m", {"quantization_config": MXFP4}, stored)
    with pytest.raises(BadRequestError, match=words):
        check_tensors(open_weights(path), {GATE_UP: (4, 64, 6)}, tied=False, where=str(path))


def test_experts_that_fit_pass_and_their_nan_is_refused(tmp_path: Path) -> None:
    scales = np.full((4, 6, 2), 127, np.uint8)
    scales[2, 5, 1] = 255
    reader = open_weights(write_release(tmp_path / "m", {"quantization_config": MXFP4}, experts(_scales=scales)))
    check_tensors(reader, {GATE_UP: (4, 64, 6)}, tied=False, where="m")
    reader.read_expert(GATE_UP, 1)
    for read in (lambda: reader.read(GATE_UP), lambda: reader.read_expert(GATE_UP, 2)):
        with pytest.raises(BadRequestError, match=r"gate_up_proj_scales holds values that are not finite"):
            read()


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    path = write_release(tmp_path / "m", config("llama-untied", quantization_config=QUANTIZED), stored_model())
    file = path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(8, header, 2):
            data[place] = rng.integers(32, 127)
        file.write_bytes(data)
        try:
            load(path)
        except JaxClientError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50
