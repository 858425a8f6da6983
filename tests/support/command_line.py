"""What do the tests of the command line share? A state directory with checkpoints, and what a command left behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_client.checkpoint.store import CheckpointStore
from jax_client.values import AdapterState, CheckpointKey, LoraSpec
from support.children import STRICT

# `python -c`: the command line; the SDK would import torch, for seconds.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from jax_client.cli import main; sys.exit(main())"
RUN, OTHER = "0b1c2d3e-aaaa:train:0", "0b1c2d3e-bbbb:train:0"
GOOD, SAMPLER, LATER = (
    f"tinker://{RUN}/weights/good",
    f"tinker://{RUN}/sampler_weights/good",
    f"tinker://{OTHER}/weights/b",
)
SPEC = LoraSpec(rank=4, seed=0, train_unembed=False)


def state(step: int, optimizer: bool) -> AdapterState:
    arrays = {"q.A": np.full((2, 4, 8), step, np.float32), "q.B": np.zeros((2, 4, 6), np.float32)}
    moments = arrays if optimizer else None
    return AdapterState(spec=SPEC, step=step, weights=arrays, mu=moments, nu=moments)


def fill(home: Path) -> Path:
    """Save two runs: one with a training and a sampler checkpoint, one with a training checkpoint."""
    store = CheckpointStore(home)
    for run, model in ((RUN, "org/model"), (OTHER, "org/model")):
        described = {"session_id": run[:13], "base_model": model, "spec": asdict(SPEC), "created": time.time()}
        store.put_run(run, described | {"user_metadata": {"note": "first\ttry"} if run == RUN else None})
    for run, kind, name, step in (
        (RUN, "weights", "good", 3),
        (RUN, "sampler_weights", "good", 3),
        (OTHER, "weights", "b", 7),
    ):
        store.save(
            key=CheckpointKey(run, kind, name),
            state=state(step, kind == "weights"),
            metadata={
                "base_model": "org/model",
                "base_fingerprint": "f",
                "spec": asdict(SPEC),
                "step": step,
                "optimizer": {"name": "adamw"} if kind == "weights" else None,
                "user_metadata": None,
            },
        )
    return home


class Result:
    """What a command left: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def settings(self) -> dict[str, tuple[str, str]]:
        """The value and the source of each setting that `--show-config` printed."""
        assert self.code == 0, self.err
        header, *rows = self.out.splitlines()
        at = [header.index(name) for name in ("SETTING", "VALUE", "SOURCE")]
        return {row[: at[1]].strip(): (row[at[1] : at[2]].strip(), row[at[2] :]) for row in rows}

    @property
    def json(self) -> Any:
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)

    def error(self, code: int) -> str:
        """The one line that an error is; nothing is on stdout."""
        assert (self.code, self.out, self.err.count("\n")) == (code, "", 1), (self.code, self.out, self.err)
        assert self.err.startswith("error: ")
        return self.err


def damage(home: Path, pattern: str) -> Path:
    path = next(path for path in sorted(home.glob(pattern)) if path.is_file() and path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def python(*code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*STRICT, "-c", "\n".join(code)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)


def stages_of(lines: list[str]) -> list[str]:
    """What the lines begin with; one that takes long is said again."""
    return list(dict.fromkeys(line.split()[0] for line in lines))


def write_archive(path: Path) -> Path:
    """Write the package's modules into a zip file, in the layout of its wheel; return its path."""
    root = Path(__file__).parents[2]
    with zipfile.ZipFile(path, "w") as file:
        for folder, parent in (("jax_client", ""), ("models", "jax_client/"), ("losses", "jax_client/")):
            for source in sorted((root / folder).rglob("*.py")):
                file.write(source, f"{parent}{source.relative_to(root)}")
    return path
