"""What is in a GGUF file, and how does it read as a Hugging Face model? Names and shapes are mapped, types dequantised.

The header is parsed here, because the gguf package takes seconds for one with a vocabulary and checks no bounds. That
package's dequantisation is used as it is.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.models.families.hf_config import rope_advice
from jax_client.models.families.registry import FAMILIES
from jax_client.values import JsonObject
from jax_client.weights.read.tensors import TensorInfo

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_COUNT = 2**24
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# llama.cpp writes a large model as several files of such names, each with a header of its own.
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
AGAIN = "The file is damaged: delete it and download it again."

ARCHITECTURES = {family.gguf: family.architectures[0] for family in FAMILIES.values() if family.gguf}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """One tensor: its file, ggml's type name, shape outermost first, bytes [begin, end) from the file's start."""

    path: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """A parsed header: metadata by key, tensors by the file's own names, and where the data of each part begins.

    Attributes:
        path: the file; the first one of a model in parts.
        parts: every file of the model, with the first byte of its data.
    """

    path: Path
    metadata: JsonObject
    tensors: dict[str, GgufTensor]
    parts: tuple[tuple[Path, int], ...]

    @property
    def data_start(self) -> int:
        """The first byte of the data in `path`."""
        return self.parts[0][1]

    def value(self, key: str) -> Any:
        """Return a metadata value that has to be there."""
        if key not in self.metadata:
            raise BadRequestError(f"{self.path}: the metadata key {key!r} is missing; use a complete GGUF file.")
        return self.metadata[key]

    def size(self, key: str, default: int | None = None) -> int:
        """Return a metadata value that has to be a positive integer; without a default it has to be there."""
        value = self.value(key) if default is None else self.metadata.get(key, default)
        if type(value) is not int or value < 1:
            raise BadRequestError(
                f"{self.path}: the metadata key {key!r} is {value!r:.80}; expected an integer above 0."
            )
        return value


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, path: Path) -> None:
        if path.stat().st_size < 24:
            raise BadRequestError(f"{path}: {path.stat().st_size} bytes are too few for a GGUF header. {AGAIN}")
        self.path, self.position = path, 0
        self.buffer = np.memmap(path, dtype=np.uint8, mode="r").data

    def bytes(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.buffer):
            raise BadRequestError(
                f"{self.path}: the header needs at least {end} bytes, but the file has {len(self.buffer)}. {AGAIN}"
            )
        start, self.position = self.position, end
        return self.buffer[start:end]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def count(self, noun: str) -> int:
        value = self.scalar("Q")
        if value > MAX_COUNT:
            raise BadRequestError(f"{self.path}: {value} {noun}, more than the limit of {MAX_COUNT}. {AGAIN}")
        return value

    def string(self) -> str:
        try:
            return str(self.bytes(self.count("bytes in a string")), "utf-8")
        except UnicodeDecodeError:
            raise BadRequestError(f"{self.path}: a string at byte {self.position} is not UTF-8. {AGAIN}") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise BadRequestError(f"{self.path}: metadata of unknown type {kind} at byte {self.position}. {AGAIN}")
        item, count = self.scalar("I"), self.count("array items")
        if item in SCALARS:
            code = SCALARS[item]
            return np.frombuffer(self.bytes(count * struct.calcsize("<" + code)), "<" + code).tolist()
        if item != STRING:
            raise BadRequestError(f"{self.path}: an array of type {item} at byte {self.position}. {AGAIN}")
        return [self.string() for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file; of a model in parts, those of all of them.

    Args:
        path: the file, or any part.

    Raises:
        BadRequestError: truncated file, trailing bytes, or a header that describes no valid file; parts that are not
            of one model.
        NotFoundError: a part is missing; names it.
        UnsupportedError: a version or a byte order that is not read.
    """
    file = _read_part(path)
    count = file.metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count <= 99_999:
        raise BadRequestError(f"{path}: split.count is {count!r:.80}. {AGAIN}")
    return file if count < 2 else _join(_part_paths(path, count), count)


