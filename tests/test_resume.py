"""Is a resumed run the run that was never stopped? Ten steps against five, a save, a new process, a load and five."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from golden_cases import CASES, base_values
from weight_files import write_hf

CHILD = """
import hashlib, sys
import jax_client
from jax_client import types
from golden_cases import CASES, sequences

model, state_dir, first, last, path = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
config = jax_client.EngineConfig(dtype="float32", state_dir=state_dir, compilation_cache_dir="", precompile=False)
with jax_client.ServiceClient(config=config) as service:
    if path:
        client = service.create_training_client_from_state_with_optimizer(path).result()
    else:
        client = service.create_lora_training_client(base_model=model, rank=4, seed=11).result()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(s["tokens"].tolist()),
            loss_fn_inputs={"target_tokens": s["targets"].tolist(), "weights": s["weights"].tolist()},
        )
        for s in sequences(CASES["llama_tied"])
    ]
    for step in range(first, last):
        batch = [data[step % 3], data[(step + 1) % 3]]
        client.forward_backward(batch, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2, weight_decay=0.1)).result()
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    digest = hashlib.sha256(b"".join(o["logprobs"].to_numpy().tobytes() for o in outputs)).hexdigest()
    print(digest, client.save_state(f"at-{last}").result().path)
"""


def run(*args: object) -> tuple[str, str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", CHILD, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    digest, path = done.stdout.splitlines()[-1].split()
    return digest, path


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    config = CASES["llama_tied"]
    model = write_hf(tmp_path / "model", config, base_values(config))
    straight, _ = run(model, tmp_path / "straight", 0, 10, "")
    half, path = run(model, tmp_path / "state", 0, 5, "")
    resumed, _ = run(model, tmp_path / "state", 5, 10, path)
    assert resumed == straight != half
