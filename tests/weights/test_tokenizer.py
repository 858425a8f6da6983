"""Does a tokenizer from a GGUF file or a directory give the ids that the model was trained on?"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, cast

import pytest

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.runs.checks.stop_strings import StopStrings
from jax_client.weights.decoder import Decoder
from jax_client.weights.read.source import EMBEDDED_MODEL, ModelSource, resolve
from jax_client.weights.read.tokenizer import load_tokenizer
from support.weight_files import HF_CONFIG, byte_level_vocabulary, hf_tensors, tokenizer_metadata, write_gguf, write_hf

TEXTS = [
    "Hello, world!",
    "the thing 1234 + 12.5e-3 = ½ ²³ ٣٤",
    "  leading,   many   and trailing spaces  ",
    "def f(x):\n\treturn x ** 2  # naïve\r\n\n\n    end",
    "日本語 한국어 Ελληνικά 🤖👩‍👩‍👧 e\u0301 \u00a0\u200b",
    "don't WE'LL they've\x00\x7f",
    "",
    "<|im_start|>user\nhi<|im_end|>\n",
]
CHAT = [{"role": "user", "content": "the thing"}]


def gguf(
    tmp_path: Path, pre: str = "smollm", vocab_size: int = 512, metadata: dict[str, Any] | None = None
) -> ModelSource:
    c = HF_CONFIG | {"vocab_size": vocab_size}
    path = write_gguf(tmp_path / "m.gguf", c, hf_tensors(c), metadata=tokenizer_metadata(pre) | (metadata or {}))
    return resolve(str(path))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gguf(tmp_path))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_roles_and_specials(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gguf(tmp_path))
    roles = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert roles == (0, 1, 2, 2)
    assert tokenizer.model_max_length == 128
    assert tokenizer.decode(tokenizer.encode("<|im_start|>the<|im_end|>"), skip_special_tokens=True) == "the"


def test_digits_stay_single_in_smollm(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gguf(tmp_path))
    assert tokenizer.tokenize("12 the the") == ["1", "2", "Ġthe", "Ġthe"]


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gguf(tmp_path))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe thing<|im_end|>\n<|im_start|>assistant\n"
    own = load_tokenizer(gguf(tmp_path, metadata={"tokenizer.chat_template": "{{ messages[0]['content'] }}!"}))
    assert own.apply_chat_template(CHAT, tokenize=False) == "the thing!"


def test_bos_only_where_the_file_asks(tmp_path: Path) -> None:
    assert load_tokenizer(gguf(tmp_path)).encode("the")[0] != 1
    with_bos = load_tokenizer(gguf(tmp_path, metadata={"tokenizer.ggml.add_bos_token": True}))
    assert with_bos.encode("the")[0] == 1
    assert with_bos.encode("the", add_special_tokens=False)[0] != 1


def test_qwen2_equals_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    tokens, merges = byte_level_vocabulary()
    pairs: Any = [tuple(m.split(" ")) for m in merges]
    reference = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs)
    tokenizer = load_tokenizer(gguf(tmp_path, "qwen2"))
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text) == reference.encode(text), text


def test_unknown_splitting_rule(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'tekken'.*'smollm', 'qwen2'.*Hugging Face layout"):
        load_tokenizer(gguf(tmp_path, "tekken"))


def test_a_vocabulary_larger_than_the_embedding_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_tokenizer(gguf(tmp_path, vocab_size=266))) == 268
    assert "has ids that the embedding, of 266 rows, has not: 266 'ing', 267 'ĠĠ'. Data" in caplog.messages[0]
    load_tokenizer(gguf(tmp_path, vocab_size=64))
    assert re.search(r"has not: 64 '.', .*, 68 '.' and 199 more\. Data", caplog.messages[1])


def test_damaged_gguf_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="the merges do not fit"):
        load_tokenizer(gguf(tmp_path, metadata={"tokenizer.ggml.merges": ["nothere neither"]}))
    with pytest.raises(BadRequestError, match="bos_token_id is 9999, but there are 268 tokens"):
        load_tokenizer(gguf(tmp_path, metadata={"tokenizer.ggml.bos_token_id": 9999}))
    with pytest.raises(BadRequestError, match="3 types"):
        load_tokenizer(gguf(tmp_path, metadata={"tokenizer.ggml.token_type": [3, 3, 3]}))


def directory(tmp_path: Path, vocab_size: int = 512) -> ModelSource:
    c = HF_CONFIG | {"vocab_size": vocab_size}
    return resolve(str(write_hf(tmp_path / "m", c, hf_tensors(c))))


def test_directory(tmp_path: Path) -> None:
    want = load_tokenizer(gguf(tmp_path))
    found = directory(tmp_path)
    want.save_pretrained(found.path)
    tokenizer = load_tokenizer(found)
    assert [tokenizer.encode(t) for t in TEXTS] == [want.encode(t) for t in TEXTS]
    assert tokenizer.eos_token_id == 2
    chat: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(CHAT, **chat) == want.apply_chat_template(CHAT, **chat)
    assert load_tokenizer(directory(tmp_path, vocab_size=64)).encode("the thing") == want.encode("the thing")


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer; looked for tokenizer\.json"):
        load_tokenizer(directory(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer(text: str, tmp_path: Path) -> None:
    found = directory(tmp_path)
    load_tokenizer(gguf(tmp_path)).save_pretrained(found.path)
    (found.path / "tokenizer.json").write_text(text)
    with pytest.raises(BadRequestError, match="m"):
        load_tokenizer(found)


def test_custom_tokenizer_code_is_not_run(tmp_path: Path) -> None:
    found = directory(tmp_path)
    (found.path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", null]}}'
    )
    (found.path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match="custom code is never executed"):
        load_tokenizer(found)


@pytest.mark.real
def test_the_embedded_tokenizer() -> None:
    tokenizer = load_tokenizer(resolve(EMBEDDED_MODEL))
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == ("<|im_end|>", 2, 1)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < 49152
    assert tokenizer.tokenize("Hello, world! 123") == ["Hello", ",", "Ġworld", "!", "Ġ", "1", "2", "3"]
    ids = cast(list[int], tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))
    assert ids[0] == 1
    assert str(tokenizer.decode(ids)).endswith("<|im_start|>user\nthe thing<|im_end|>\n<|im_start|>assistant\n")


def test_a_decoder_of_another_process_reads_the_same_files(tmp_path: Path) -> None:
    """A sampler's stop strings travel so; the tokenizer of this process does not."""
    source = gguf(tmp_path)
    tokenizer = load_tokenizer(source)
    asked: list[int] = []
    own = Decoder(source, lambda: (asked.append(1), tokenizer)[1])
    ids = tokenizer.encode(TEXTS[0])
    sent = pickle.loads(pickle.dumps(StopStrings(stops=("world",), decode=own)))
    assert not asked, "nothing is loaded to be sent"
    kept = sent(ids)
    assert kept is not None and own(ids[:kept]).endswith("world")
    assert own(ids) == TEXTS[0] and asked
    assert pickle.loads(pickle.dumps(own)) is sent.decode, "a process loads one tokenizer of a model"
