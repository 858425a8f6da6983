"""Do odd model directories load as what they are, with a warning or a message that names the way out?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.weights.read.gguf import read_gguf
from jax_client.weights.read.identity import fingerprint, identity
from jax_client.weights.read.load import read_config
from jax_client.weights.read.source import resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from jax_client.weights.write.merged import write_merged
from support.weight_files import HF_CONFIG, hf_tensors, tokenizer_metadata, write_gguf, write_hf
from support.weights.exports import directory
from support.weights.loading import assert_same, config, load

pytestmark = pytest.mark.usefixtures("empty_hub_cache")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CHAT = [{"role": "user", "content": "the thing"}]


def test_a_tied_flag_beside_another_head_is_said_with_both_ways_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = hf_tensors(config())
    tied = load(write_hf(tmp_path / "tied", config(), tensors))
    head = tensors[EMBEDDING].copy()
    assert_same(load(write_hf(tmp_path / "same", config(), tensors | {HEAD: head})), tied)
    assert caplog.messages == []
    head[3:5] += 0.25
    other = write_hf(tmp_path / "other", config(), tensors | {HEAD: head})
    assert_same(load(other), tied)
    assert "it differs in 2 of 64 rows, by up to 0.25" in caplog.text
    assert "set tie_word_embeddings to false in config.json; to keep the embedding without this warning" in caplog.text
    # Both ways out.
    (other / "config.json").write_text(json.dumps(config(tie_word_embeddings=False)))
    np.testing.assert_array_equal(load(other)["unembed_VD"], head)
    assert_same(load(write_hf(other, config(), tensors)), tied)
    assert len(caplog.messages) == 1
    load(write_hf(tmp_path / "shape", config(), tensors | {HEAD: head[1:]}))
    assert "its shape is (63, 32), and the embedding's (64, 32)" in caplog.messages[1]
    load(write_hf(tmp_path / "dtype", config(), tensors | {HEAD: head.astype(ml_dtypes.float8_e4m3fn)}))
    assert "its dtype is F8_E4M3, and the embedding's F32" in caplog.messages[2]


def test_a_missing_head_names_the_flag(tmp_path: Path) -> None:
    tensors = hf_tensors(config())
    path = write_hf(tmp_path / "m", config(tie_word_embeddings=False), tensors)
    with pytest.raises(BadRequestError, match=r'1 missing.*lm_head.*"tie_word_embeddings": true in config\.json'):
        load(path)
    del tensors["model.norm.weight"]
    with pytest.raises(BadRequestError, match=r"1 missing, .* with its own config\.json\.$"):
        load(write_hf(tmp_path / "n", config(), tensors))


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("dynamic", "is not planned. It changes nothing up to max_position_embeddings"),
        ("longrope", "is not planned"),
        ("su", "is not planned"),
        ("proportional", "is not planned"),
        ("spiral", "Use a model with one of them"),
    ],
)
def test_other_rope_types_are_named_with_the_way_out(kind: str, advice: str, tmp_path: Path) -> None:
    tensors = hf_tensors(config())
    for keys in (
        {"rope_scaling": {"type": kind, "factor": 4.0}},
        {"rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}},
    ):
        path = write_hf(tmp_path / "m", config(**keys), tensors)
        with pytest.raises(UnsupportedError, match=f"rope type '{kind}' is not supported; .*{advice}"):
            read_config(resolve(str(path)))
    gguf = write_gguf(tmp_path / "m.gguf", config(), tensors, metadata={"llama.rope.scaling.type": kind})
    with pytest.raises(UnsupportedError, match=f"rope.scaling.type is '{kind}', which is not .*{advice}"):
        read_config(resolve(str(gguf)))


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_gguf_rope_scalings_are_refused_with_the_layout_that_has_them(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), metadata={"llama.rope.scaling.type": kind})
    with pytest.raises(UnsupportedError, match=rf"scaling.type is '{kind}', .*Load the same model in Hugging Face"):
        read_config(resolve(str(path)))


def parts_of(tmp_path: Path, **more: Any) -> list[Path]:
    write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), part_tensors=8, **more)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_a_gguf_in_parts_is_read_from_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    parts = parts_of(tmp_path / "parts", metadata=tokenizer_metadata())
    assert [part.name for part in parts] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    whole = write_gguf(tmp_path / "m.gguf", config(), hf_tensors(config()), metadata=tokenizer_metadata())
    sources = [resolve(str(part)) for part in parts]
    assert {source.path for source in sources} == {parts[0]}
    assert read_config(sources[1]) == read_config(resolve(str(whole)))
    assert_same(load(parts[2]), load(whole))
    assert len(load_tokenizer(sources[0])) == 268
    before = fingerprint(sources[0]), identity(sources[0])
    changed = bytearray(parts[2].read_bytes())
    changed[-1] ^= 1
    parts[2].write_bytes(changed)
    assert fingerprint(sources[0]) != before[0]
    assert identity(sources[0]) != before[1]
    out = directory(tmp_path)
    write_merged(out, sources[0], read_config(sources[0]), None, dtype="float32")
    assert_same(load(out), load(parts[0]))


def test_a_gguf_whose_parts_are_not_all_there_is_refused_by_name(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    second = parts[1].read_bytes()
    for gone, asked in ((1, 0), (0, 2)):
        kept = parts[gone].read_bytes()
        parts[gone].unlink()
        with pytest.raises(NotFoundError, match=f"3 parts, and 1 of them are missing: {parts[gone].name}"):
            read_config(resolve(str(parts[asked])))
        parts[gone].write_bytes(kept)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(
        BadRequestError, match=r"part 2 of 3 by its metadata \(counted from 0\), and 1 of 3 by its name"
    ):
        read_gguf(parts[0])
    parts[1].write_bytes(second)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(
        BadRequestError, match=r"one of 3 parts, found by their names, such as NAME-00001-of-00003\.gguf"
    ):
        read_gguf(tmp_path / "renamed.gguf")


def test_named_chat_templates_leave_with_the_model(tmp_path: Path) -> None:
    c = HF_CONFIG | {"vocab_size": 300}
    named = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools {{ messages[0].content }}"}
    gguf = resolve(str(write_gguf(tmp_path / "m.gguf", c, hf_tensors(c), metadata=tokenizer_metadata() | named)))
    first = directory(tmp_path, "first")
    write_merged(first, gguf, read_config(gguf), None)
    second, source = directory(tmp_path, "second"), resolve(str(first))
    assert (first / "additional_chat_templates" / "tool_use.jinja").is_file()
    plain = identity(source)
    (first / "additional_chat_templates" / "more.jinja").write_text("more")
    assert identity(source) != plain
    write_merged(second, source, read_config(source), None)
    for found in (gguf, source, resolve(str(second))):
        tokenizer = load_tokenizer(found)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "plain"
        assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template="tool_use") == "tools the thing"
