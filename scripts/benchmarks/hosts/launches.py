"""What do launches on another host cost? Steps and decode blocks on two loopback hosts beside one with as many devices.

    python scripts/benchmarks/hosts/launches.py [--rounds 3]

Both have two CPU devices in all, the collectives of several hosts (gloo), and a copy of the weights on each device. One
host is one process; two are two runs of `jax_client launch`, with Ray between them. They take turns, and the ratio is
that of two neighbours. Beside the times stands what the leading host spends on telling the other one: numbering arrays,
writing verbs, handing them to Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS, LENGTH, SAMPLES, TOKENS = 8, 256, 8, 64
STEPS = 6


def child(hosts: int) -> None:
    """Train and sample; print seconds of a step and of a sampled token's step as JSON."""
    from jax_client.engine.hosts import joining

    if hosts == 1:
        joining.join(f"127.0.0.1:{_free_port()}", 1, 0, 60)
    import numpy as np
    from tinker import types

    import jax_client
    from jax_client.engine.core.matmul_benchmark import matmul_rate
    from jax_client.engine.devices.leader import Leader

    told = _Clock()
    if hosts > 1:
        # All that a leading host does beside its own launch.
        for name in ("_flush", "_note", "_number_of"):
            setattr(Leader, name, told.of(getattr(Leader, name)))
    config = jax_client.EngineConfig(
        mesh={"data": 2}, dtype="float32", precompile=False, autosave_minutes=None, record_metrics=False
    )
    with tempfile.TemporaryDirectory() as state, jax_client.ServiceClient(config=_in(config, state)) as service:
        client = service.create_lora_training_client(MODEL, rank=32)
        rng = np.random.default_rng(0)
        tokens = rng.integers(100, 40_000, (ROWS, LENGTH + 1))
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1].tolist()),
                loss_fn_inputs={"target_tokens": row[1:].tolist(), "weights": [1.0] * LENGTH},
            )
            for row in tokens
        ]
        adam = types.AdamParams(learning_rate=1e-4)
        steps, told_steps = [], []
        for _ in range(STEPS):
            told.seconds, start = 0.0, time.perf_counter()
            passed = client.forward_backward(data, "cross_entropy")
            client.optim_step(adam).result()
            passed.result()
            steps.append(time.perf_counter() - start)
            told_steps.append(told.seconds)
        sampler = client.save_weights_and_get_sampling_client()
        prompt = types.ModelInput.from_ints(tokens[0][:16].tolist())
        params = types.SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=1, stop=[])
        blocks, told_blocks = [], []
        for _ in range(4):
            before = service.describe()["sampling"]["decode_blocks"]
            told.seconds, start = 0.0, time.perf_counter()
            sampler.sample(prompt, SAMPLES, params).result()
            count = service.describe()["sampling"]["decode_blocks"] - before
            blocks.append((time.perf_counter() - start) / count)
            told_blocks.append(told.seconds / count)
        found = {
            "step": statistics.median(steps[1:]),
            "told in a step": statistics.median(told_steps[1:]),
            "block": statistics.median(blocks[1:]),
            "told in a block": statistics.median(told_blocks[1:]),
        }
        if hosts == 1:
            import jax

            found["matmul"] = matmul_rate(jax.local_devices()[0], np.dtype(np.float32)) / 1e9
    print("FOUND", json.dumps(found), flush=True)


class _Clock:
    """Sums up the seconds in functions, those called by each other counted once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def of(self, function):  # type: ignore[no-untyped-def]
        def timed(*args, **kwargs):  # type: ignore[no-untyped-def]
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - start

        return timed


def _in(config, state):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(config, state_dir=state)


def _free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def run(hosts: int) -> dict[str, float]:
    """Return what a child on this number of hosts has measured."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(2 // hosts)}
    program = [sys.executable, str(Path(__file__).resolve()), "--child", str(hosts)]
    if hosts == 1:
        out = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        return _found(out.stdout, out.stderr)
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    launch = [str(Path(sys.executable).parent / "jax_client"), "launch", "--hosts", "127.0.0.1,127.0.0.2"]
    launch += ["--port", str(_free_port())]
    other = subprocess.Popen(
        [*launch, "--host-index", "1", "--", *program],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    out = subprocess.run(
        [*launch, "--host-index", "0", "--", *program], env=environment, capture_output=True, text=True, check=False
    )
    other.wait()
    return _found(out.stdout, out.stderr)


def _found(out: str, errors: str) -> dict[str, float]:
    lines = [line.removeprefix("FOUND ") for line in out.splitlines() if line.startswith("FOUND ")]
    if not lines:
        sys.exit(f"a child has failed:\n{errors[-4000:]}")
    return json.loads(lines[0])


def main() -> None:
    """Measure in rounds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    print(f"{MODEL}, float32, rank 32, {ROWS} x {LENGTH} tokens a step, {SAMPLES} samples of {TOKENS} tokens; ", end="")
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for i in range(options.rounds):
        one, two = run(1), run(2)
        print(f"round {i + 1}, matmul {one['matmul']:.0f} GFLOP/s a device")
        for what in ("step", "block"):
            told = two[f"told in a {what}"]
            print(
                f"  {what}: one host {one[what] * 1e3:.0f} ms, two {two[what] * 1e3:.0f} ms, ratio "
                f"{two[what] / one[what]:.2f}; telling {told * 1e3:.1f} ms, {100 * told / two[what]:.1f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
