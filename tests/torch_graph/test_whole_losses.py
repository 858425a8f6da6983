"""Do whole losses that were sent as graphs equal torch's, compiled once per shape, on a server without torch?"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from jax_client.torch_graph import program
from jax_client.torch_graph.graph import read_graph
from support.graphs.traced_losses import F, by_graph, by_torch, numbers, ppo, same, torch, wire

pytestmark = pytest.mark.torch


def dpo(logprobs, reference, mask, chosen):
    """Two answers per datum, side by side: [T, 2]."""
    margin = ((logprobs - reference) * mask).sum(0)
    reward = 0.1 * (margin[0] - margin[1]) * chosen
    loss = -F.logsigmoid(reward)
    return loss, {"custom/margin:mean": reward, "custom/right:mean": (reward > 0).float()}


def gspo(logprobs, logprobs_old, advantages, mask):
    log_s = ((logprobs - logprobs_old) * mask).sum() / torch.clamp(mask.sum(), min=1.0)
    ratio = torch.exp(log_s.detach() + logprobs - logprobs.detach())
    loss = -torch.min(ratio * advantages, torch.clip(ratio, 0.9, 1.1) * advantages).sum()
    return loss, {"custom/ratio:mean": log_s.exp()}


@pytest.mark.parametrize("seed", range(3))
def test_whole_losses_equal_torchs(seed: int) -> None:
    length = 5 + seed
    p, q, a = numbers(seed, (length,), (length,), (length,))
    mask = (np.arange(length) > 1).astype(np.float32)
    for loss in (ppo, gspo):
        names = {"p": 1, "logprobs_old": 1, "advantages": 1, "mask": 1}
        same(by_graph(*wire(loss, names), [p, q, a, mask]), by_torch(loss, [p, q, a, mask]))
    p, q = numbers(seed, (length, 2), (length, 2))
    arrays = [p, q, np.ones((length, 2), np.float32), np.array(1 - 2 * (seed % 2), np.float32)]
    names = {"p": 2, "reference": 2, "mask": 2, "chosen": 0}
    same(by_graph(*wire(dpo, names), arrays), by_torch(dpo, arrays))


def test_one_program_per_shape_and_no_more_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = program._Cache()
    monkeypatch.setattr(program, "_cache", cache)
    monkeypatch.setattr(program, "BYTES_AT_ONCE", 0)
    loss = program.GraphProgram(read_graph(*wire(lambda logprobs: (logprobs.sum() ** 2, {}), {"p": 1}), "loss"))
    batch = [numbers(i, (length,)) for i, length in enumerate((3, 5, 3, 7, 20))]
    loss.prepare(map(program.shapes_of, batch)).result(60)
    sizes = [each.equations for each in cache._programs.values()]
    assert len(sizes) == 3 and min(sizes) > 1  # of 3, of up to 16 and of up to 32 tokens
    monkeypatch.setattr(program, "MOST_EQUATIONS", sum(sizes) - 1)
    for _ in range(2):
        found = loss.prepare(map(program.shapes_of, batch)).result(60).evaluate(batch)
        for (p,), (value, gradient, _) in zip(batch, found, strict=True):
            assert value == pytest.approx(float(p.sum()) ** 2, rel=1e-5)
            np.testing.assert_allclose(gradient, np.full(len(p), 2 * p.sum()), rtol=1e-5)
        loss.prepare([program.shapes_of(numbers(1, (70,)))]).result(60)
        assert 1 < len(cache._programs) < 4
        assert sum(each.equations for each in cache._programs.values()) < sum(sizes)


def test_an_index_out_of_range_does_not_go_unseen() -> None:
    nodes, inputs = wire(lambda logprobs, n: (logprobs[n].sum(), {}), {"p": 1, "n": 1})
    loss, *_ = by_graph(nodes, inputs, [np.array([-0.5, -1.5, -0.5], np.float32), np.array([0, 7])])
    assert math.isnan(loss)


def test_a_server_needs_no_torch() -> None:
    nodes, inputs = wire(ppo, {"p": 1, "logprobs_old": 1, "advantages": 1, "mask": 1})
    arrays = [*numbers(1, (6,), (6,), (6,)), np.ones(6, np.float32)]
    about = {"session_id": "s", "name": "ppo", "inputs": inputs, "nodes": nodes}
    code = (
        "import json, sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from jax_client.server import app\nfrom jax_client.server.state import server\n"
        "from jax_client.server.wire import custom_losses\n"
        "about, arrays = json.load(sys.stdin)\n"
        "from jax_client.torch_graph.program import shapes_of\n"
        "arrays = [np.float32(a) for a in arrays]\n"
        "programs = custom_losses.custom_loss(about).program.prepare([shapes_of(arrays)]).result(60)\n"
        "loss = programs.evaluate([arrays])[0]\n"
        "print(json.dumps([loss[0], loss[1].tolist(), loss[2]]))"
    )
    sent = json.dumps([about, [a.tolist() for a in arrays]])
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, text=True, check=True)
    same(json.loads(done.stdout), by_torch(ppo, arrays))
