"""Does the self-test pass where all is well, and does it find a planted fault and give it its name?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jax_client.cli.doctor.selftest import run_selftest
from jax_client.engine.core.requests import GeneratedRow
from jax_client.models.families.registry import config_from_hf
from jax_client.models.kernels.cache import small_turns
from jax_client.models.parts.attention import blockwise
from jax_client.selftest import goldens, kernels, meshes, rates, toy
from jax_client.selftest import run as selftest_run
from jax_client.selftest.outcome import ADAM, STEPS, Outcome, Trained
from jax_client.selftest.reference import Reference, adamw
from jax_client.selftest.row import Row
from jax_client.selftest.run import SelfTest, run
from jax_client.sharding import make_mesh
from support.golden_cases import CASES, GOLDENS, RANK, base_values, lora_values
from support.golden_engine import data, to_ours
from support.meshes.devices import with_devices


def failed(rows: Any) -> dict[str, str]:
    return {row.check: row.meaning for row in rows if row.verdict == "FAIL"}


@pytest.mark.parametrize("case", ["qwen3_tied", "qwen3_untied"])
def test_the_reference_computes_what_transformers_and_peft_do(case: str) -> None:
    config, golden = CASES[case], np.load(GOLDENS / f"{case}.npz")
    lora = to_ours(config, lora_values(config))
    logprobs, grads = Reference(config_from_hf(config, case), base_values(config), lora, RANK).gradients(data(config))
    for i, found in enumerate(logprobs):
        np.testing.assert_allclose(found, golden[f"logprobs.{i}"], atol=1e-5)
    for name, want in to_ours(config, {n: golden[f"grad.{n}"] for n in lora_values(config)}).items():
        assert np.linalg.norm(grads[name] - want) < 1e-5 * np.linalg.norm(want), name


def test_the_short_form_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "LENGTHS", (70, 1, 100))
    test = SelfTest(tmp_path, jax.devices()[:1])
    rows = list(run({"short": lambda: test.one_device("float32", sampling=False)}, lambda name: None))
    test.close()
    assert [row.check for row in rows] == [f"float32 {part}" for part in ("forward", "gradients", "optimizer step")]
    assert {row.verdict for row in rows} == {"PASS"}, rows
    assert json.loads(json.dumps(rows[0].values))["gap"] < 1e-4
    # The same programs, of an engine that was asked for bfloat16.
    mistaken = replace(test._alone["float32"], dtype="bfloat16")
    assert "wrong dtype: bfloat16" in failed(goldens.training_rows(mistaken, test._expected))["bfloat16 forward"]


@pytest.mark.full
def test_programs_that_compute_in_bfloat16_in_place_of_float32_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = selftest_run.open_engine
    monkeypatch.setattr(selftest_run, "open_engine", lambda source, dtype, devices: opened(source, "bfloat16", devices))
    test = SelfTest(tmp_path, jax.devices()[:1])
    found = failed(test.one_device("float32"))
    test.close()
    assert "wrong dtype: float32 was asked for" in found["float32 forward"]
    assert found.keys() >= {"float32 gradients", "float32 greedy sampling"}


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What an engine without a rounding error would make of the toy, what is expected of it, and the toy's weights."""
    monkeypatch.setattr(toy, "LENGTHS", (33, 1))
    monkeypatch.setattr(toy, "PROMPTS", (3, 9))
    monkeypatch.setattr(toy, "NEW_TOKENS", 3)
    model, tensors = config_from_hf(toy.Toy().config(), "toy"), toy.Toy().tensors()
    start, wanted = toy.adapter(model).weights, goldens.expected(model, tensors)
    reference, grads = Reference(model, tensors, start, toy.SPEC.rank), [wanted[1]] * STEPS
    samples = []
    for tokens_T in toy.prompts(model.vocab_size):
        logprobs = []
        for _ in range(toy.NEW_TOKENS):
            last_V = reference.logprobs(tokens_T)[-1]
            tokens_T = np.append(tokens_T, np.argmax(last_V)).astype(np.int32)
            logprobs.append(np.max(last_V))
        drawn = {"tokens": tokens_T[-toy.NEW_TOKENS :], "logprobs": np.asarray(logprobs, np.float32)}
        samples.append(GeneratedRow(**drawn, stop_reason="length"))
    training = Trained(logprobs=wanted[0], start=start, grads=grads, end=adamw(start, grads, ADAM), metrics={})
    found = Outcome(model=model, dtype="float32", attention="plain", training=training, samples=samples)
    return found, wanted, tensors


