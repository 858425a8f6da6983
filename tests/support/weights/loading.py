"""How do the tests load a tiny model of each family, and when are two of them the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_client.sharding import make_mesh
from jax_client.weights.read.load import load_params, read_config
from jax_client.weights.read.source import resolve
from support.weight_files import FAMILIES, HF_CONFIG


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
