"""Does a gpt-oss in MXFP4 load as the numbers that it stands for, in little memory, and is a damaged one refused?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_client.errors import BadRequestError
from support.families import mxfp4
from support.weight_files import write_hf
from support.weights.loading import assert_same, load
from support.weights.quantized import write_release

EXPERTS = "model.layers.1.mlp.experts."
Tensors = dict[str, np.ndarray]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_leaf_is_that_of_the_numbers(dtype: str, tmp_path: Path) -> None:
    keys = mxfp4.config()
    stored, numbers = mxfp4.stored(keys), mxfp4.numbers(mxfp4.stored(keys))
    found = load(write_release(tmp_path / "m", keys, stored, n_shards=3), dtype)
    plain = write_hf(tmp_path / "plain", mxfp4.config(quantization_config=None), numbers)
    assert_same(found, load(plain, dtype))
    moe = found["layers"]["moe"]
    for layer in range(2):
        gate_up, down = (numbers[f"model.layers.{layer}.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
        of = {"gate_LEDF": gate_up[:, :, ::2], "up_LEDF": gate_up[:, :, 1::2], "down_LEFD": down}
        for name, expected in of.items():
            np.testing.assert_array_equal(moe[f"experts_{name}"][layer].astype(np.float32), expected)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = mxfp4.write(tmp_path / "m")
    shard = path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadRequestError, match=r"model-00003-of-00003\.safetensors: the header describes \d+ bytes"):
        load(path)


def _without(*names: str) -> Callable[[Tensors], Any]:
    return lambda t: [t.pop(EXPERTS + name) for name in names]


def _with(name: str, x: np.ndarray) -> Callable[[Tensors], Any]:
    return lambda t: t.update({EXPERTS + name: x})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without("gate_up_proj_scales"), r"layers\.1\.mlp\.experts\.gate_up_proj_blocks has no .*gate_up_proj_scales"),
        (
            _without("down_proj_blocks"),
            r"1 missing, 0 misshapen, 1 extra.*layers\.1\.mlp\.experts\.down_proj: exp",
        ),
        (_without("down_proj_blocks", "down_proj_scales"), r"1 missing, 0 misshapen, 0 extra.*experts\.down_proj: exp"),
        (_without("gate_up_proj_bias"), r"1 missing.*layers\.1\.mlp\.experts\.gate_up_proj_bias: expected \(4, 64\)"),
        (
            lambda t: (
                _with("down_proj_blocks", np.zeros((3, 64, 1, 16), np.uint8))(t),
                _with("down_proj_scales", np.zeros((3, 64, 1), np.uint8))(t),
            ),
            r"1 misshapen.*experts\.down_proj: expected \(4, 32, 64\), found \(3, 32, 64\)",
        ),
        (
            _with("down_proj_blocks", np.zeros((4, 64, 1, 15), np.uint8)),
            r"_blocks is U8 \(4, 64, 1, 15\); blocks of",
        ),
        (
            _with("down_proj_blocks", np.zeros((4, 63, 1, 16), np.uint8)),
            r"down_proj_scales is U8 \(4, 64, 1\); exp",
        ),
        (_with("down_proj_scales", np.full((4, 64, 1), 255, np.uint8)), r"_scales holds values that are not finite"),
        (_with("down_proj", np.zeros((4, 32, 64), np.float32)), r"down_proj is there beside .*down_proj_blocks"),
    ],
)
def test_damage_is_named(change: Callable[[Tensors], Any], says: str, tmp_path: Path) -> None:
    keys = mxfp4.config()
    stored = mxfp4.stored(keys)
    change(stored)
    with pytest.raises(BadRequestError, match=says):
        load(write_release(tmp_path / "m", keys, stored, n_shards=3))


def test_codes_without_a_quantization_config_are_not_taken_for_weights(tmp_path: Path) -> None:
    keys = mxfp4.config(quantization_config=None)
    with pytest.raises(BadRequestError, match=r"4 missing, 0 misshapen, 8 extra.*experts\.(gate_up|down)_proj: exp"):
        load(write_release(tmp_path / "m", keys, mxfp4.stored(keys)))


SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax_client.sharding import make_mesh
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import resolve

def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

source = resolve(sys.argv[1])
mesh = make_mesh("auto", jax.devices()[:1])
jnp.zeros(8).block_until_ready()
before, peak = status("VmRSS"), status("VmHWM")
params = load_params(source, read_config(source), "bfloat16", mesh, bits=True)
print(sum(x.nbytes for x in jax.tree.leaves(params)) / 1024, before, peak, status("VmHWM"), status("VmRSS"))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_takes_little_more_than_what_is_loaded(tmp_path: Path) -> None:
    """The whole process, from before the load to its peak; mapped pages of the files count, too."""
    large = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 6, "num_local_experts": 8}
    keys = mxfp4.config(**large)
    path = write_release(tmp_path / "m", keys, mxfp4.stored(keys), n_shards=3)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    final, before, highest_before, peak, _ = map(float, done.stdout.split())
    assert final > 280 * 1024
    assert highest_before < before + 0.2 * final
    assert peak - before <= 1.2 * final, json.dumps({"final": final, "peak": peak - before})
