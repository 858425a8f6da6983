"""What does a training step cost beside open pages? Steps beside five of them, and alone, in turns, in one process.

    python scripts/benchmarks/load/dashboards.py [--model NAME] [--pairs 20] [--pages 5]

A server of the page runs in a thread of this process, as in `jax_client serve`; each page is a connection of another
process to its stream, which shows the run that trains. It prints the ratio of the medians, and the quartiles of the
pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from urllib.parse import quote

import jax_client
from jax_client import types
from jax_client.cli.serve import listen, uvicorn_server
from jax_client.server import LOOPBACK
from jax_client.server.app import build_app
from jax_client.server.state.server import Server

BAR = 1.02
STEPS = 5  # of one turn


# Of another process, as a browser is: it counts what each page is sent.
READER = """
import selectors, socket, sys
host, port, path, number = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
watched, events, open_ = selectors.DefaultSelector(), 0, number
for _ in range(number):
    page = socket.create_connection((host, port))
    page.sendall(f"GET {path} HTTP/1.1\\r\\nHost: {host}:{port}\\r\\n\\r\\n".encode())
    watched.register(page, selectors.EVENT_READ)
watched.register(sys.stdin, selectors.EVENT_READ)
while True:
    for key, _ in watched.select():
        if key.fileobj is sys.stdin:
            print(events, flush=True)
            sys.exit()
        events += key.fileobj.recv(2**20).count(b"event: ")
"""


class Pages:
    """Open pages: connections of another process that read what the stream sends."""

    def __init__(self, port: int, run: str, number: int) -> None:
        path = f"/dashboard/api/stream?run={quote(run)}"
        command = [sys.executable, "-c", READER, "127.0.0.1", str(port), path, str(number)]
        self._reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> int:
        """Close the pages; return how many events they had."""
        return int(self._reader.communicate("\n", timeout=10)[0])


def seconds(client: jax_client.TrainingClient, data: list[types.Datum]) -> tuple[float, float]:
    """Return how long a step takes, and its processor time: the means of some."""
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    return (time.perf_counter() - start) / STEPS, (time.process_time() - processor) / STEPS


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--pages", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    asked = parser.parse_args()
    tokens = [(7 * i) % 1_000 + 3 for i in range(asked.length + 1)]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * asked.length},
    )
    with tempfile.TemporaryDirectory() as home:
        settings = jax_client.EngineConfig(state_dir=Path(home), autosave_minutes=None)
        server = Server(settings)
        listening = listen("127.0.0.1", 0)
        http = uvicorn_server(build_app(server, hosts=LOOPBACK, page=True))
        threading.Thread(target=partial(http.run, sockets=[listening]), daemon=True).start()
        port = listening.getsockname()[1]
        with jax_client.ServiceClient(config=settings) as service:
            client = service.create_lora_training_client(asked.model, rank=8).result()
            step = partial(seconds, client, [datum] * asked.batch)
            step()
            run, alone, beside, events = client.get_info().model_id, [], [], 0
            for _ in range(asked.pairs):
                alone.append(step())
                pages = Pages(port, run, asked.pages)
                time.sleep(1.5)  # what a page gets first is not a step's cost
                beside.append(step())
                events += pages.close()
                time.sleep(0.5)
        http.should_exit = True
    print(f"{asked.pages} pages, which read {events} events; {asked.pairs} pairs of {STEPS} steps")
    wall = compared("time", [each[0] for each in alone], [each[0] for each in beside])
    # Where other programs run too, this says more.
    compared("processor time", [each[1] for each in alone], [each[1] for each in beside])
    print(f"bar {BAR}: {'met' if wall <= BAR else 'missed'}")


def compared(name: str, alone: list[float], beside: list[float]) -> float:
    """Print two lists of seconds and their ratios; return the ratio of the medians."""
    low, middle, high = statistics.quantiles([b / a for a, b in zip(alone, beside, strict=True)], n=4)
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"{name} of a step: alone {statistics.median(alone):.4f} s, beside pages {statistics.median(beside):.4f} s")
    print(f"    ratio of the medians {ratio:.4f}; of the pairs: quartiles {low:.4f} {middle:.4f} {high:.4f}")
    return ratio


if __name__ == "__main__":
    main()
