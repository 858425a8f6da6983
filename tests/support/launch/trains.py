"""A program for `jax_client launch` that trains over all hosts, and continues from its newest checkpoint.

    python tests/support/launch/trains.py DIRECTORY

A line says each step that is done. It ends by itself two steps after it has continued from a checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    """Train until told to end, or for two steps from a checkpoint."""
    import jax_client
    from support import number_hashes
    from support.golden_cases import CASES
    from support.hosts.child import model_of

    directory = Path(sys.argv[1])
    case, model = CASES["llama_tied"], directory / "model"
    if not model.exists():
        model_of("llama_tied", directory)
    data = number_hashes.datums(case)
    config = jax_client.EngineConfig(
        mesh={"fsdp": 2}, dtype="float32", precompile=False, compilation_cache_dir="", state_dir=directory / "state"
    )
    with jax_client.ServiceClient(config=config) as service:
        saved = service.create_rest_client().list_user_checkpoints().result().checkpoints
        if saved:
            newest = max(saved, key=lambda checkpoint: checkpoint.time).tinker_path
            client = service.create_training_client_from_state_with_optimizer(newest).result()
        else:
            client = service.create_lora_training_client(str(model), rank=4, seed=0).result()
        assert len(service.describe()["hosts"]) == 1, "of two hosts the other one"
        print("PROGRAM", os.getpid(), f"continues {newest}" if saved else "begins", flush=True)
        done = 0
        while not (saved and done == 2):
            client.forward_backward(data, "cross_entropy").result()
            metrics = client.optim_step(number_hashes.ADAM).result().metrics
            assert metrics is not None
            done += 1
            print("acknowledged", int(metrics["step:max"]), flush=True)


if __name__ == "__main__":
    main()
