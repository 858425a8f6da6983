"""Does a sequence get the same logprobs in a shared row as in a call of its own?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jax_client.values import TrainExample
from support.golden_cases import CASES
from support.golden_engine import CROSS_ENTROPY, SPEC, open_engine


def test_packed_equals_alone(tmp_path: Path) -> None:
    """Sequences that share rows get the logprobs that each gets in a call of its own."""
    config = CASES["qwen3_tied"]
    engine = open_engine(tmp_path / "m", config)
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    rng = np.random.default_rng(4)
    data = []
    for n in (5, 30, 17, 40, 3):
        tokens = rng.integers(0, config["vocab_size"], n + 1).astype(np.int32)
        data.append(TrainExample(tokens_T=tokens[:-1], targets=tokens[1:]))
    together = engine.score_batch(lane, adapter, data, CROSS_ENTROPY).result().logprobs
    for sequence, packed in zip(data, together, strict=True):
        alone = engine.score_batch(lane, adapter, [sequence], CROSS_ENTROPY).result().logprobs[0]
        np.testing.assert_allclose(packed, alone, rtol=1e-6, atol=1e-6)
    engine.close()
