"""Does training compile little, fit into memory or say so, keep clients apart, and account for its work?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_client.engine.core import accounting, attention_check, matmul_benchmark, memory
from jax_client.engine.core.attention_check import agrees, objection
from jax_client.engine.core.programs import CompileRecord, Program, compiling
from jax_client.engine.core.requests import AdamSettings, LossSpec
from jax_client.engine.devices.compilation_cache import enable_compilation_cache
from jax_client.engine.engine import Engine
from jax_client.errors import RequestFailedError
from jax_client.models import lora_arrays
from jax_client.models.config import Experts, ModelConfig, Windows
from jax_client.models.parts import attention
from jax_client.models.parts.attention import Attention
from jax_client.sharding import make_mesh
from jax_client.values import LoraSpec, TrainExample
from support.golden_cases import CASES
from support.golden_engine import CROSS_ENTROPY, SPEC, open_engine

CONFIG = CASES["llama_tied"]
ADAM = AdamSettings(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=0.0)
POLICY = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


def data(count: int, length: int, seed: int = 0) -> list[TrainExample]:
    """Make datums that every loss accepts."""
    rng = np.random.default_rng(seed)
    tokens = lambda: rng.integers(0, CONFIG["vocab_size"], length).astype(np.int32)  # noqa: E731
    floats = lambda: rng.normal(size=length).astype(np.float32)  # noqa: E731
    return [
        TrainExample(tokens_T=tokens(), targets=tokens(), inputs={"advantages": floats(), "logprobs": floats() - 5})
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_engine(tmp_path_factory.mktemp("engine") / "m", CONFIG)
    yield engine
    engine.close()


def gradients(adapter: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in lora_arrays.flatten(adapter.grads).items()}


def test_only_a_new_rectangle_compiles(engine: Engine) -> None:
    """Not the number of datums, their lengths within a row, the loss, its settings or the learning rate."""
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    before = len(engine.monitor.describe()["compiled"])
    for i, name in enumerate(("cross_entropy", *POLICY)):
        loss = LossSpec(name=name, config={"beta": 0.1 * i} if name == "dro" else {})
        engine.train_batch(lane, adapter, data(1 + i, 10 + i), loss).result()
        engine.optim_step(lane, adapter, replace(ADAM, learning_rate=0.1**i)).result()
    custom = engine.train_batch(lane, adapter, data(2, 9), lambda p: (0.0, [np.zeros_like(a) for a in p], {}))
    custom.result()
    records = engine.monitor.describe()["compiled"][before:]
    assert sorted(record["program"] for record in records) == ["backward", "forward", "optim_step", "zeros"]
    assert all(record["cause"] == "first use" and record["bytes"] > 0 for record in records)


def test_what_a_datum_lacks_comes_from_the_settings(engine: Engine) -> None:
    plain, own = data(2, 5)
    own = replace(own, inputs={**own.inputs, "clip_low_threshold": np.full(5, 0.5, np.float32)})
    loss = LossSpec(name="ppo", config={"clip_low_threshold": 0.9, "clip_high_threshold": 1.2})
    (batch,) = engine.trainer.prepare([plain, own], loss).batches
    low = [
        batch.inputs["clip_low_threshold"][0, slot.start, 0] for slot in sorted(batch.plan.slots, key=lambda s: s.index)
    ]
    np.testing.assert_allclose(low, [0.9, 0.5])
    assert (batch.inputs["clip_high_threshold"][batch.real_BTC] == np.float32(1.2)).all()


def test_warmup_leaves_nothing_to_compile(engine: Engine) -> None:
    spec = LoraSpec(rank=3, seed=0)
    warmed = engine.warmup(spec, [300, 200], 1).result()
    add = {"add"} if engine.trainer.limits.concurrent > 1 else set()
    assert {record.program for record in warmed} == {"forward", "backward", "zeros", "optim_step"} | add
    before = len(engine.monitor.describe()["compiled"])
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, spec).result()
    for _ in range(2):
        engine.train_batch(lane, adapter, data(1, 300) + data(1, 200), CROSS_ENTROPY).result()
    engine.optim_step(lane, adapter, ADAM).result()
    assert engine.monitor.describe()["compiled"][before:] == []


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[Path]:
    """A compilation cache that is empty; a process has one, so the tests' common one is taken again afterwards."""
    yield tmp_path / "cache"
    enable_compilation_cache(os.environ["JAX_COMPILATION_CACHE_DIR"])


