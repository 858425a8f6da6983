"""Do eight devices compute what one computes, on every mesh?

Each mesh runs in a child process, because the number of simulated devices is fixed when jax starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.meshes.devices import run_on

MESHES = [
    pytest.param({"fsdp": 8}, marks=pytest.mark.full),
    pytest.param({"tensor": 2, "fsdp": 4}, marks=pytest.mark.full),
    {"data": 2, "fsdp": 2, "tensor": 2},
]
CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from support.golden_cases import CASES
from support.golden_engine import ADAM, CROSS_ENTROPY, SPEC, data, open_engine
from jax_client.engine.core.requests import AdamSettings, GenerationRequest

mesh = json.loads(sys.argv[1])
config = CASES["qwen2_untied"]
engine = open_engine(Path(sys.argv[2]), config, mesh=mesh)
lane = engine.open_lane()
adapter = engine.open_adapter(lane, SPEC).result()
for _ in range(3):
    engine.train_batch(lane, adapter, data(config), CROSS_ENTROPY)
    engine.optim_step(lane, adapter, AdamSettings(**(ADAM | {"learning_rate": 1e-2}))).result()
logprobs = engine.score_batch(lane, adapter, data(config), CROSS_ENTROPY).result().logprobs
snapshot = engine.snapshot(lane, adapter).result()
request = GenerationRequest(tokens_T=np.array([3, 1, 4, 1, 5], np.int32), max_tokens=20, temperature=0.0)
row = engine.generate(snapshot, request).result().rows[0]
compiled = [c["program"] for c in engine.monitor.describe()["compiled"]]
answer = {"logprobs": np.concatenate(logprobs).tolist(), "tokens": row.tokens.tolist(), "compiled": compiled}
print(json.dumps(answer))
engine.close()
"""


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on({"data": 1}, CHILD, tmp_path_factory.mktemp("one") / "m")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_equal_one(mesh: dict[str, int], one_device: dict[str, Any], tmp_path: Path) -> None:
    eight = run_on(mesh, CHILD, tmp_path / "m")
    np.testing.assert_allclose(eight["logprobs"], one_device["logprobs"], atol=1e-4)
    assert eight["tokens"] == one_device["tokens"]
    assert len(eight["compiled"]) == len(set(eight["compiled"])) + 1  # forward twice: with and without saving
