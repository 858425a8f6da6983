"""How does a tiny gpt-oss look in its release's format? Its experts are codes and scales, drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_client.models.families.registry import config_from_hf
from jax_client.weights.read.names import expected_tensors
from support.families import cases
from support.weights.quantized import MXFP4, decoded_mxfp4, write_release

# The format wants sides that 32 divides.
SIZES = {"intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}


def config(**changes: Any) -> dict[str, Any]:
    """Return the config.json of the release, or of its plain numbers with `quantization_config=None`."""
    keys = cases.CASES["gpt_oss"] | SIZES | {"quantization_config": MXFP4} | changes
    return {name: value for name, value in keys.items() if value is not None}


def stored(keys: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return the tensors of a release of these sizes: bfloat16, but for codes and scales of experts."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in sorted(expected_tensors(config_from_hf(keys, "config.json")).items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, n_in, n_out = shape
            found[name + "_blocks"] = rng.integers(0, 256, (experts, n_out, n_in // 32, 16), np.uint8)
            found[name + "_scales"] = rng.integers(122, 125, (experts, n_out, n_in // 32)).astype(np.uint8)
            continue
        values = rng.standard_normal(shape, np.float32) * 0.2 + ("norm" in name)
        found[name] = values.astype(ml_dtypes.bfloat16)
    return found


def numbers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the float32 tensors that a release stands for, decoded one code at a time."""
    plain = {n: x.astype(np.float32) for n, x in tensors.items() if x.dtype != np.uint8}
    for name, codes in tensors.items():
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            plain[whole] = decoded_mxfp4(codes, tensors[whole + "_scales"]).astype(np.float32)
    return plain


def write(directory: Path, n_shards: int = 3, **changes: Any) -> Path:
    """Write a release."""
    return write_release(directory, config(**changes), stored(config(**changes)), n_shards)
