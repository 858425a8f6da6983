"""Do a scaled Llama and a scaled Qwen3 train and sample as transformers computes them?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker import types

import jax_client
from support.golden_cases import CASES, base_values, sequences
from support.weight_files import write_hf

pytestmark = pytest.mark.torch
SCALED: dict[str, dict[str, Any]] = {
    "llama with yarn": CASES["llama_tied"]
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen3 with linear": CASES["qwen3_tied"]
    | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


def logprobs_by_transformers(config: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """Return the logprob of each token but the first."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    keys = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class(model_class.config_class(**keys, attn_implementation="eager")).float().eval()
    weights = {name: torch.from_numpy(array) for name, array in base_values(config).items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    model.tie_weights()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1)
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]].numpy()


@pytest.mark.parametrize("case", SCALED)
def test_a_scaled_model_gives_the_logprobs_of_transformers(case: str, tmp_path: Path) -> None:
    config = SCALED[case]
    path = write_hf(tmp_path / "model", config, base_values(config))
    settings: dict[str, Any] = {"state_dir": tmp_path, "dtype": "float32", "compilation_cache_dir": ""}
    settings |= {"precompile": False, "record_metrics": False, "autosave_minutes": None}
    rows = [s["tokens"].tolist() for s in sequences(config)]
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * (len(row) - 1)},
        )
        for row in rows
    ]
    with jax_client.ServiceClient(config=jax_client.EngineConfig(**settings)) as service:
        client = service.create_lora_training_client(str(path), rank=4, seed=0).result()
        trained = client.forward(data, "cross_entropy").result()
        sampler = client.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=40, temperature=1.0, seed=5, stop=[])
        answer = sampler.sample(types.ModelInput.from_ints(rows[0]), 1, params).result().sequences[0]
    for row, output in zip(rows, trained.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(output["logprobs"].to_numpy(), logprobs_by_transformers(config, row), atol=1e-4)
    whole = [*rows[0], *answer.tokens]
    assert len(whole) > 3 * 16
    np.testing.assert_allclose(answer.logprobs, logprobs_by_transformers(config, whole)[len(rows[0]) - 1 :], atol=1e-4)
    # Without the scaling the test would see it.
    plain = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert np.abs(logprobs_by_transformers(plain, rows[1]) - logprobs_by_transformers(config, rows[1])).max() > 1e-2
