"""Does the command line verify, delete, export and import checkpoints, and refuse what would lose one?"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_client
from support.command_line import GOOD, LATER, SAMPLER, damage
from support.golden_cases import CASES, base_values
from support.weight_files import write_hf


def test_verify_names_what_is_damaged(cli, home):
    done = cli("checkpoint", "verify")
    assert done.code == 0 and [line.split()[0] for line in done.out.splitlines()] == ["OK"] * 3
    file = damage(home, "runs/*aaaa*/weights/good/*/arrays/**/*")
    # A listing leaves out a checkpoint whose manifest is damaged; a check must not.
    manifest = damage(home, "runs/*bbbb*/weights/b/*/manifest.json")
    done = cli("checkpoint", "verify")
    lines = {line.split()[1]: line for line in done.out.splitlines()}
    assert done.code == 1 and set(lines) == {GOOD, SAMPLER, LATER}
    assert lines[GOOD].startswith("DAMAGED") and str(file) in lines[GOOD]
    assert lines[LATER].startswith("DAMAGED") and str(manifest) in lines[LATER]
    assert lines[SAMPLER].startswith("OK")
    done = cli("checkpoint", "verify", GOOD, "--json")
    (result,) = json.loads(done.out)
    assert (done.code, result["path"], result["status"], result["size_bytes"]) == (1, GOOD, "DAMAGED", None)
    assert str(file) in result["problem"]
    assert cli("checkpoint", "verify", SAMPLER).code == 0
    assert "has no checkpoint" in cli("checkpoint", "verify", GOOD.replace("good", "nope")).error(1)


class Terminal(io.StringIO):
    """Somebody at the keyboard, who types this."""

    def isatty(self) -> bool:
        return True


def test_delete_asks_on_a_terminal(cli, home, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    done = cli("checkpoint", "delete", GOOD, SAMPLER)
    assert done.code == 1 and "Delete 2 checkpoints for good?" in done.err and "Nothing was deleted" in done.err
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert cli("checkpoint", "delete", GOOD).code == 130
    assert len(cli("checkpoint", "list", "--json").json) == 3
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    done = cli("checkpoint", "delete", GOOD, SAMPLER)
    assert (done.code, done.out) == (0, f"deleted {GOOD}\ndeleted {SAMPLER}\n")
    assert [about["path"] for about in cli("checkpoint", "list", "--json").json] == [LATER]


def test_delete_refuses_without_a_terminal(cli, home, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "give --yes" in cli("checkpoint", "delete", GOOD).error(2)
    # One that is missing keeps the others.
    assert "has no checkpoint" in cli("checkpoint", "delete", GOOD, GOOD.replace("good", "nope"), "--yes").error(1)
    assert len(cli("checkpoint", "list", "--json").json) == 3
    # Damage is no reason to keep one; named twice, it is deleted once.
    damage(home, "runs/*aaaa*/weights/good/*/manifest.json")
    assert cli("checkpoint", "delete", GOOD, GOOD, "--yes").out == f"deleted {GOOD}\n"


def test_a_time_to_live_is_set_and_taken_back(cli, home):
    assert "(in 59 min)" in cli("checkpoint", "ttl", GOOD, "3600").out
    assert cli("checkpoint", "info", GOOD, "--json").json[0]["expires_at"] is not None
    assert cli("checkpoint", "ttl", GOOD, "never").out == f"{GOOD} expires never\n"
    assert cli("checkpoint", "info", GOOD, "--json").json[0]["expires_at"] is None
    assert "from 3600 to" in cli("checkpoint", "ttl", GOOD, "60").error(2)
    assert "'never'" in cli("checkpoint", "ttl", GOOD, "1h").error(2)
    assert "has no checkpoint" in cli("checkpoint", "ttl", GOOD.replace("good", "nope"), "3600").error(1)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint of a tiny model, and the client that saved it; every command gets `at`."""

    directory: Path
    model: str
    service: jax_client.ServiceClient
    client: Any
    path: str
    at: tuple[object, ...]

    def export(self, cli: Any, form: str, output: Path, *more: object) -> Any:
        return cli("checkpoint", "export", self.path, "--format", form, *more, "--output", output, *self.at)


DATUM = jax_client.types.Datum(
    model_input=jax_client.types.ModelInput.from_ints([1, 5, 9, 3]),
    loss_fn_inputs={"target_tokens": [5, 9, 3, 7], "weights": [1.0, 1.0, 1.0, 1.0]},
)


