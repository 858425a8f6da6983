"""Is every quantised tensor read as the numbers that it stands for, bit for bit, by other decoders than ours?"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.weights.read.hf import open_weights
from jax_client.weights.read.quantized import fp8, mxfp4
from support.children import STRICT
from support.weights.quantized import FP8, MXFP4, decoded_fp8, decoded_mxfp4, write_release

BF16 = ml_dtypes.bfloat16
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
WEIGHT = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    kind = {2: np.uint16, 4: np.uint32}[want.dtype.itemsize]
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(kind), np.ascontiguousarray(want).view(kind))


def mxfp4_reader(path: Path, blocks: np.ndarray, scales: np.ndarray, **more: np.ndarray) -> Any:
    tensors = {EXPERTS + "_blocks": blocks, EXPERTS + "_scales": scales, **more}
    return open_weights(write_release(path, {"quantization_config": MXFP4}, tensors, n_shards=2))


def fp8_reader(path: Path, codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] = (128, 128)) -> Any:
    config = {"quantization_config": FP8 | {"weight_block_size": list(block)}}
    return open_weights(write_release(path, config, {WEIGHT: codes, WEIGHT + "_scale_inv": scales}))


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return random codes of FP8, all but those of no number."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8).view(E4M3)


def test_every_byte_under_every_scale_of_mxfp4() -> None:
    """All 65,280 pairs, the signs of zeros, numbers below the smallest normal one, and those that are too large."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (255, 1, 1))
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, 1)
    out = np.empty((255, 512), BF16)
    mxfp4.decode(blocks, scales, out)
    want = decoded_mxfp4(blocks[None], scales[None])[0].T
    held = np.abs(want) < 2.0**128
    assert held.mean() > 0.99
    assert np.array_equal(out.astype(np.float64)[held], want[held])
    assert np.array_equal(np.signbit(out), np.signbit(want))
    assert np.isinf(out[~held]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32))
def test_random_mxfp4(experts: int, rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, rows, groups, 16), dtype=np.uint8)
    scales = rng.integers(0, 252, (experts, rows, groups), dtype=np.uint8)
    out = np.empty((experts, rows, groups * 32), BF16)
    for e in range(experts):
        mxfp4.decode(blocks[e], scales[e], out[e])
    same_bits(out.swapaxes(1, 2), decoded_mxfp4(blocks, scales).astype(BF16))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 2**32))