def first_part(path: Path) -> Path:
    """Return the first file of a model in parts, given any of them; the path itself where it is the only one."""
    match = PART_NAME.fullmatch(path.name)
    first = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else path
    return first if first.is_file() else path


def present_parts(path: Path) -> list[Path]:
    """Return the files of a model by their names alone, those that are there: all parts, or the one file."""
    match = PART_NAME.fullmatch(path.name)
    return [part for part in _named_parts(path, match) if part.is_file()] if match else [path]


def _named_parts(path: Path, match: re.Match[str]) -> list[Path]:
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]


def _part_paths(path: Path, count: int) -> list[Path]:
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise BadRequestError(
            f"{path}: it is one of {count} parts, found by their names, such as NAME-00001-of-{count:05}.gguf."
            " Give the files the names that they were released with."
        )
    paths = _named_parts(path, match)
    if missing := [part.name for part in paths if not part.is_file()]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise NotFoundError(
            f"{path}: the model has {count} parts, and {len(missing)} of them are missing: {', '.join(missing[:5])}"
            f"{more}. Put all parts into {path.parent}."
        )
    return paths


def _join(paths: list[Path], count: int) -> GgufFile:
    parts = [_read_part(path) for path in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, count):
            raise BadRequestError(
                f"{part.path}: it is part {found[0]!r} of {found[1]!r} by its metadata (counted from 0), and {number} "
                f"of {count} by its name. Give the files the names that they were released with."
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise BadRequestError(f"{part.path}: tensor {min(twice)} is also in another part. {AGAIN}")
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise BadRequestError(
            f"{paths[0]}: the {count} parts hold {len(tensors)} tensors, but should hold {total!r}. The parts are not "
            "of one model: download them again."
        )
    return replace(parts[0], tensors=tensors, parts=tuple(place for part in parts for place in part.parts))


def _read_part(path: Path) -> GgufFile:
    cursor = _Cursor(path)
    if bytes(cursor.bytes(4)) != GGUF_MAGIC:
        raise BadRequestError(f"{path}: it does not begin with {GGUF_MAGIC!r}; give a GGUF file.")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise UnsupportedError(f"{path}: GGUF version {version} (little-endian); supported are {VERSIONS}.")
    n_tensors, n_keys = cursor.count("tensors"), cursor.count("metadata keys")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(n_keys)}
    headers = {}
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if n_dims > 4 or name in headers:
            raise BadRequestError(
                f"{path}: tensor {name!r} with {n_dims} dimensions is invalid or there twice. {AGAIN}"
            )
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(n_dims)]))
        headers[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise BadRequestError(f"{path}: general.alignment is {alignment!r}. {AGAIN}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(path, name, header, data_start) for name, header in headers.items()}
    end, size = max((t.end for t in tensors.values()), default=data_start), len(cursor.buffer)
    if not end <= size <= -(-end // alignment) * alignment:
        raise BadRequestError(f"{path}: the header describes {end} bytes, but the file has {size}. {AGAIN}")
    return GgufFile(path=path, metadata=metadata, tensors=tensors, parts=((path, data_start),))


def _tensor(path: Path, name: str, header: tuple[tuple[int, ...], int, int], data_start: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    shape, number, offset = header
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedError(
            f"{path}: tensor {name!r} has type {number}, which the installed gguf package does not know; supported are "
            f"{', '.join(dequantizable_types())}."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    elements = math.prod(shape)
    if elements % block or (shape and shape[-1] % block):
        raise BadRequestError(f"{path}: rows of tensor {name!r}, shape {shape}, are no multiple of {block}. {AGAIN}")
    begin = data_start + offset
    return GgufTensor(path=path, type=kind.name, shape=shape, begin=begin, end=begin + elements // block * block_bytes)


def dequantizable_types() -> tuple[str, ...]:
    """Return the names of the tensor types that are read."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    names = []
    for kind in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return tuple(names)


class GgufReader:
    """The tensors of a GGUF file under Hugging Face names, dequantised to float32 one at a time."""

    def __init__(self, file: GgufFile) -> None:
        self.supported_dtypes = dequantizable_types()
        self._file = file
        self._names = {hf_name(name): name for name in file.tensors}
        self._architecture = architecture(file)
        self.tensors = {
            hf: TensorInfo(shape=tensor.shape, dtype=tensor.type, file=str(tensor.path))
            for hf, name in self._names.items()
            for tensor in (file.tensors[name],)
        }

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32 in Hugging Face's layout."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._file.tensors[self._names[name]]
        raw = np.memmap(tensor.path, np.uint8, "r", offset=tensor.begin, shape=(tensor.end - tensor.begin,))
        rows = raw.view(np.ndarray).reshape(math.prod(tensor.shape[:-1]), -1)
        x = dequantize(rows, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
        if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self._file.size("llama.attention.head_count")
            if name.endswith("k_proj.weight"):
                heads = self._file.size("llama.attention.head_count_kv", heads)
            return interleaved_to_halves(x, heads)
        return x

    def read_expert(self, name: str, expert: int) -> np.ndarray:
        """Return `read(name)[expert]`."""
        return self.read(name)[expert]


def interleaved_to_halves(x_ND: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of llama-architecture GGUF files.

    They hold rotary pairs next to each other (0, H/2, 1, H/2 + 1, ...); Hugging Face's rotation pairs row i with row
    i + H/2. Only "llama" files are so ordered.
    """
    return x_ND.reshape(heads, -1, 2, x_ND.shape[-1]).swapaxes(1, 2).reshape(x_ND.shape)


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor; an unknown one keeps its own, to be refused as extra."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def architecture(file: GgufFile) -> str:
    """Return `general.architecture`.

    Raises:
        UnsupportedError: none of those that are read.
    """
    found = file.value("general.architecture")
    if found not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: architecture {found!r} is not read from GGUF; supported are {', '.join(ARCHITECTURES)}."
        )
    return found


def as_hf_config(file: GgufFile) -> JsonObject:
    """Return the config.json that the metadata amounts to.

    Raises:
        UnsupportedError: experts, or a rope scaling; GGUF stores Llama 3's as a tensor of factors, not as parameters.
        BadRequestError: a key is missing.
    """
    arch = architecture(file)
    heads, width = file.size(f"{arch}.attention.head_count"), file.size(f"{arch}.embedding_length")
    head_dim = file.size(f"{arch}.attention.key_length", width // heads)
    refused = {
        f"{arch}.expert_count": (None, 0),
        f"{arch}.rope.scaling.type": (None, "none"),
        f"{arch}.attention.sliding_window": (None, 0),
        f"{arch}.attention.value_length": (None, head_dim),
        f"{arch}.rope.dimension_count": (None, head_dim),
    }
    for key, allowed in refused.items():
        if (found := file.metadata.get(key)) not in allowed:
            advice = f" {rope_advice(found)}" if key.endswith("scaling.type") else ""
            raise UnsupportedError(f"{file.path}: {key} is {found!r}, which is not supported from GGUF.{advice}")
    if "rope_freqs.weight" in file.tensors:
        raise UnsupportedError(
            f"{file.path}: the tensor rope_freqs.weight scales the rotary positions, which is not read from GGUF; "
            "load the same model in Hugging Face layout (safetensors)."
        )
    embedding = file.tensors.get("token_embd.weight")
    return {
        "architectures": [ARCHITECTURES[arch]],
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else len(file.value("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": file.size(f"{arch}.feed_forward_length"),
        "num_hidden_layers": file.size(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.size(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _decimal(file, f"{arch}.rope.freq_base", 10000.0),
        "max_position_embeddings": file.size(f"{arch}.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _decimal(file: GgufFile, key: str, default: float | None = None) -> float:
    """Return the decimal that was stored as float32: 1e-05, not 9.999999747378752e-06."""
    value = file.value(key) if default is None else file.metadata.get(key, default)
    if not isinstance(value, float):
        raise BadRequestError(f"{file.path}: the metadata key {key!r} is {value!r:.80}; expected a number.")
    return float(str(np.float32(value)))