def logprobs(client: Any) -> np.ndarray:
    return client.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        case = CASES["llama_untied"]
        model = str(write_hf(directory / "model", case, base_values(case)))
        config = jax_client.EngineConfig(
            dtype="float32", state_dir=directory / "home", precompile=False, compilation_cache_dir="",
            autosave_minutes=None,
        )  # fmt: skip
        with jax_client.ServiceClient(config=config) as service:
            client = service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
            client.forward_backward([DATUM], "cross_entropy")
            client.optim_step(jax_client.types.AdamParams(learning_rate=1e-2)).result()
            path = client.save_state("trained").result().path
            at = ("--state-dir", directory / "home")
            yield Trained(directory=directory, model=model, service=service, client=client, path=path, at=at)


def test_an_adapter_is_exported_and_checked(cli, trained, tmp_path):
    exported = trained.export(cli, "peft", tmp_path / "out" / "peft")
    assert exported.code == 0, exported.err
    assert {p.name for p in (tmp_path / "out" / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert exported.out.splitlines()[-1].startswith("OK: read back, the files compute what the checkpoint")
    # Nothing is left beside it.
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["peft"]


def test_a_merged_model_is_exported_into_an_empty_directory_and_nothing_over_it(cli, trained, tmp_path):
    (tmp_path / "merged").mkdir()
    merged = trained.export(cli, "merged", tmp_path / "merged", "--dtype", "float32")
    assert merged.code == 0, merged.err
    assert merged.out.splitlines()[-1].startswith("OK: ")
    assert "is there already" in trained.export(cli, "peft", tmp_path / "merged").error(1)


def test_an_imported_adapter_scores_as_the_one_that_was_exported(cli, trained, tmp_path):
    expected = logprobs(trained.client)
    assert trained.export(cli, "peft", tmp_path / "peft").code == 0
    name = ("--base-model", trained.model, "--name", "back")
    done = cli("checkpoint", "import", tmp_path / "peft", *name, *trained.at)
    assert (done.code, done.err) == (0, "")
    imported = done.out.splitlines()[-1]
    assert imported.startswith("tinker://") and imported.endswith(":train:0/weights/back")
    resumed = trained.service.create_training_client_from_state(imported).result()
    np.testing.assert_array_equal(logprobs(resumed), expected)
    trained.client.load_state(imported).result()
    with pytest.raises(ValueError, match="weights only"):
        trained.client.load_state_with_optimizer(imported)
    (info,) = cli("runs", "info", imported.split("/")[2], "--json", *trained.at).json
    assert (info["base_model"], info["rank"], info["checkpoints"]) == (trained.model, 4, 1)


def test_what_does_not_fit_is_not_exported_or_imported(cli, trained, tmp_path):
    assert trained.export(cli, "peft", tmp_path / "peft").code == 0
    narrow = CASES["llama_tied"] | {"hidden_size": 16}
    small = write_hf(tmp_path / "small", narrow, base_values(narrow))
    assert "fit" in cli("checkpoint", "import", tmp_path / "peft", "--base-model", small, *trained.at).error(1)
    bad = cli("checkpoint", "import", tmp_path / "peft", "--base-model", trained.model, "--name", "../x", *trained.at)
    assert "'--name'" in bad.error(2)


def test_other_weights_under_the_same_name_are_noticed(cli, trained, tmp_path):
    case = CASES["llama_untied"]
    directory, values = trained.directory / "model", base_values(case)
    write_hf(directory, case, {name: value + 1 for name, value in values.items()})
    try:
        assert "trained on other weights" in trained.export(cli, "peft", tmp_path / "no").error(1)
    finally:
        write_hf(directory, case, values)
    assert not (tmp_path / "no").exists()


def test_the_default_adapter_of_a_tied_model_is_exported_for_peft(cli, trained, tmp_path):
    case = CASES["llama_tied"]
    model = str(write_hf(tmp_path / "tied", case, base_values(case)))
    client = trained.service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
    tied = replace(trained, path=client.save_state("tied").result().path)
    assert "--for peft" in tied.export(cli, "peft", tmp_path / "out").error(1)
    assert "--format merged" in tied.export(cli, "peft", tmp_path / "out", "--for", "vllm").error(1)
    assert not (tmp_path / "out").exists()
    for_peft = ("checkpoint", "export", tied.path, "--for", "peft", "--output", tmp_path / "out", *tied.at)
    done = cli(*for_peft)
    assert (done.code, "OK: read back" in done.out) == (0, True), done.err
    without = ("checkpoint", "export", tied.path, "--output", tmp_path / "no", *tied.at)
    assert "Missing option '--format'" in cli(*without).error(2)


def test_an_export_that_fails_leaves_nothing(cli, home, tmp_path, monkeypatch):
    monkeypatch.setattr("jax_client.runs.lifecycle.export.resolve", lambda name: 1 / 0)
    assert cli("checkpoint", "export", GOOD, "--format", "peft", "--output", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()