def test_random_fp8(rows: int, columns: int, block: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = numbers(rng, (rows, columns))
    scales = rng.normal(size=(-(-rows // block[0]), -(-columns // block[1]))).astype(np.float32)
    out = np.empty((rows, columns), np.float32)
    assert fp8.decode(codes, scales, block, out)
    same_bits(out, decoded_fp8(codes, scales, block))


def test_strips_of_fp8_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes, scales = numbers(rng, (37, 50)), rng.random((4, 2), np.float32)
    monkeypatch.setattr(fp8, "STRIP", 3 * 50)
    out = np.empty((37, 50), np.float32)
    fp8.decode(codes, scales, (10, 30), out)
    same_bits(out, decoded_fp8(codes, scales, (10, 30)))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_one_code_of_no_number_is_seen(code: int) -> None:
    codes = np.zeros((300, 300), np.uint8)
    codes[299, 299] = code
    assert not fp8.decode(codes.view(E4M3), np.ones((3, 3), np.float32), (128, 128), np.empty((300, 300), np.float32))


def test_strips_of_mxfp4_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (37, 3, 16), np.uint8), rng.integers(100, 140, (37, 3), np.uint8)
    whole, parts = np.empty((37, 96), BF16), np.empty((37, 96), BF16)
    mxfp4.decode(blocks, scales, whole)
    monkeypatch.setattr(mxfp4, "STRIP_BYTES", 5 * 48)
    mxfp4.decode(blocks, scales, parts)
    same_bits(parts, whole)


def test_experts_are_read_as_the_bfloat16_release_has_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    blocks, scales = rng.integers(0, 256, (4, 6, 2, 16), np.uint8), rng.integers(110, 130, (4, 6, 2), np.uint8)
    bias = rng.normal(size=(4, 6)).astype(BF16)
    reader = mxfp4_reader(tmp_path, blocks, scales, **{EXPERTS + "_bias": bias})
    assert sorted(reader.tensors) == [EXPERTS, EXPERTS + "_bias"]
    assert (reader.tensors[EXPERTS].shape, reader.tensors[EXPERTS].dtype) == ((4, 64, 6), "BF16")
    want = decoded_mxfp4(blocks, scales).astype(BF16)
    same_bits(reader.read(EXPERTS), want)
    same_bits(reader.read(EXPERTS + "_bias"), bias)
    for e in range(4):
        same_bits(reader.read_expert(EXPERTS, e), want[e])
        same_bits(reader.read_expert(EXPERTS + "_bias", e), bias[e])


@pytest.mark.parametrize("shape", [(576, 130), (3, 576, 130)])
@pytest.mark.parametrize("dtype", [np.float32, BF16, E8M0])
def test_blocks_at_the_edges_are_partial(shape: tuple[int, ...], dtype: Any, tmp_path: Path) -> None:
    """576 rows are four blocks and a half, as those of DeepSeek's kv_a_proj_with_mqa."""
    rng = np.random.default_rng(2)
    codes = numbers(rng, shape)
    scales = np.exp2(rng.integers(-20, 5, (*shape[:-2], 5, 2))).astype(dtype)
    reader = fp8_reader(tmp_path, codes, scales)
    assert (reader.tensors[WEIGHT].shape, reader.tensors[WEIGHT].dtype) == (shape, "F32")
    if len(shape) == 2:
        want = decoded_fp8(codes, scales, (128, 128))
    else:
        want = np.stack([decoded_fp8(c, s, (128, 128)) for c, s in zip(codes, scales, strict=True)])
    same_bits(reader.read(WEIGHT), want)
    same_bits(reader.read_expert(WEIGHT, 2), want[2])


def test_an_expert_of_plain_files_is_a_view(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    reader = open_weights(write_release(tmp_path, {}, {"x": x}))
    same_bits(reader.read_expert("x", 1), x[1])
    assert not reader.read_expert("x", 1).flags.owndata


# What a loader does that asks for one expert after the other: 100 MB in two tensors.
READ_EXPERTS = """
import sys
from pathlib import Path
import ml_dtypes
import numpy as np
from jax_client.weights.read.hf import open_weights

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

reader = open_weights(Path(sys.argv[1]))
reader.read_expert("small", 0)
before = status("VmRSS")
held = {n: np.empty(i.shape, ml_dtypes.bfloat16) for n, i in reader.tensors.items() if n != "small"}
for name, x_EIO in held.items():
    for expert, x_IO in enumerate(x_EIO):
        x_IO[...] = reader.read_expert(name, expert)
print(before, status("VmHWM"), sum(x.nbytes for x in held.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a process's peak")
def test_one_expert_is_decoded_at_a_time(tmp_path: Path) -> None:
    rng, stored = np.random.default_rng(5), {}
    for name, (experts, rows, columns) in {"small": (1, 4, 32), "up": (32, 1024, 768), "down": (32, 768, 1024)}.items():
        stored[name + "_blocks"] = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        stored[name + "_scales"] = rng.integers(110, 140, (experts, rows, columns // 32), np.uint8)
    path = write_release(tmp_path, {"quantization_config": MXFP4}, stored)
    done = subprocess.run([*STRICT, "-c", READ_EXPERTS, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    before, peak, weights = map(int, done.stdout.split())
    assert weights == 2 * 32 * 1024 * 768 * 2
    assert peak - before <= 1.2 * weights, f"{(peak - before) / weights:.2f} times the weights"


@pytest.mark.torch
def test_mxfp4_equals_the_decoder_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(3)
    blocks, scales = rng.integers(0, 256, (2, 96, 4, 16), np.uint8), rng.integers(90, 160, (2, 96, 4), np.uint8)
    want = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    same_bits(mxfp4_reader(tmp_path, blocks, scales).read(EXPERTS), want.view(torch.uint16).numpy().view(BF16))


@pytest.mark.torch
def test_fp8_equals_the_type_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    codes, scales = numbers(rng, (300, 257)), rng.lognormal(size=(5, 3)).astype(np.float32)
    spread = torch.from_numpy(scales).repeat_interleave(64, 0)[:300].repeat_interleave(96, 1)[:, :257]
    want = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).float() * spread
    same_bits(fp8_reader(tmp_path, codes, scales, (64, 96)).read(WEIGHT), want.numpy())
