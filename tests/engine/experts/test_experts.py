"""Does a mixture of experts train as transformers and autograd say, and sample as it trains, on one device and eight?

The stored goldens serve machines without torch; with torch, they are made again and compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.experts import cases as expert_cases
from support.experts.engine import check_sampling, check_training, open_engine
from support.golden_cases import GOLDENS
from support.meshes.devices import run_on

MESHES = [
    {"expert": 4, "tensor": 2},
    pytest.param({"fsdp": 8}, marks=pytest.mark.full),
    pytest.param({"fsdp": 3}, marks=pytest.mark.full),  # does not divide the experts: each way has all
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.full),
]
CHILD = """
import json, sys
from pathlib import Path
from support.experts.engine import check_sampling, check_training, open_engine

case, mesh = "qwen3_moe_mixed", json.loads(sys.argv[1])
engine = open_engine(Path(sys.argv[2]), case, mesh=mesh)
print(json.dumps(check_sampling(engine, case, *check_training(engine, case))))
engine.close()
"""


@pytest.mark.parametrize(
    ("case", "remat"),
    [
        ("qwen3_moe_raw", "full"),
        pytest.param("qwen3_moe_raw", "none", marks=pytest.mark.full),
        pytest.param("qwen3_moe_mixed", "none", marks=pytest.mark.full),
        pytest.param("qwen3_moe_mixed", "selective", marks=pytest.mark.full),
    ],
)
def test_training_equals_autograd_through_merged_weights(case: str, remat: str, tmp_path: Path) -> None:
    # The experts of a layer may come as one tensor.
    tensors = expert_cases.fused(case) if case == "qwen3_moe_raw" else expert_cases.tensors(case)
    engine = open_engine(tmp_path, case, tensors, remat=remat)
    check_training(engine, case)
    engine.close()


def test_sampling_equals_training(tmp_path: Path) -> None:
    case = "qwen3_moe_mixed"
    engine = open_engine(tmp_path, case)
    check_sampling(engine, case, *check_training(engine, case))
    engine.close()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_equal_one(mesh: dict[str, int], tmp_path: Path) -> None:
    """Both are compared with the goldens; a token that is sampled may differ where two are equally likely, no other."""
    assert len(run_on(mesh, CHILD, tmp_path)) == 2 * len(expert_cases.data("qwen3_moe_mixed"))


@pytest.mark.torch
@pytest.mark.parametrize("case", expert_cases.CASES)
def test_goldens_are_what_torch_says_now(case: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    stored = np.load(GOLDENS / f"{case}.npz")
    for name, array in expert_cases.reference(case, tmp_path).items():
        np.testing.assert_allclose(array, stored[name], rtol=1e-4, atol=2e-5, err_msg=name)