def test_a_second_start_compiles_nothing(tmp_path: Path, own_cache: Path) -> None:
    for start in range(2):
        engine = open_engine(tmp_path / "m", CONFIG, compilation_cache_dir=own_cache, precompile=True)
        lane = engine.open_lane()
        adapter = engine.open_adapter(lane, SPEC).result()
        engine.train_batch(lane, adapter, data(2, 9), CROSS_ENTROPY).result()
        engine.optim_step(lane, adapter, ADAM).result()
        engine._compiles.background.close(wait=True)  # type: ignore[union-attr]
        records = engine.monitor.describe()["compiled"]
        engine.close()
        assert {record["cause"] for record in records} == {"first use", "background"}
        assert {record["cached"] for record in records} == {start == 1}
    assert own_cache.stat().st_mode & 0o777 == 0o700


def exhausted(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")


@pytest.mark.parametrize("concurrent", [1, 2])
def test_out_of_memory_halves_the_micro_batch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrent: int
) -> None:
    """The call succeeds, adds its gradient once, and the smaller ceiling stays."""
    monkeypatch.setattr(memory, "choose_concurrency", lambda mesh: concurrent)
    engine = open_engine(tmp_path / "m", CONFIG)
    lane = engine.open_lane()
    adapter, twin = (engine.open_adapter(lane, SPEC).result() for _ in range(2))
    batch = data(8 * concurrent, 120)
    engine.train_batch(lane, adapter, batch, CROSS_ENTROPY).result()
    engine.train_batch(lane, twin, batch, CROSS_ENTROPY).result()
    expected = engine.train_batch(lane, twin, batch, CROSS_ENTROPY).result()
    backward = engine.trainer.programs.backward

    def small_only(*args: Any, **static: Any) -> Any:
        return backward(*args, **static) if args[2]["tokens_BT"].size <= 512 else exhausted()

    monkeypatch.setattr(engine.trainer.programs, "backward", small_only)
    result = engine.train_batch(lane, adapter, batch, CROSS_ENTROPY).result()
    for got, want in zip(result.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    for name, array in gradients(adapter).items():
        np.testing.assert_allclose(array, gradients(twin)[name], rtol=1e-4, atol=1e-4)
    assert engine.monitor.describe()["max_tokens_per_micro_batch"] == 512 * concurrent

    before = gradients(adapter)
    monkeypatch.setattr(engine.trainer.programs, "forward", exhausted)
    with pytest.raises(RequestFailedError, match="ran out of memory in a micro-batch of 1 x 256 tokens"):
        engine.train_batch(lane, adapter, batch, CROSS_ENTROPY).result()
    for name, array in gradients(adapter).items():
        np.testing.assert_array_equal(array, before[name])
    engine.close()


def test_two_micro_batches_at_once_are_two_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, results = data(12, 200), []
    for concurrent, tokens in ((1, 512), (2, 1024)):
        monkeypatch.setattr(memory, "choose_concurrency", lambda mesh, concurrent=concurrent: concurrent)
        engine = open_engine(tmp_path / "m", CONFIG, max_tokens_per_micro_batch=tokens)
        assert engine.monitor.describe()["micro_batches_at_once"] == concurrent
        lane = engine.open_lane()
        built_in, twin, custom = (engine.open_adapter(lane, SPEC).result() for _ in range(3))
        for adapter in (built_in, twin):
            for _ in range(2):
                engine.train_batch(lane, adapter, batch, CROSS_ENTROPY).result()
        for name, array in gradients(built_in).items():
            np.testing.assert_array_equal(array, gradients(twin)[name])
        engine.train_batch(lane, custom, batch, lambda p: (0.0, [np.full_like(a, -1.0) for a in p], {})).result()
        scored = engine.score_batch(lane, built_in, batch, CROSS_ENTROPY).result()
        results.append((scored.logprobs, gradients(built_in), gradients(custom)))
        engine.close()
    (logprobs, twice, once), (logprobs_2, twice_2, once_2) = results
    for one, two in zip(logprobs, logprobs_2, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    for name, array in twice.items():
        np.testing.assert_allclose(twice_2[name], array, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(once_2[name], once[name], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(2 * once[name], array, rtol=1e-4, atol=1e-4)


def test_what_cannot_fit_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(tmp_path / "m", CONFIG)
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 10_000)
    with pytest.raises(
        RequestFailedError, match=r"rank 512 needs .* \(adapter .*optimizer .*\), but 0.0 MiB are free.*rank"
    ):
        engine.open_adapter(lane, LoraSpec(rank=512, seed=0)).result()
    with pytest.raises(RequestFailedError, match=r"1 x 256 tokens needs .*activations.*remat='full'") as caught:
        engine.train_batch(lane, adapter, data(1, 9), CROSS_ENTROPY).result()
    assert caught.value.category == "user" and adapter.grads is None
    with pytest.raises(RequestFailedError, match=r"base model .* in float32 needs .*weights.*dtype='bfloat16'"):
        open_engine(tmp_path / "m2", CONFIG)
    engine.close()


def test_a_call_that_does_not_fit_runs_in_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused when the smallest that holds its longest sequence does not fit, and then nothing has changed."""
    monkeypatch.setattr(memory, "choose_concurrency", lambda mesh: 1)
    engine = open_engine(tmp_path / "m", CONFIG)
    lane, batch = engine.open_lane(), data(8, 120)
    adapter, twin = (engine.open_adapter(lane, SPEC).result() for _ in range(2))
    expected = engine.train_batch(lane, twin, batch, CROSS_ENTROPY).result()
    before = engine.trainer.limits
    room = sum(engine.trainer.memory.step(engine.trainer.remat(512), 512, SPEC).values())
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 10_000)
    with pytest.raises(RequestFailedError, match="1 x 256 tokens needs"):
        engine.train_batch(lane, adapter, batch, CROSS_ENTROPY).result()
    assert engine.trainer.limits == before and adapter.grads is None
    monkeypatch.setattr(memory, "available_bytes", lambda *_: room)
    result = engine.train_batch(lane, adapter, batch, CROSS_ENTROPY).result()
    assert engine.trainer.limits.tokens == 512 and "at most 512 tokens" in caplog.text
    for got, want in zip(result.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    engine.close()


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_own_cgroup", lambda controller: Path("" if controller else "box/inner"))
    device = jax.devices()[0]
    free = memory.available_bytes(device)
    (tmp_path / "box/inner").mkdir(parents=True)
    (tmp_path / "box/inner/memory.max").write_text("max\n")
    (tmp_path / "box/memory.max").write_text("1000000\n")
    (tmp_path / "box/memory.current").write_text("400000\n")
    assert memory.available_bytes(device) == 600_000 < free
    assert memory.available_bytes(device, 0.5) == 100_000


def test_an_accelerator_that_hides_its_memory_is_named(caplog: pytest.LogCaptureFixture) -> None:
    device: Any = SimpleNamespace(platform="gpu", memory_stats=dict)
    memory._warn_once.cache_clear()
    for _ in range(2):
        assert memory.available_bytes(device) > 0
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"{device} does not say how much memory it has, as with XLA_PYTHON_CLIENT_ALLOCATOR=platform or cuda_async"
    ]


@pytest.mark.parametrize(("free", "remat"), [(1e12, "none"), (4e6, "selective"), (1e5, "full")])
def test_remat_follows_the_memory(free: float, remat: str) -> None:
    config = model()
    assert memory.choose_remat(config, np.dtype(np.float32), 256, int(free)) == remat


def test_clients_do_not_touch_each_other(engine: Engine) -> None:
    """Interleaved, each gets exactly what it gets alone."""

    def run(clients: list[int]) -> dict[int, list[Any]]:
        lanes = {c: engine.open_lane() for c in clients}
        owned = {c: engine.open_adapter(lanes[c], LoraSpec(rank=4, seed=c)).result() for c in clients}
        out: dict[int, list[Any]] = {c: [] for c in clients}
        for step in range(3):
            for c in clients:
                out[c].append(engine.train_batch(lanes[c], owned[c], data(2, 20, 10 * c + step), CROSS_ENTROPY))
                engine.optim_step(lanes[c], owned[c], ADAM)
        return {c: [future.result().logprobs for future in futures] for c, futures in out.items()}

    together = run([1, 2, 3])
    for c in (1, 2, 3):
        for got, alone in zip(together[c], run([c])[c], strict=True):
            np.testing.assert_array_equal(np.stack(got), np.stack(alone))


def test_accounting(engine: Engine) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    engine.train_batch(lane, adapter, data(3, 60), CROSS_ENTROPY)
    metrics = engine.optim_step(lane, adapter, ADAM).result()
    assert metrics["padding_waste:mean"] == pytest.approx(1 - 180 / 256)
    assert (
        metrics["tokens_per_second:mean"] > 0 and 0 < metrics["matmul_fraction:mean"] <= metrics["limit_fraction:mean"]
    )
    assert engine.monitor.describe()["training"]["device_seconds"] > 0
    engine.train_batch(lane, adapter, data(1, 256), CROSS_ENTROPY)
    assert engine.optim_step(lane, adapter, ADAM).result()["padding_waste:mean"] == 0.0


def test_the_waits_of_queued_steps_are_counted_with_their_steps(engine: Engine) -> None:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, SPEC).result()
    before, steps = engine.monitor.usage()["training"]["queue_s"], []
    for _ in range(3):
        engine.train_batch(lane, adapter, data(2, 40), CROSS_ENTROPY)
        steps.append(engine.optim_step(lane, adapter, ADAM))
    waits = [step.result()["queue_seconds:sum"] for step in steps]
    assert all(waits)
    assert sum(waits) == pytest.approx(engine.monitor.usage()["training"]["queue_s"] - before)


def test_useful_flops_of_a_known_model() -> None:
    """Qwen3-4B at 4,096 tokens, rank 32 on all linear layers: 20.1 GFLOP a token, 28.3 with full recomputation."""
    qwen = ModelConfig(
        family="qwen3", vocab_size=151936, d_model=2560, d_ff=9728, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128,
        norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True, qk_norm=True, max_context=40960,
    )  # fmt: skip
    spec = LoraSpec(rank=32, seed=0, train_unembed=False)
    useful, _ = accounting.flops(qwen, spec, [4096], "none")
    _, hardware = accounting.flops(qwen, spec, [4096], "full")
    assert useful / 4096 == pytest.approx(20.1e9, rel=0.01)
    assert hardware / 4096 == pytest.approx(28.3e9 - 2 * 0.39e9, rel=0.03)  # the head is not recomputed here


def test_of_experts_those_of_a_token_count() -> None:
    """Qwen3-30B-A3B at 4,096 tokens: 4 x 3.04 billion weights at work, 6 x 64.5 million of the adapter, attention."""
    experts = Experts(count=128, per_token=8, d_ff=768, normalized=True)
    qwen = ModelConfig(
        family="qwen3_moe", vocab_size=151936, d_model=2048, d_ff=6144, n_layers=48, n_heads=32, n_kv_heads=4,
        head_dim=128, norm_eps=1e-6, rope_theta=1e6, tied_embeddings=False, qk_norm=True, max_context=40960,
        experts=experts,
    )  # fmt: skip
    useful, _ = accounting.flops(qwen, LoraSpec(rank=32, seed=0, train_unembed=False), [4096], "none")
    assert useful / 4096 == pytest.approx(4 * 3.04e9 + 6 * 64.5e6 + 3 * 2 * 4096 * 32 * 128 * 48, rel=0.005)


def model() -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=64, d_model=32, d_ff=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32,
        norm_eps=1e-5, rope_theta=1e4, tied_embeddings=True, max_context=512,
    )  # fmt: skip


def leaky(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: Any) -> Any:
    return attention.blockwise(False).forward(q, k, v, segments * 0, dtype)


def broken(*_: Any) -> Any:
    raise NotImplementedError("no such kernel on this device")


@pytest.mark.parametrize(("forward", "trusted"), [(None, True), (leaky, False), (broken, False)])
def test_a_kernel_that_leaks_is_not_trusted(forward: Any, trusted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Two packed documents must not see each other; nor may a kernel that does not run stop the start."""
    plain = attention.blockwise(True)
    candidate = Attention(name="candidate", forward=forward or plain.forward, backward=plain.backward, row_length=None)
    assert agrees(candidate, plain, make_mesh({"fsdp": 1}), model(), np.dtype(np.float32)) is trusted
    assert bool(caplog.records) is not trusted


def test_the_kernel_of_layers_without_a_window_is_tried() -> None:
    """Where a kernel leaves layers with windows to plain JAX, a probe with a window would say nothing of the kernel."""
    plain, windowed = attention.blockwise(False), replace(model(), windows=Windows(size=8, layers=(0,)))

    def forward(*args: Any, **extras: Any) -> Any:
        return plain.forward(*args, **extras) if "window" in extras else leaky(*args)

    candidate = replace(plain, name="candidate", forward=forward, lacks=frozenset({"window"}))
    for c in (model(), windowed):
        assert "is off by" in objection(candidate, plain, make_mesh({"fsdp": 1}), c, jnp.dtype(jnp.float32))


def test_a_kernel_that_cannot_be_loaded_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu: Any = SimpleNamespace(size=1, devices=np.array([SimpleNamespace(platform="gpu")], object))

    def gone(*_: Any, **__: Any) -> Attention:
        raise ImportError("no module named fused_attention")

    monkeypatch.setattr(attention_check, "cudnn", gone)
    chosen = attention_check.choose_attention(gpu, model(), jnp.dtype(jnp.bfloat16))
    assert chosen.name == "blockwise" and "no module named" in caplog.text


@pytest.mark.parametrize(
    ("platform", "size", "dtype", "refused"),
    [
        ("tpu", 8, "bfloat16", {"cudnn": "it is for NVIDIA GPUs, and this is a tpu"}),
        ("tpu", 1, "float32", {"splash": "it computes in bfloat16, and the model is float32"}),
        ("gpu", 8, "bfloat16", {"cudnn": "it does not run here: no such head width"}),
    ],
)
def test_the_reason_against_a_kernel_is_said(
    platform: str, size: int, dtype: str, refused: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh: Any = SimpleNamespace(
        size=size, is_multi_process=False, devices=np.array([SimpleNamespace(platform=platform)], object)
    )

    def gap(candidate: Attention, *_: Any) -> float:
        if candidate.name == "cudnn":
            raise NotImplementedError("no such head width")
        return 0.0

    made = replace(attention.blockwise(False), name="cudnn")
    monkeypatch.setattr(attention_check, "cudnn", lambda mesh, **_: made)
    monkeypatch.setattr(attention_check, "splash", lambda mesh: replace(made, name="splash"))
    monkeypatch.setattr(attention_check, "_largest_gap", gap)
    choice = attention_check.choose(mesh, model(), jnp.dtype(dtype))
    assert refused.items() <= choice.refused.items() and choice.attention.name not in choice.refused
    assert choice.failed == ("does not run" in str(refused))


def test_the_tpu_kernel_is_trusted() -> None:
    """Interpreted here; on a TPU the same check runs on the real kernel at every start."""
    mesh = make_mesh({"fsdp": 1})
    assert agrees(
        attention.splash(mesh, interpret=True), attention.blockwise(True), mesh, model(), np.dtype(np.float32)
    )


def test_a_compile_that_runs_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[CompileRecord] = []
    seen: list[Any] = []

    def traced(x: Any) -> Any:
        seen.append((compiling(log), compiling([])))
        return x + 1

    program = Program("traced", traced, log, describe=lambda x: "a shape")
    before = time.time()
    program(jnp.zeros(3))
    ((running, others),) = seen
    assert [(each["program"], each["shapes"]) for each in running] == [("traced", "a shape")] and others == []
    assert compiling(log) == [] and before <= log[0].ended_at <= time.time()


def test_only_units_for_bfloat16_choose_it_not_the_load_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    float32, bfloat16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    chosen = []
    # Zen 4, a slow moment of Zen 3 in float32, and Zen 3: GFLOP/s
    for rates in ({float32: 190, bfloat16: 330}, {float32: 80, bfloat16: 97}, {float32: 107, bfloat16: 64}):
        monkeypatch.setattr(matmul_benchmark, "matmul_rate", lambda device, dtype, rates=rates: rates[dtype])
        chosen.append(matmul_benchmark.faster_matmul_dtype(jax.devices()[0]))
    assert chosen == [bfloat16, float32, float32]
