"""Does a server under every attack at once keep its memory, and does an honest client beside it lose nothing?

It starts `jax_client serve` on a tiny model, trains and samples with the SDK, attacks meanwhile with the threads of
tests/support/server/attacks.py, and prints the resident memory: before, its peak, and some minutes after.

    python scripts/probes/soak.py --minutes 20
    python scripts/probes/soak.py --minutes 2 --rest 60
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import tinker
from tinker import types

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.server.attacks import KINDS, Attack
from support.server.serving import data, write_model

# The bars: what the resident memory may grow by, and what of it may be left.
# Sessions up to the quota stay until others need the room.
MOST_GROWTH_MB, MOST_LEFT_MB = 300, 150
KEY = "tml-soak"
ADAM = types.AdamParams(learning_rate=1e-3)
PROMPT = types.ModelInput.from_ints([3, 1, 4, 1, 5])
PARAMS = types.SamplingParams(max_tokens=8, temperature=1.0, seed=1, stop=[])


class Watch:
    """The resident memory of a process, looked at twice a second.

    Attributes:
        peak: the most so far, MB.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self.peak = 0
        threading.Thread(target=self._look, daemon=True).start()

    def now(self) -> int:
        """Return the resident memory, MB."""
        found = re.search(r"VmRSS:\s+(\d+) kB", self._path.read_text())
        return int(found[1]) // 1_000 if found else 0

    def _look(self) -> None:
        while self._path.exists():
            try:
                self.peak = max(self.peak, self.now())
            except OSError:
                return
            time.sleep(0.5)


class Honest:
    """A client that trains and samples, and counts what goes wrong.

    Attributes:
        rounds, failures: how often all of its calls succeeded, and what else they raised.
        slowest: seconds of the slowest round.

    Args:
        url: of the server.
        model: the base model.
    """

    def __init__(self, url: str, model: str) -> None:
        self.rounds, self.slowest = 0, 0.0
        self.failures: list[str] = []
        self._url, self._model = url, model
        self._service = self._connect()
        self._client = self.open_client(rank=4)

    def _connect(self) -> Any:
        return tinker.ServiceClient(base_url=self._url, api_key=KEY)

    def open_client(self, rank: int) -> Any:
        """Return a new training client."""
        return self._service.create_lora_training_client(base_model=self._model, rank=rank).result(timeout=300)

    def turn(self) -> None:
        """Train a step, and sample from the weights, from a checkpoint, and from the base model by a new client."""
        began = time.monotonic()
        try:
            passed, stepped = self._client.forward_backward(data(), "cross_entropy"), self._client.optim_step(ADAM)
            passed.result(timeout=300), stepped.result(timeout=300)
            samplers = [
                self._client.save_weights_and_get_sampling_client(),
                self._service.create_sampling_client(base_model=self._model).result(timeout=300),
                self._connect().create_sampling_client(base_model=self._model).result(timeout=300),
            ]
            for asked in [sampler.sample(PROMPT, 2, PARAMS) for sampler in samplers]:
                asked.result(timeout=300)
            self.rounds += 1
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}"[:500])
        self.slowest = max(self.slowest, time.monotonic() - began)


def serve(folder: Path, model: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server, and wait until it answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    code = "import sys; from jax_client.cli import main; sys.exit(main())"
    own = ["--state-dir", str(folder / "state"), "--port", str(port), "--api-key", KEY, "--dtype", "float32"]
    command = [sys.executable, "-c", code, "serve", "--model", model, *own]
    server = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return server, port
        except OSError:
            if server.poll() is not None:
                sys.exit("the server did not start.")
            time.sleep(0.2)


def compiles(port: int) -> bool:
    """Return whether the server compiles programs, now or a moment later."""
    for _ in range(10):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/healthz", headers={"X-API-Key": KEY})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if any(engine["compiling"] for engine in json.load(answer)["engines"]):
                return True
        time.sleep(0.5)
    return False


def main() -> None:
    """Run the soak; exit with 1 if the memory or an honest request was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of the attack")
    parser.add_argument("--rest", type=float, default=120.0, help="seconds after it, in which the memory comes back")
    parser.add_argument("--scale", type=float, default=1.0, help="how much each attacker holds")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="of attacks, all of them by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model = write_model(Path(folder))
        server, port = serve(Path(folder), model)
        watch = Watch(server.pid)
        honest = Honest(f"http://127.0.0.1:{port}", model)
        # Programs for an adapter such as the attackers' take memory that no attack explains.
        honest.open_client(rank=1)
        for _ in range(5):
            honest.turn()
        while compiles(port):  # which take memory of their own, in the background too
            honest.turn()
        before = watch.now()
        watch.peak = before
        print(f"before the attack: {before} MB, {honest.rounds} rounds", flush=True)
        attack = Attack(port, KEY, model, args.scale, args.kinds)
        attack.start()
        end, shown = time.monotonic() + 60 * args.minutes, time.monotonic()
        while time.monotonic() < end and server.poll() is None:
            honest.turn()
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                print(f"  {watch.now()} MB, peak {watch.peak} MB, {honest.rounds} rounds", flush=True)
            time.sleep(0.2)
        attack.stop()
        peak = watch.peak
        time.sleep(args.rest)
        honest.turn()
        after = watch.now()
        print(f"attacks: {dict(attack.counts)}")
        print(f"memory: {before} MB before, {peak} MB at the peak, {after} MB {args.rest:.0f} s after")
        print(f"honest client: {honest.rounds} rounds, slowest {honest.slowest:.1f} s, {len(honest.failures)} failures")
        for failure in honest.failures[:10]:
            print("   ", failure)
        sizes = {path.name: path.stat().st_size for path in Path(folder, "state").glob("*.sqlite*")}
        print("files:", ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sorted(sizes.items())))
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    kept = peak - before <= MOST_GROWTH_MB and after - before <= MOST_LEFT_MB
    sys.exit(not kept or bool(honest.failures))


if __name__ == "__main__":
    main()
