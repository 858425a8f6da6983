"""What does a save cost: how long until it is acknowledged, beside the disk itself, and how much do steps notice?

    python scripts/benchmarks/bench_checkpoint.py              # all rows; the training rows need the demo extra's model
    python scripts/benchmarks/bench_checkpoint.py --rows save --repeats 9 --json out.json

- `save`: the state of a rank-32 adapter of SmolLM2 with Adam's moments. Time of `CheckpointStore.save`, beside that of
  writing as many bytes to one file and waiting for the disk, in turns.
- `large`: the same with a synthetic state of --gigabytes.
- `steps`: training steps of 8 sequences of --length tokens. Of each ten, the middle one has a save right before it;
  every other ten have none. The mean step of the tens with a save over that of those without, and the longest step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench_rows import machine, seconds
from jax_client.checkpoint.store import CheckpointStore
from jax_client.values import AdapterState, CheckpointKey, LoraSpec

console = Console(soft_wrap=True)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GROUP = 10
KEY = CheckpointKey("bench", "weights", "new")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--repeats", type=int, default=5, help="saves (`large`: 3 at most), and tens of steps of each sort"
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for key, value in machine().items():
        console.print(f"{key}: {value}")
    place = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    console.print(f"directory: on {_mount(place)}")
    results = {}
    try:
        for row in options.rows:
            results[row] = ROWS[row](options, place)
            show(row, results[row])
    finally:
        shutil.rmtree(place)
    if options.json:
        options.json.write_text(json.dumps({"conditions": machine(), "results": results}, indent=1))


def show(row: str, result: dict[str, Any]) -> None:
    table = Table(title=row)
    for column in ("what", "value"):
        table.add_column(column)
    for name, value in result.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)


def save(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    return _against_the_disk(place, _adapter_state(), options.repeats)


def large(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    elements = int(options.gigabytes * 1e9 / 4 / 3 / 16)
    rng = np.random.default_rng(0)
    groups = [{f"m{i}.A": rng.random(elements, np.float32) for i in range(16)} for _ in range(3)]
    state = AdapterState(spec=LoraSpec(rank=32, seed=0), step=1, weights=groups[0], mu=groups[1], nu=groups[2])
    return _against_the_disk(place, state, min(options.repeats, 3))


def _against_the_disk(place: Path, state: AdapterState, repeats: int) -> dict[str, Any]:
    store = CheckpointStore(place / "state")
    arrays = [array for group in (state.weights, state.mu, state.nu) for array in (group or {}).values()]
    _save(store, state)  # imports, and whatever else only the first one does
    store.delete(KEY)
    saves, writes = [], []
    turns = [
        lambda: saves.append(seconds(lambda: _save(store, state))),
        lambda: writes.append(seconds(lambda: _write_and_fsync(place / "plain", arrays))),
    ]
    for i in range(repeats):
        for turn in turns if i % 2 else turns[::-1]:
            turn()
        store.delete(KEY)
        (place / "plain").unlink()
    size = sum(array.nbytes for array in arrays)
    ratios = [saved / written for saved, written in zip(saves, writes, strict=True)]
    return {
        "bytes": size,
        "save s, median": statistics.median(saves),
        "save s, all": [round(s, 3) for s in saves],
        "write and fsync s, median": statistics.median(writes),
        "write and fsync s, all": [round(s, 3) for s in writes],
        "save over write, median of pairs": statistics.median(ratios),
        "save MB/s": size / 1e6 / statistics.median(saves),
        "disk MB/s": size / 1e6 / statistics.median(writes),
    }


def _save(store: CheckpointStore, state: AdapterState) -> None:
    store.save(key=KEY, state=state, metadata={})


def _write_and_fsync(path: Path, arrays: list[np.ndarray]) -> None:
    with open(path, "wb", buffering=0) as file:
        for array in arrays:
            file.write(memoryview(array).cast("B"))
        os.fsync(file.fileno())


def steps(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    import jax_client
    from jax_client import types

    config = jax_client.EngineConfig(state_dir=place / "runs", autosave_minutes=None)
    rng = np.random.default_rng(0)
    with jax_client.ServiceClient(config=config) as service:
        client = service.create_lora_training_client(MODEL, rank=32, train_unembed=False).result()
        tokens = rng.integers(0, 40_000, (8, options.length + 1))
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1].tolist()),
                loss_fn_inputs={"target_tokens": row[1:].tolist()},
            )
            for row in tokens
        ]

        def step() -> float:
            begun = time.perf_counter()
            client.forward_backward(data, "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-5)).result()
            return time.perf_counter() - begun

        for _ in range(3):
            step()
        times: dict[bool, list[list[float]]] = {True: [], False: []}
        acknowledged = []
        for i in range(2 * options.repeats):
            with_save = i % 2 == 0
            ten = []
            saving = None
            for number in range(GROUP):
                if with_save and number == GROUP // 2:
                    begun = time.perf_counter()
                    saving = client.save_state(f"s{i}", overwrite=True)
                    # Not awaited: the next step starts at once.
                    saving.future().add_done_callback(
                        lambda _, begun=begun: acknowledged.append(time.perf_counter() - begun)
                    )
                ten.append(step())
            if saving is not None:
                saving.result()
            times[with_save].append(ten)
    means = {key: [statistics.fmean(ten) for ten in tens] for key, tens in times.items()}
    ratios = [a / b for a, b in zip(means[True], means[False], strict=True)]
    return {
        "mean step s, tens with a save": statistics.median(means[True]),
        "mean step s, tens without": statistics.median(means[False]),
        "with over without, median of pairs": statistics.median(ratios),
        "pairs": [round(ratio, 3) for ratio in ratios],
        "longest step s with": max(max(ten) for ten in times[True]),
        "longest step s without": max(max(ten) for ten in times[False]),
        "acknowledged after s, median": statistics.median(acknowledged),
    }


def _adapter_state() -> AdapterState:
    from jax_client.models.lora_arrays import array_shapes
    from jax_client.weights.read.load import read_config
    from jax_client.weights.read.source import resolve

    spec = LoraSpec(rank=32, seed=0, train_unembed=False)
    shapes = array_shapes(read_config(resolve(MODEL)), spec)
    rng = np.random.default_rng(0)
    groups = [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(3)]
    return AdapterState(spec=spec, step=1, weights=groups[0], mu=groups[1], nu=groups[2])


def _mount(path: Path) -> str:
    from jax_client.checkpoint.disk.files import file_system

    return f"a file system of type {file_system(path)}"


ROWS = {"save": save, "large": large, "steps": steps}

if __name__ == "__main__":
    main()
