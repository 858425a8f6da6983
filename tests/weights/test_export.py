"""Do exported adapters and models compute in transformers and PEFT what they computed here, and theirs here?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_client.engine.core.requests import AdamSettings
from jax_client.engine.engine import Engine
from jax_client.errors import BadRequestError, NotFoundError, RequestFailedError, UnsupportedError
from jax_client.runs.lifecycle.export_check import check_export, probe_tokens
from jax_client.values import AdapterState, LoraSpec
from jax_client.weights.read.gguf import GgufReader, read_gguf
from jax_client.weights.read.load import read_config
from jax_client.weights.read.source import resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from jax_client.weights.write import shards
from jax_client.weights.write.adapter_names import PROJECTIONS
from jax_client.weights.write.merged import write_merged
from jax_client.weights.write.peft import read_adapter, write_adapter
from support.golden_cases import ADAM, CASES, base_values, sequences
from support.golden_engine import CROSS_ENTROPY, SPEC, data, open_engine
from support.weight_files import HF_CONFIG, hf_tensors, tokenizer_metadata, write_gguf, write_hf

# transformers', about what peft asks of it; it has nothing to do with the adapter.
PEFT_ITSELF = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
NO_HEAD = replace(SPEC, train_unembed=False)
LINEARS = [name for name in PROJECTIONS.values() if name != "lm_head"]
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Engine]]:
    """Open the engine of a case once; its model directory is `engine.source.path`."""
    engines: dict[str, Engine] = {}

    def get(case: str) -> Engine:
        if case not in engines:
            engines[case] = open_engine(tmp_path_factory.mktemp(case), CASES[case])
        return engines[case]

    yield get
    for engine in engines.values():
        engine.close()


def trained(engine: Engine, case: str, spec: LoraSpec) -> tuple[AdapterState, np.ndarray]:
    """Train three steps; return the adapter and its logprobs."""
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, spec).result()
    train(engine, case, adapter)
    logprobs = engine.score_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result().logprobs
    state = engine.snapshot(lane, adapter).result().fetch()
    engine.release(adapter)
    return state, np.concatenate(logprobs)


def train(engine: Engine, case: str, adapter: Any) -> None:
    lane = engine.open_lane()
    for _ in range(3):
        engine.train_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result()
        engine.optim_step(lane, adapter, AdamSettings(**ADAM | {"learning_rate": 1e-2})).result()


def directory(parent: Path, name: str = "export") -> Path:
    (parent / name).mkdir()
    return parent / name


def random_state(engine: Engine, spec: LoraSpec) -> AdapterState:
    lane = engine.open_lane()
    adapter = engine.open_adapter(lane, spec).result()
    state = engine.snapshot(lane, adapter).result().fetch()
    engine.release(adapter)
    rng = np.random.default_rng(5)
    return replace(
        state, weights={n: rng.normal(size=a.shape).astype(np.float32) * 0.1 for n, a in state.weights.items()}
    )


def engine_logits(engine: Engine, state: AdapterState | None) -> np.ndarray:
    return engine.logits(probe_tokens(engine.source, engine.model), state).result()


# --- with torch -------------------------------------------------------------------------------------------------------


def torch_model(path: Path) -> Any:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None].long()).logits[0].float().numpy()


def torch_logprobs(model: Any, case: str) -> Any:
    import torch

    rows = []
    for s in sequences(CASES[case]):
        tokens, targets = (torch.from_numpy(s[name]).long() for name in ("tokens", "targets"))
        logprobs = torch.log_softmax(model(tokens[None]).logits[0], -1)
        rows.append(logprobs.gather(-1, targets[:, None])[:, 0])
    return torch.cat(rows)


@PEFT_ITSELF
@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param("llama_tied", NO_HEAD, marks=pytest.mark.full),
        ("llama_untied", SPEC),
        ("qwen2_tied", NO_HEAD),
        pytest.param("qwen3_untied", SPEC, marks=pytest.mark.full),
    ],
)
def test_peft_computes_what_was_trained(
    case: str, spec: LoraSpec, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    state, expected = trained(engine, case, spec)
    out = directory(tmp_path)
    write_adapter(out, state, engine.model, "tiny")
    model = torch_model(engine.source.path)
    from peft import PeftModel

    found = torch_logprobs(PeftModel.from_pretrained(model, out), case).detach().numpy()
    np.testing.assert_allclose(found, expected, **CLOSE)
    check = check_export(engine, state, out)
    assert (check.tokens, check.difference) == (96, 0.0)


@PEFT_ITSELF
@pytest.mark.torch
@pytest.mark.parametrize("covered", ["train_attn", "train_mlp", "train_unembed"])
def test_peft_computes_a_part_of_the_modules(covered: str, engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("qwen3_untied")
    nothing = {"train_attn": False, "train_mlp": False, "train_unembed": False}
    state = random_state(engine, replace(SPEC, **nothing | {covered: True}))
    out = directory(tmp_path)
    write_adapter(out, state, engine.model, "tiny")
    assert read_adapter(out, engine.model).spec == state.spec
    model = torch_model(engine.source.path)
    from peft import PeftModel

    found = torch_logits(PeftModel.from_pretrained(model, out), probe_tokens(engine.source, engine.model))
    np.testing.assert_allclose(found, engine_logits(engine, state), **CLOSE)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("llama_tied", {"lora_alpha": 32}),
        ("llama_tied", {"lora_alpha": 16}),
        ("qwen2_tied", {"lora_alpha": 16, "use_rslora": True}),
        (
            "qwen3_untied",
            {"lora_alpha": 8, "alpha_pattern": {"mlp.up_proj": 3, "^model.layers.0.mlp.down_proj": 64}},
        ),
        ("qwen3_untied", {"lora_alpha": 32, "target_modules": [*LINEARS, "lm_head"]}),
        ("llama_tied", {"lora_alpha": 32, "target_modules": [*LINEARS, "lm_head"]}),
        ("qwen2_tied", {"lora_alpha": 32, "target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"}),
        ("qwen2_tied", {"lora_alpha": 32, "target_modules": "all-linear"}),
    ],
)
@PEFT_ITSELF
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_peft_computes_the_same_here(
    case: str, extra: dict[str, Any], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    model = torch_model(engine.source.path)
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 8, "target_modules": LINEARS, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | extra
    model = get_peft_model(model, LoraConfig(**settings))
    model.save_pretrained(tmp_path / "adapter")
    state = read_adapter(tmp_path / "adapter", engine.model)
    assert (state.spec.rank, state.step, state.mu, state.nu) == (8, 0, None, None)
    tokens = probe_tokens(engine.source, engine.model)
    np.testing.assert_allclose(engine_logits(engine, state), torch_logits(model, tokens), **CLOSE)


@PEFT_ITSELF
@pytest.mark.torch
def test_training_goes_on_as_in_peft(engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    case = "qwen3_untied"
    engine, lane = engine_of(case), engine_of(case).open_lane()
    model = torch_model(engine.source.path)
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 32, "target_modules": LINEARS, "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path / "adapter")
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (ADAM["beta1"], ADAM["beta2"])
    adam = torch.optim.AdamW(parameters, lr=1e-2, betas=betas, eps=ADAM["eps"], weight_decay=ADAM["weight_decay"])
    weights = torch.cat([torch.from_numpy(s["weights"]) for s in sequences(CASES[case])])
    for _ in range(3):
        (-(weights * torch_logprobs(model, case)).sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, ADAM["grad_clip_norm"])
        adam.step()
        adam.zero_grad()

    adapter = engine.open_adapter(lane, read_adapter(tmp_path / "adapter", engine.model)).result()
    before = engine.score_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result().logprobs
    train(engine, case, adapter)
    after = np.concatenate(engine.score_batch(lane, adapter, data(CASES[case]), CROSS_ENTROPY).result().logprobs)
    assert np.abs(after - np.concatenate(before)).max() > 0.1
    np.testing.assert_allclose(after, torch_logprobs(model, case).detach().numpy(), **CLOSE)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "spec"),
    [("llama_tied", NO_HEAD), ("llama_tied", SPEC), ("qwen2_untied", SPEC), ("qwen3_untied", None)],
)
def test_a_merged_model_computes_the_same(
    case: str, spec: LoraSpec | None, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engine_of(case)
    state = None if spec is None else random_state(engine, spec)
    out = directory(tmp_path)
    write_merged(out, engine.source, engine.model, state, dtype="float32", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    written = json.loads((out / "config.json").read_text())
    untied = spec is SPEC or "untied" in case
    assert (written["tie_word_embeddings"], written["dtype"]) == (not untied, "float32")
    tokens = probe_tokens(engine.source, engine.model)
    np.testing.assert_allclose(torch_logits(torch_model(out), tokens), engine_logits(engine, state), **CLOSE)
    check = check_export(engine, state, out)
    assert check.difference < 1e-4 < check.tolerance * 10


@pytest.mark.torch
def test_a_merged_gguf_computes_the_same(tmp_path: Path) -> None:
    from jax_client.config import EngineConfig

    config = HF_CONFIG | {"vocab_size": 300}
    tensors = {n: t if "norm" in n else 0.2 * t for n, t in hf_tensors(config).items()}
    path = write_gguf(tmp_path / "m.gguf", config, tensors, metadata=tokenizer_metadata())
    settings: dict[str, Any] = {"dtype": "float32", "compilation_cache_dir": "", "precompile": False}
    engine = Engine(resolve(str(path)), EngineConfig(**settings))
    state = random_state(engine, SPEC)
    out = directory(tmp_path)
    write_merged(out, engine.source, engine.model, state, dtype="float32")
    expected, tokens = engine_logits(engine, state), probe_tokens(engine.source, engine.model)
    assert check_export(engine, state, out).difference < 1e-4
    engine.close()
    np.testing.assert_allclose(torch_logits(torch_model(out), tokens), expected, **CLOSE)
    from transformers import AutoTokenizer

    text = "the thing 12\n\n in"
    assert AutoTokenizer.from_pretrained(out).encode(text) == load_tokenizer(engine.source).encode(text)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


# --- without torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_model_is_rewritten_exactly(dtype: Any, tmp_path: Path) -> None:
    config = HF_CONFIG | {"torch_dtype": "float16", "transformers_version": "4.0"}
    tensors = {name: t.astype(ml_dtypes.bfloat16) for name, t in hf_tensors(config).items()}
    source = resolve(str(write_hf(tmp_path / "m", config, tensors, n_shards=2)))
    (source.path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (source.path / "tokenizer.json").write_text("{}")
    (source.path / "modeling.py").write_text("")
    out = directory(tmp_path)
    write_merged(out, source, read_config(source), None, dtype=dtype)
    found = load_file(out / "model.safetensors")
    assert {t.dtype.name for t in found.values()} == {dtype}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.astype(np.float32))
    assert json.loads((out / "config.json").read_text()) == config | {"dtype": dtype, "torch_dtype": dtype}
    assert read_config(resolve(str(out))) == read_config(source)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_a_gguf_is_rewritten_exactly(tmp_path: Path) -> None:
    tensors = hf_tensors(HF_CONFIG)
    source = resolve(str(write_gguf(tmp_path / "m.gguf", HF_CONFIG, tensors, quantization="Q8_0")))
    out = directory(tmp_path)
    write_merged(out, source, read_config(source), None, dtype="float32")
    reader = GgufReader(read_gguf(source.path))
    for name, tensor in load_file(out / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, reader.read(name))
    assert replace(read_config(resolve(str(out))), family="") == replace(read_config(source), family="")


def test_bfloat16_stays_within_its_tolerance(engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("llama_untied")
    state = random_state(engine, SPEC)
    out = directory(tmp_path)
    write_merged(out, engine.source, engine.model, state)
    check = check_export(engine, state, out)
    assert 1e-4 < check.difference < check.tolerance / 2
    with pytest.raises(RequestFailedError, match="computes something else"):
        check_export(engine, None, out)


@pytest.mark.parametrize(("size", "kept"), [(0.1, True), (0.01, False)])
def test_an_adapter_that_bfloat16_rounds_away_is_said(
    size: float,
    kept: bool,
    engine_of: Callable[[str], Engine],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_of("llama_untied")
    base = {n: t.astype(ml_dtypes.bfloat16) for n, t in base_values(CASES["llama_untied"]).items()}
    source = resolve(str(write_hf(tmp_path / "m", CASES["llama_untied"], base)))
    state = random_state(engine, SPEC)
    state = replace(state, weights={n: a * size for n, a in state.weights.items()})
    for dtype in ("float32", "bfloat16"):
        assert caplog.messages == []
        write_merged(directory(tmp_path, dtype), source, engine.model, state, dtype=dtype)
    assert [message[:14] for message in caplog.messages] == ([] if kept else ["bfloat16 keeps"])


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("damage", ["value", "truncated"])
def test_a_damaged_export_is_found(form: str, damage: str, engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("qwen2_untied")
    state = random_state(engine, SPEC)
    out = directory(tmp_path)
    if form == "peft":
        write_adapter(out, state, engine.model, "tiny")
    else:
        write_merged(out, engine.source, engine.model, state)
    check_export(engine, state, out)
    (file,) = out.glob("*.safetensors")
    if damage == "value":
        tensors = load_file(file)
        name = next(n for n in tensors if "layers.1.self_attn.v_proj" in n and n.endswith("weight"))
        tensors[name] = tensors[name] * np.array(-1, tensors[name].dtype)
        save_file(tensors, file)
    else:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(RequestFailedError, match="export") as caught:
        check_export(engine, state, out)
    assert "export again" in str(caught.value)


def test_a_full_disk_is_said_before_anything_is_written(
    engine_of: Callable[[str], Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("llama_untied")
    state, out = random_state(engine, SPEC), directory(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    for write in (
        lambda: write_adapter(out, state, engine.model, "tiny"),
        lambda: write_merged(out, engine.source, engine.model, state),
    ):
        with pytest.raises(RequestFailedError, match=r"needs [\d,]+ bytes, but 1,000 are free"):
            write()
    assert list(out.iterdir()) == []


def test_an_adapter_on_a_tied_head_has_no_peft_form(engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = engine_of("llama_tied")
    state, out = random_state(engine, SPEC), directory(tmp_path)
    with pytest.raises(UnsupportedError, match="--format merged"):
        write_adapter(out, state, engine.model, "tiny")
    assert list(out.iterdir()) == []


def test_an_adapter_of_another_model_is_refused(engine_of: Callable[[str], Engine], tmp_path: Path) -> None:
    state = random_state(engine_of("llama_untied"), SPEC)
    other = engine_of("qwen3_untied")
    for write in (
        lambda: write_adapter(tmp_path, state, other.model, "tiny"),
        lambda: write_merged(tmp_path, other.source, other.model, state),
    ):
        with pytest.raises(BadRequestError, match=r"4 arrays differ, k.B: \(2, 4, 2, 8\) instead of \(2, 4, 2, 12\)"):
            write()


# --- refusals ---------------------------------------------------------------------------------------------------------

Change = Callable[[Path, dict[str, Any], dict[str, np.ndarray]], None]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def setting(**fields: Any) -> Change:
    return lambda path, config, tensors: config.update(fields)


def tensors_of(pattern: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    """Change, or for None remove, every tensor whose name has the pattern in it."""

    def apply(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if pattern in n]:
            new = change(tensors.pop(name))
            if new is not None:
                tensors[name] = new

    return apply


def extra(name: str, shape: tuple[int, ...]) -> Change:
    return lambda path, config, tensors: tensors.update({name: np.zeros(shape, np.float32)})


def only(*projections: str) -> Change:
    def apply(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config["target_modules"] = list(projections)
        for name in [n for n in tensors if not any(p in n for p in projections)]:
            del tensors[name]

    return apply


REFUSED: list[tuple[Change, type[Exception], str]] = [
    (setting(peft_type="IA3"), UnsupportedError, "peft_type is 'IA3'"),
    (setting(task_type="SEQ_CLS"), UnsupportedError, "task_type is 'SEQ_CLS'"),
    (setting(rank_pattern={"q_proj": 4}), UnsupportedError, "rank_pattern is"),
    (setting(use_dora=True), UnsupportedError, "use_dora is True"),
    (setting(bias="all"), UnsupportedError, "bias is 'all'"),
    (setting(modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save is"),
    (setting(layers_to_transform=[0]), UnsupportedError, "layers_to_transform is"),
    (setting(layer_replication=[[0, 1]]), UnsupportedError, "layer_replication is"),
    (setting(fan_in_fan_out=True), UnsupportedError, "fan_in_fan_out is True"),
    (setting(lora_bias=True), UnsupportedError, "lora_bias is True"),
    (setting(trainable_token_indices=[1]), UnsupportedError, "trainable_token_indices is"),
    (setting(init_lora_weights="pissa"), UnsupportedError, "init_lora_weights is 'pissa'"),
    (setting(a_field_of_tomorrow={"x": 1}), UnsupportedError, "a_field_of_tomorrow is"),
    (setting(use_dora=True, bias="all"), UnsupportedError, "and bias|and use_dora"),
    (setting(alpha_pattern={"(q|k)_proj": 3}), UnsupportedError, "alpha_pattern is"),
    (setting(r=0), BadRequestError, r"r is 0; expected an integer in 1\.\.512"),
    (setting(r="4"), BadRequestError, "r is '4'"),
    (setting(lora_alpha=float("nan")), BadRequestError, "lora_alpha is nan"),
    (setting(lora_alpha=0), BadRequestError, "lora_alpha is 0"),
    (setting(alpha_pattern={"q_proj": -1}), BadRequestError, r"alpha_pattern\['q_proj'\] is -1"),
    (setting(target_modules=[1]), BadRequestError, r"target_modules is \[1\]"),
    (setting(target_modules=LINEARS), BadRequestError, "but target_modules of adapter_config.json lists"),
    (setting(r=8), BadRequestError, r"0 missing, 32|\d+ misshapen"),
    (only("q_proj", "v_proj"), UnsupportedError, "covers q_proj, v_proj only; train_attn covers q_proj, k_proj"),
    (only("gate_proj"), UnsupportedError, "covers gate_proj only; train_mlp covers gate_proj, up_proj, down_proj"),
    (only("nothing"), BadRequestError, "none of its 0 tensors"),
    (tensors_of("layers.1", lambda t: None), BadRequestError, "14 missing, 0 misshapen, 0 extra"),
    (tensors_of("lora_A", lambda t: t.T.copy()), BadRequestError, "0 missing, 15 misshapen"),
    (tensors_of(Q, lambda t: t * np.nan), BadRequestError, f"1 not finite. First: {Q}"),
    (tensors_of(Q, lambda t: t.astype(np.int32)), UnsupportedError, "has dtype I32"),
    (tensors_of(Q, lambda t: t.astype(np.float64)), UnsupportedError, "has dtype F64"),
    (extra("base_model.model.model.embed_tokens.lora_embedding_A", (4, 64)), BadRequestError, "1 extra"),
    (extra(Q.replace("lora_A", "lora_A.default"), (4, 32)), BadRequestError, "1 extra"),
    (extra("base_model.model.lm_head.base_layer.weight", (65, 32)), BadRequestError, "1 misshapen"),
]


@pytest.fixture(scope="module")
def adapter_files(engine_of: Callable[[str], Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine, path = engine_of("llama_untied"), tmp_path_factory.mktemp("adapter")
    write_adapter(path, random_state(engine, SPEC), engine.model, "tiny")
    return path


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_other_adapters_are_refused_by_name(
    change: Change,
    error: type[Exception],
    message: str,
    adapter_files: Path,
    engine_of: Callable[[str], Engine],
    tmp_path: Path,
) -> None:
    config = json.loads((adapter_files / "adapter_config.json").read_text())
    tensors = load_file(adapter_files / "adapter_model.safetensors")
    change(tmp_path, config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(error, match=message) as caught:
        read_adapter(tmp_path, engine_of("llama_untied").model)
    assert type(caught.value) is error


def test_files_that_are_missing_damaged_or_pickled(
    adapter_files: Path, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    model = engine_of("llama_untied").model
    with pytest.raises(NotFoundError, match=r"looked for adapter_config\.json"):
        read_adapter(tmp_path, model)
    config = tmp_path / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(BadRequestError, match="not valid JSON"):
        read_adapter(tmp_path, model)
    shutil.copy(adapter_files / config.name, config)
    with pytest.raises(NotFoundError, match=r"looked for adapter_model\.safetensors"):
        read_adapter(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="pickled weights are not loaded"):
        read_adapter(tmp_path, model)
    raw = (adapter_files / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(raw[:-1])
    with pytest.raises(BadRequestError, match="The file is damaged"):
        read_adapter(tmp_path, model)


def test_another_alpha_is_scaled_into_b_and_said(
    adapter_files: Path, engine_of: Callable[[str], Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = engine_of("llama_untied").model, json.loads((adapter_files / "adapter_config.json").read_text())
    shutil.copy(adapter_files / "adapter_model.safetensors", tmp_path)
    changes = {"lora_alpha": 16, "alpha_pattern": {"k_proj": 32}, "lora_dropout": 0.05}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    expected = read_adapter(adapter_files, model).weights
    assert caplog.messages == []
    for name, array in read_adapter(tmp_path, model).weights.items():
        np.testing.assert_array_equal(array, expected[name] * (0.5 if name.endswith("B") and name != "k.B" else 1))
    assert ["multiplied by 0.5," in caplog.messages[0], "lora_dropout 0.05" in caplog.messages[1]] == [True, True]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_adapters_are_read(
    dtype: Any, adapter_files: Path, engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    model = engine_of("llama_untied").model
    shutil.copy(adapter_files / "adapter_config.json", tmp_path)
    halves = {n: t.astype(dtype) for n, t in load_file(adapter_files / "adapter_model.safetensors").items()}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    found, expected = read_adapter(tmp_path, model).weights, read_adapter(adapter_files, model).weights
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array.astype(dtype).astype(np.float32))