def test_a_wrong_dtype_is_found_by_name(right: Any) -> None:
    """An engine that says bfloat16 and computes in float32, and the reverse."""
    found, wanted, _ = right
    assert not failed(goldens.training_rows(found, wanted))
    ((check, meaning),) = failed(goldens.training_rows(replace(found, dtype="bfloat16"), wanted)).items()
    assert check == "bfloat16 forward" and meaning.startswith("wrong dtype: bfloat16")
    rounded = replace(found.training, logprobs=[logprobs + 0.02 for logprobs in wanted[0]])
    ((check, meaning),) = failed(goldens.training_rows(replace(found, training=rounded), wanted)).items()
    assert check == "float32 forward" and meaning.startswith("wrong dtype: float32")


def test_wrong_numbers_are_found_where_they_are(right: Any) -> None:
    found, wanted, tensors = right
    training, samples = found.training, found.samples
    unmoved = replace(training, end={**training.end, "q.A": training.start["q.A"]})
    assert list(failed(goldens.training_rows(replace(found, training=unmoved), wanted))) == ["float32 optimizer step"]
    turned = replace(training, grads=[{**wanted[1], "o.B": -wanted[1]["o.B"]}] * STEPS)
    assert "float32 gradients" in failed(goldens.training_rows(replace(found, training=turned), wanted))
    assert not failed(goldens.sampling_rows(found, tensors))
    nan = [replace(samples[0], logprobs=samples[0].logprobs * np.nan), *samples[1:]]
    assert list(failed(goldens.sampling_rows(replace(found, samples=nan), tensors))) == ["float32 greedy sampling"]
    other = [replace(samples[0], tokens=samples[0].tokens[::-1]), *samples[1:]]
    assert "float32 greedy tokens" in failed(goldens.sampling_rows(replace(found, samples=other), tensors))
    mesh = {"fsdp": 4, "tensor": 2}
    assert not failed([*meshes.training_rows(found, mesh, found), meshes.sampling_row(found, mesh, found)])
    row = meshes.sampling_row(replace(found, samples=other), mesh, found)
    assert (row.check, row.verdict) == ("mesh fsdp 4, tensor 2: sampling", "FAIL")
    its_own = replace(training, logprobs=[logprobs + 1e-3 for logprobs in training.logprobs])
    rows = meshes.training_rows(replace(found, training=its_own), mesh, found)
    assert list(failed(rows)) == ["mesh fsdp 4, tensor 2: forward"]


