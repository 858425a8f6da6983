"""What does a training step cost beside open pages? Steps beside five of them, and alone, in turns, in one process.

    python scripts/benchmarks/load/dashboards.py [--model NAME] [--pairs 20] [--pages 5]

A server of the page runs in a thread of this process, as in `jax_client serve`; each page is a browser's connection to
its stream, which shows the run that trains. It prints the ratio of the medians, and the quartiles of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
import urllib.request
from functools import partial
from http.client import HTTPResponse
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


class Pages:
    """Open pages: connections that read what the stream sends."""

    def __init__(self, address: str, run: str, number: int) -> None:
        self.events = 0
        self._address = f"{address}/dashboard/api/stream?run={quote(run)}"
        self._open: list[HTTPResponse] = []
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        answer = urllib.request.urlopen(self._address)
        self._open.append(answer)
        try:
            for line in answer:
                self.events += line.startswith(b"event:")
        except (OSError, ValueError, AttributeError):
            pass  # it was closed

    def close(self) -> None:
        """Close the pages."""
        import socket

        for answer in self._open:
            answer.fp.raw._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        for thread in self._threads:
            thread.join(10)


def seconds(client: jax_client.TrainingClient, data: list[types.Datum]) -> float:
    """Return how long a step takes, the mean of some."""
    start = time.perf_counter()
    for _ in range(STEPS):
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    return (time.perf_counter() - start) / STEPS


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
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with jax_client.ServiceClient(config=settings) as service:
            client = service.create_lora_training_client(asked.model, rank=8).result()
            step = partial(seconds, client, [datum] * asked.batch)
            step()
            run, alone, beside, events = client.get_info().model_id, [], [], 0
            for _ in range(asked.pairs):
                alone.append(step())
                pages = Pages(address, run, asked.pages)
                time.sleep(1.5)  # what a page gets first is not a step's cost
                beside.append(step())
                pages.close()
                events += pages.events
                time.sleep(0.5)
        http.should_exit = True
    ratios = [b / a for a, b in zip(alone, beside, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"alone {statistics.median(alone):.4f} s, beside {asked.pages} pages {statistics.median(beside):.4f} s")
    print(f"ratio of medians {ratio:.4f}; of pairs: quartiles {low:.4f} {middle:.4f} {high:.4f}; {events} events read")
    print(f"bar {BAR}: {'met' if ratio <= BAR else 'missed'}")


if __name__ == "__main__":
    main()
