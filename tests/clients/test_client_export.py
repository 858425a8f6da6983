"""Does a client's export hold its adapter, and does it come back as a run?"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pyrage
import pytest
import tinker

import jax_client
from jax_client import types
from jax_client.runs.lifecycle.export import import_adapter
from jax_client.weights.write.peft import read_adapter
from support.golden_cases import CASES, base_values, sequences
from support.weight_files import write_hf

CASE = CASES["qwen2_untied"]


def test_an_export_holds_the_adapter_and_comes_back(tmp_path: Path) -> None:
    model = str(write_hf(tmp_path / "model", CASE, base_values(CASE)))
    config = jax_client.EngineConfig(
        dtype="float32", state_dir=tmp_path / "state", compilation_cache_dir="", precompile=False
    )
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(s["tokens"].tolist()),
            loss_fn_inputs={"target_tokens": s["targets"].tolist()},
        )
        for s in sequences(CASE)
    ]

    def logprobs(client: jax_client.TrainingClient) -> np.ndarray:
        outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
        return np.concatenate([output["logprobs"].to_numpy() for output in outputs])

    with jax_client.ServiceClient(config=config) as service:
        client = service.create_lora_training_client(model, rank=4, seed=1).result()
        client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2))
        path = client.save_weights_external("out", ttl_seconds=3600).result().path
        assert path == f"tinker://{client.model_id}/external_weights/out"
        rest = service.create_rest_client()
        answer = rest.get_external_weights_urls(path).result()
        assert set(answer.urls) == {"adapter_config.json", "adapter_model.safetensors"}
        files = [Path(unquote(urlparse(url).path)) for url in answer.urls.values()]
        (directory,) = {file.parent for file in files}
        kept = client._run._engine.snapshot(client._run._lane, client._run._adapter).result().fetch()
        exported = read_adapter(directory, client._run._engine.model)
        for name, array in kept.weights.items():
            np.testing.assert_array_equal(exported.weights[name], array)
        listed = {c.checkpoint_id: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
        assert listed["external_weights/out"].checkpoint_type == "external"
        assert listed["external_weights/out"].expires_at == answer.expires
        for wrong in (client.load_state, service.create_training_client_from_state, service.create_sampling_client):
            with pytest.raises(tinker.BadRequestError, match="external_weights"):
                wrong(path)

        secret = pyrage.x25519.Identity.generate()
        for wrong, text in (
            ([], "has 0 keys"),
            (["age1x"], r"\[0\] is 'age1x', no X25519 public key"),
            ("age1x", "list"),
        ):
            with pytest.raises((tinker.BadRequestError, TypeError), match=text):
                client.save_weights_external("x", age_encryption_recipients=wrong)
        encrypted = client.save_weights_external("y", age_encryption_recipients=[str(secret.to_public())]).result().path
        urls = rest.get_external_weights_urls(encrypted).result().urls
        assert set(urls) == {"adapter_config.json.age", "adapter_model.safetensors.age"}
        for file in files:
            sealed = Path(unquote(urlparse(urls[f"{file.name}.age"]).path))
            assert [each for each in sealed.parent.iterdir() if each.suffix != ".age"] == [], "nothing readable is left"
            assert pyrage.decrypt(sealed.read_bytes(), [secret]) == file.read_bytes()

        imported = import_adapter(service._session.store, directory, model, "in")
        again = service.create_training_client_from_state(str(imported)).result()
        np.testing.assert_array_equal(logprobs(again), logprobs(client))
        with pytest.raises(tinker.BadRequestError, match="weights only"):
            service.create_training_client_from_state_with_optimizer(str(imported)).result()