def test_a_kernel_of_the_wrong_head_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, mesh = blockwise(one_cpu=True), make_mesh("auto", jax.devices()[:1])

    def other_head(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return plain.forward(q, k[:, :, ::-1], v[:, :, ::-1], *rest)

    monkeypatch.setattr(kernels, "WIDTHS", (64,))
    monkeypatch.setattr(kernels, "DTYPES", ("bfloat16",))
    fast, wrong = (replace(plain, name=name) for name in ("fast", "wrong"))
    candidates = [fast, replace(wrong, forward=other_head), "absent: it is for others"]
    rows = {row.check: row for row in kernels.training_rows(mesh, candidates)}
    assert {check: row.verdict for check, row in rows.items()} == {
        "bfloat16 attention fast": "PASS",
        "bfloat16 attention wrong": "FAIL",
        "attention absent": "SKIP",
    }
    assert rows["attention absent"].meaning == "not used here: it is for others"
    paged = small_turns()
    turned = replace(paged, attend=lambda q, *rest: paged.attend(q[:, :, ::-1], *rest))
    assert {row.verdict for row in kernels.sampling_rows(mesh)} == {"PASS"}
    monkeypatch.setattr(kernels, "small_turns", lambda: turned)
    assert {row.verdict for row in kernels.sampling_rows(mesh)} == {"FAIL"}


def test_a_slow_device_is_found_by_name() -> None:
    chip = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    assert rates.peak_of(chip) == 197e12 and rates.peak_of(jax.devices()[0]) is None
    model = config_from_hf(rates.LARGE.config(), "large")
    engine: Any = SimpleNamespace(model=model, dtype=rates.BF16, mesh=SimpleNamespace(devices=np.array([chip], object)))
    wanted = rates.estimated(engine, (8, 2048), 8, 96)
    assert wanted is not None and wanted.tokens_per_second is not None and wanted.decode_seconds is not None
    assert wanted.tokens_per_second[0] > wanted.tokens_per_second[1] > 0
    slow, fast = (list(rates.rate_rows({"bfloat16": rate, "float32": 1e13}, 197e12)) for rate in (60e12, 150e12))
    assert [row.verdict for row in slow] == ["WARN", "PASS"] and slow[0].meaning.startswith("slow device")
    assert [row.verdict for row in fast] == ["PASS", "PASS"]
    assert rates.device_row({"TPU_0": 150e12, "TPU_1": 151e12, "TPU_2": 40e12}).meaning.startswith(
        "slow device: TPU_2."
    )
    assert rates.device_row({"TPU_0": 150e12, "TPU_1": 151e12}).verdict == "PASS"
    assert rates.training_verdict(900.0, 0.02, bar=True).meaning.startswith("slow training")
    assert rates.training_verdict(900.0, 0.02, bar=False).verdict == "PASS"


CHILD = """
import json, os, signal, sys
print(json.dumps({"environment": {"platform": "tpu"}}), flush=True)
print(json.dumps({"begins": "attention kernels"}), flush=True)
row = dict.fromkeys(("measured", "bar", "meaning"), "") | {"check": "a", "verdict": "PASS", "values": {}}
print(json.dumps({"row": row}), flush=True)
print("jaxlib said something", file=sys.stderr, flush=True)
if os.environ["ENDS"] == "kill":
    os.kill(os.getpid(), signal.SIGSEGV)
signal.pause()
"""


@pytest.mark.parametrize(("ends", "measured"), [("kill", "signal 11"), ("hang", "silent for 1 seconds")])
def test_a_device_that_does_not_come_back_is_reported(
    ends: str, measured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends_badly.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ENDS", ends)
    shown: list[dict[str, Any]] = []
    report = run_selftest(shown.append, seconds=30.0 if ends == "kill" else 1.0, module="ends_badly")
    assert report.rows == shown and report.environment == {"platform": "tpu"}
    assert report.failed == ["attention kernels"]
    assert measured in shown[-1]["measured"] and "jaxlib said something" in shown[-1]["meaning"]


def test_a_group_that_raises_fails_and_the_next_one_runs() -> None:
    def broken() -> list[Row]:
        raise NotImplementedError("no such kernel")

    begun: list[str] = []
    rows = list(run({"one": broken, "two": lambda: [Row(check="b")]}, begun.append))
    assert begun == ["one", "two"] and [row.verdict for row in rows] == ["FAIL", "PASS"]
    assert "NotImplementedError: no such kernel" in rows[0].meaning


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 8])
def test_the_whole_self_test_is_green_on_simulated_devices(count: int, tmp_path: Path) -> None:
    written, start = tmp_path / "report.json", time.monotonic()
    code = "import sys; from jax_client.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "doctor", "--selftest", "--json", str(written)]
    environment = with_devices(count) | {"JAX_CLIENT_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 180
    report = json.loads(written.read_text())["selftest"]
    verdicts = {row["check"]: row["verdict"] for row in report["rows"]}
    assert set(verdicts.values()) <= {"PASS", "SKIP"}, verdicts
    assert report["environment"]["count"] == count
    assert ("mesh fsdp 4, tensor 2: sampling" in verdicts) == (count == 8)
