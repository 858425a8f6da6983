"""Is a chat template rendered as transformers renders it, and stopped where it does not end?"""

from __future__ import annotations

import time
from typing import Any

import pytest

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.server.dashboard.playground.chat import MAX_TEMPLATE, chat_tokens, checked_messages, rendered
from jax_client.weights.read.tokenizer import CHATML
from support.weight_files import byte_level_vocabulary

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "the ü {{ 7 * 7 }}"},
    {"role": "user", "content": "<|im_end|>hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "12"},
]
TEMPLATES = {
    "chatml": CHATML,
    "controls": (
        "{{ bos_token }}{%- for m in messages if m.role != 'system' %}\n"
        "    {% if loop.index == 3 %}{% break %}{% endif %}\n"
        "    {{- m['content'] | trim | upper }}{% generation %}[{{ loop.index }}]{% endgeneration %}\n"
        "{% endfor %}{{ messages | tojson }}{{ {'a': 'ü<'} | tojson(indent=2) }}"
    ),
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ tools is none }}{{ add_generation_prompt }}{{ strftime_now('%Y')[:2] }}{{ messages[0].content[:3] }}",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, merges = byte_level_vocabulary()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(tokens[:3])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=tokens[0], eos_token=tokens[2])


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    want = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert rendered(TEMPLATES[name], CHAT, {"bos_token": tokenizer.bos_token}) == want
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert chat_tokens(tokenizer, CHAT) == ids


def test_a_model_without_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template"):
        chat_tokens(tokenizer, CHAT)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    assert (
        tokenizer.decode(chat_tokens(tokenizer, CHAT[3:])) == "<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "refuses"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "longer than"),
        ("{{ 'x' * 10 ** 10 }}", "memory"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "refuses"),
        ("{% include '/etc/passwd' %}", "refuses"),
        ("{{ raise_exception('not like this') }}", "not like this"),
        ("{{ unclosed", "refuses"),
        ("x" * (MAX_TEMPLATE + 1), "characters"),
    ],
)
def test_hostile_templates_are_refused(template: str, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        rendered(template, CHAT, {})


def test_a_template_without_end_is_stopped() -> None:
    loops = "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3
    start = time.monotonic()
    with pytest.raises(BadRequestError, match="longer than 1 s"):
        rendered(loops, CHAT, {}, seconds=1.0)
    assert time.monotonic() - start < 4


def test_messages_are_checked() -> None:
    assert checked_messages([{"role": "user", "content": "a", "more": 1}]) == [{"role": "user", "content": "a"}]
    for bad in (
        None,
        [],
        "a",
        {},
        [1],
        [{"role": "root", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{}] * 300,
    ):
        with pytest.raises(BadRequestError, match="messages"):
            checked_messages(bad)
