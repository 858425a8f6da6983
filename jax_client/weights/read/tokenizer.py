"""Where does a model's tokenizer come from? transformers reads a directory's; a GGUF file's is built here.

It is built from the file's vocabulary and merges: transformers takes the wrong class for some files, with another
end-of-sequence id and ids beyond the embedding.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.weights.read import hf
from jax_client.weights.read.gguf import GgufFile, read_gguf
from jax_client.weights.read.source import ModelSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
CONTROL, USER_DEFINED = 3, 4
# What a model gets that brings no template: ChatML, which all families supported from GGUF speak.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The split of Qwen2's tokenizer: contractions, words with one leading sign, single digits, signs, line ends, spaces.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer from its own files; nothing is downloaded and no code of the model is run.

    It may have more ids than the embedding has rows, such as a padding token that was added later. That is logged.

    Raises:
        NotFoundError: a directory without tokenizer files.
        BadRequestError: damaged files.
        UnsupportedError: custom tokenizer code; a GGUF tokenizer whose splitting rule is not known here.
    """
    # Imported here: processes that only read a tokenizer have no jax.
    from jax_client.weights.read.load import read_config

    tokenizer, rows = read_tokenizer(source), read_config(source).vocab_size
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        logger.warning(
            "%s: the tokenizer has ids that the embedding, of %d rows, has not: %s%s. Data and prompts with one of "
            "them are refused. If the text needs them, use the tokenizer that belongs to the model, or a model whose "
            "embedding was resized",
            source.path,
            rows,
            ", ".join(f"{index} {token!r:.40}" for index, token in beyond[:5]),
            more,
        )
    return tokenizer


def read_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load a tokenizer as `load_tokenizer`, without comparing it with the model's embedding."""
    return from_gguf(read_gguf(source.path)) if source.kind == "gguf" else _from_directory(source)


def _from_directory(source: ModelSource) -> PreTrainedTokenizerFast:
    if not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        raise NotFoundError(
            f"{source.path}: no tokenizer; looked for {', '.join(TOKENIZER_FILES)}. Copy them from the model's "
            "repository."
        )
    for name in TOKENIZER_FILES:
        if (source.path / name).exists() and name.endswith(".json"):
            hf.read_json(source.path, name)
    automatic = _transformers().AutoTokenizer
    try:
        return automatic.from_pretrained(str(source.path), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # transformers and tokenizers raise bare Exception, TypeError, KeyError, ... for damaged files.
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{source.path}: the tokenizer asks for code from the model's repository; custom code is never "
                "executed."
            ) from None
        raise BadRequestError(
            f"{source.path}: the tokenizer does not load ({type(error).__name__}: {error}); download its files again."
        ) from error


def from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    Raises: as `load_tokenizer`.
    """
    tokens = file.value("tokenizer.ggml.tokens")
    bpe = _byte_level_bpe(file, tokens)
    names: dict[str, Any] = {}
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, key in roles.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise BadRequestError(f"{file.path}: {key}_token_id is {index!r}, but there are {len(tokens)} tokens.")
        names[role] = tokens[index]
    arch = file.value("general.architecture")
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        model_max_length=file.value(f"{arch}.context_length"),
        chat_template=_chat_templates(file),
        **{"pad_token": names.get("eos_token"), **names},
    )


def _transformers() -> ModuleType:
    """Import transformers, which without torch would begin with a warning that its models are not there."""
    log = logging.getLogger("transformers")
    log.addFilter(_is_not_of_torch)
    try:
        return importlib.import_module("transformers")
    finally:
        log.removeFilter(_is_not_of_torch)


def _is_not_of_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _chat_templates(file: GgufFile) -> str | dict[str, str]:
    """Return the template, or all of them by name where the file has more than the default one."""
    default, prefix = file.metadata.get("tokenizer.chat_template", CHATML), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in file.metadata.items() if key.startswith(prefix)}
    return {"default": default, **named} if named else default


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    kind = file.value("tokenizer.ggml.model")
    pre = file.metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{file.path}: its tokenizer is {kind!r} with the splitting rule {pre!r}; read from GGUF is 'gpt2' with "
            f"{', '.join(map(repr, PRE_TOKENIZERS))}. Load the same model in Hugging Face layout."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    types = file.value("tokenizer.ggml.token_type")
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise BadRequestError(
            f"{file.path}: {len(tokens)} tokens, {len(vocab)} of them distinct, {len(types)} types; these must be "
            "equal."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    try:
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    except Exception as error:
        # tokenizers raises bare Exception, for a merge of tokens that are not in the vocabulary.
        raise BadRequestError(
            f"{file.path}: the merges do not fit the vocabulary ({error}); use another copy."
        ) from error
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = PRE_TOKENIZERS[pre]()
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    )
    bpe.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED])
    if file.metadata.get("tokenizer.ggml.add_bos_token"):
        bos = tokens[file.value("tokenizer.ggml.bos_token_id")]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return bpe


def _smollm() -> PreTokenizer:
    from tokenizers import pre_tokenizers as pre

    return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)])


def _qwen2() -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    split = pre.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {"smollm": _smollm, "qwen2": _qwen2}
