"""Does the tracing of a loss end between two of its nodes when no one waits for it any more?"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from jax_client.torch_graph.graph import read_graph
from jax_client.torch_graph.program import GraphProgram
from jax_client.torch_graph.traced.compile_queue import CompileQueue, Job
from support.graphs.traced_losses import wire
from support.server.served_fake import wait_for

pytestmark = pytest.mark.torch
NODES = 50
SHAPES = (((7,), "float32"),)


def chain(logprobs: Any) -> Any:
    for _ in range(NODES):
        logprobs = logprobs.exp() - 1
    return logprobs.sum(), {}


def test_a_trace_that_no_one_waits_for_ends_at_its_next_node(monkeypatch: pytest.MonkeyPatch) -> None:
    program = GraphProgram(read_graph(*wire(chain, {"p": 1}), "mine"), queue=(queue := CompileQueue(2)))
    midway, go_on = threading.Event(), threading.Event()
    checks, check = [0], Job.check

    def slow(job: Job) -> None:
        checks[0] += 1
        if checks[0] == NODES // 2:
            midway.set()
            assert go_on.wait(60)
        check(job)

    monkeypatch.setattr(Job, "check", slow)
    answer = program.prepare([SHAPES])
    assert midway.wait(60) and program.progress() == "tracing loss 'mine' (sequences of any length)"
    answer.cancel()
    go_on.set()
    wait_for(lambda: not queue.running())
    assert checks[0] == NODES // 2 and program.progress() is None
    with pytest.raises(CancelledError):
        answer.result(0)
    # Nothing is left of it, and the next request traces the loss to its end.
    (loss, gradient, _) = program.prepare([SHAPES]).result(60).evaluate([[np.zeros(7, np.float32)]])[0]
    assert checks[0] > NODES and loss == 0.0 and gradient.shape == (7,)
