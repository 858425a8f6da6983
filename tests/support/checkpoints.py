"""Which checkpoints do the tests save, and when are two of them the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jax_client.checkpoint.record import Record
from jax_client.checkpoint.store import CheckpointStore
from jax_client.values import AdapterState, CheckpointKey, Kind, LoraSpec

RUN = "0b1c2d3e-session:train:0"


def make_state(seed: int = 0, *, optimizer: bool = True) -> AdapterState:
    """Every bit pattern of float32 may occur: NaNs, infinities, denormals and both zeros."""
    rng = np.random.default_rng(seed)

    def group() -> dict[str, np.ndarray]:
        return {
            "q.A": rng.integers(0, 2**32, (2, 4, 8), dtype=np.uint32).view(np.float32),
            "q.B": np.full((2, 4, 1, 2, 3), -0.0, dtype=np.float32),
            "o.A": np.zeros((2, 4, 6), dtype=np.float32),
            "o.B": rng.standard_normal((8, 5)).astype(np.float32).T,
        }

    return AdapterState(
        spec=LoraSpec(rank=4, seed=seed, train_unembed=False),
        step=seed + 3,
        weights=group(),
        mu=group() if optimizer else None,
        nu=group() if optimizer else None,
    )


def assert_same(got: AdapterState, want: AdapterState) -> None:
    assert (got.spec, got.step) == (want.spec, want.step)
    for group in ("weights", "mu", "nu"):
        mine, theirs = getattr(got, group), getattr(want, group)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert mine.keys() == theirs.keys()
            for name, array in theirs.items():
                assert mine[name].dtype == np.float32 and mine[name].shape == array.shape
                assert mine[name].tobytes() == array.tobytes(), f"{group} {name}"


def key(name: str, kind: Kind = "weights", run_id: str = RUN) -> CheckpointKey:
    return CheckpointKey(run_id, kind, name)


def save(
    store: CheckpointStore, name: str, seed: int = 0, *, kind: Kind = "weights", run_id: str = RUN, **changes: Any
) -> Record:
    arguments = {"metadata": {"seed": seed}, "state": make_state(seed)} | changes
    return store.save(key=key(name, kind, run_id), **arguments)


def files_of(store_dir: Path, name: str) -> list[Path]:
    return sorted(path for path in store_dir.glob(f"runs/*/weights/{name}/**/*") if path.is_file())
