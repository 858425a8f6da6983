"""How does a base model with an adapter become one model in Hugging Face layout? The product of A and B is added to W.

Each weight is read, added to and written a few rows at a time, and of stacked experts one: W + (alpha / rank) (A B)^T
in float32, then rounded.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import ModelConfig
from jax_client.models.families.family import Files
from jax_client.models.families.registry import FAMILIES
from jax_client.models.parts.lora import LORA_ALPHA
from jax_client.models.quantization import without_quantization
from jax_client.values import AdapterState, JsonObject
from jax_client.weights.read import hf, safetensors
from jax_client.weights.read.gguf import architecture, as_hf_config, read_gguf
from jax_client.weights.read.load import open_tensors
from jax_client.weights.read.names import expected_tensors
from jax_client.weights.read.source import ModelSource
from jax_client.weights.read.tensors import EMBEDDING, HEAD, TensorReader, check_tensors
from jax_client.weights.read.tokenizer import load_tokenizer
from jax_client.weights.towers import TowerReader, module_name
from jax_client.weights.write import delta_layouts
from jax_client.weights.write.adapter_names import Pairs, to_pairs
from jax_client.weights.write.expert_layouts import PARAMETERS, fused_product
from jax_client.weights.write.shards import Tensor, check_space, write_model

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": safetensors.NUMPY_DTYPES["BF16"], "float32": safetensors.NUMPY_DTYPES["F32"]}
# A lightly trained adapter adds less to a weight than half the step to the next bfloat16, and is rounded away.
LEAST_KEPT = 0.9
SAMPLE = 2**18  # elements of each weight that are looked at for it
# f(first, end) -> what is added to rows [first, end) of a tensor.
Addition = Callable[[int, int], np.ndarray]
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def write_merged(
    directory: Path,
    source: ModelSource,
    config: ModelConfig,
    state: AdapterState | None,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a complete model directory: weights with the adapter added, config, tokenizer.

    The other towers of a model are copied as they are.

    An adapter on the output projection of a model that ties it to its embedding unties them: the directory then holds
    an output projection of its own.

    Args:
        directory: there already, and empty.
        source: the base model, of either kind.
        config: from `load.read_config` of that source.
        state: the adapter; None writes the base model as it is.
        dtype: of every tensor written, but for those that are copied; those that steer a gated delta rule stay float32
            where they are.
        shard_bytes: most bytes of a weight file, unless a single tensor needs more.

    Raises:
        BadRequestError: the adapter is not one of this model; damaged or misfitting base weights.
        UnsupportedError: a GGUF tokenizer that is not read; a dtype of another tower that is not copied.
        RequestFailedError: there is not enough space on the disk.
    """
    # Also what a file has as one, and A and B by product: the zeros between them add nothing.
    pairs = {} if state is None else delta_layouts.fused(config, to_pairs(state, config))
    scale = 0.0 if state is None else LORA_ALPHA / state.spec.rank
    reader = open_tensors(source)
    expected = expected_tensors(config, reader.tensors)
    check_tensors(reader, expected, tied=config.tied_embeddings, where=str(source.path))
    sources = {name: name for name in expected}
    untied = config.tied_embeddings and HEAD.removesuffix(".weight") in pairs
    if untied:
        sources[HEAD] = EMBEDDING
    numpy_dtype = DTYPES[dtype]
    files = FAMILIES[config.family].files
    parts = {
        written: _Merged(reader, name, _addition(module_name(written, config), pairs, scale, files), numpy_dtype)
        for written, name in sources.items()
    }
    tower = reader if isinstance(reader, TowerReader) else None
    tensors = [
        Tensor(
            name=tower.stored_name(n) if tower else n,
            shape=expected[sources[n]],
            rows=part.rows,
            dtype=DTYPES["float32"] if _stays_float32(reader, sources[n]) else None,
        )
        for n, part in parts.items()
    ]
    if tower:
        tensors += [_copy(tower, name) for name in tower.others]
    check_space(directory, sum(tensor.nbytes(numpy_dtype) for tensor in tensors))
    # What can be refused comes before the long part.
    _write_tokenizer(directory, source)
    (directory / hf.CONFIG).write_text(json.dumps(_hf_config(source, dtype, untied), indent=2) + "\n")
    write_model(directory, tensors, numpy_dtype, shard_bytes)
    _say_what_rounding_took(list(parts.values()), dtype)


def _stays_float32(reader: TensorReader, name: str) -> bool:
    """Return whether a tensor, too small to save space, would lose what its model computes with."""
    return name.endswith(delta_layouts.STEERING) and reader.tensors[name].dtype == "F32"


def _copy(tower: TowerReader, name: str) -> Tensor:
    """Return a tensor of another tower as it is, in its own dtype."""
    info = tower.others[name]
    if info.dtype not in safetensors.STORED_DTYPES:
        raise UnsupportedError(
            f"{info.file}: tensor {name} has dtype {info.dtype}, which is not copied; copied are "
            f"{', '.join(safetensors.STORED_DTYPES)}. Use an unquantised copy of the model."
        )
    dtype = safetensors.STORED_DTYPES[info.dtype]
    return Tensor(name=name, shape=info.shape, rows=lambda first, end: tower.read_other(name)[first:end], dtype=dtype)


def _addition(name: str, pairs: Pairs, scale: float, files: Files) -> Addition | None:
    """Return what an adapter adds to a tensor; None where it does not cover it."""
    if (pair := pairs.get(name.removesuffix(".weight"))) is not None:
        return lambda first, end: _product(pair, scale, slice(first, end))
    # The experts of a layer as one tensor, which has their matrices one after the other.
    prefix, _, last = name.rpartition(".")
    projections = PARAMETERS.get(last, ())
    if not projections or f"{prefix}.0.{projections[0]}" not in pairs:
        return None

    def of_expert(e: int) -> np.ndarray:
        own = [pairs[f"{prefix}.{e}.{projection}"] for projection in projections]
        return np.float32(scale) * fused_product(own, files.experts)

    return lambda first, end: np.stack([of_expert(e) for e in range(first, end)])


def _product(pair: tuple[np.ndarray, np.ndarray], scale: float, rows: slice) -> np.ndarray:
    """Return rows of scale (A B)^T, float32."""
    a_RI, b_RO = pair
    return np.float32(scale) * (b_RO[:, rows].T @ a_RI)


class _Merged:
    """One tensor of the base model with its part of the adapter, float32, by rows. It is read once.

    Attributes:
        wanted, kept: over the first rows, the square of what the adapter adds, and what of it is left after rounding.
    """

    def __init__(
        self,
        reader: TensorReader,
        name: str,
        addition: Addition | None,
        dtype: np.dtype,
    ) -> None:
        self.wanted = self.kept = 0.0
        self._reader, self._name, self._addition, self._dtype = reader, name, addition, dtype
        self._base: np.ndarray | None = None

    def _read(self, first: int, end: int) -> np.ndarray:
        """Return rows [first, end) of the base model's tensor, float32."""
        if len(self._reader.tensors[self._name].shape) == 3:
            # Stacked experts. Of a quantised release no other is decoded, so that one is in memory at a time.
            return np.stack([self._reader.read_expert(self._name, e) for e in range(first, end)], dtype=np.float32)
        if self._base is None:
            self._base = self._reader.read(self._name)
        x = self._base[first:end].astype(np.float32)
        if end == len(self._base):
            self._base = None  # of a GGUF file it is a float32 array, and not a view of the file
        return x

    def rows(self, first: int, end: int) -> np.ndarray:
        """Return rows [first, end); those of one tensor are asked for in order."""
        x = self._read(first, end)
        if self._addition is not None:
            added = self._addition(first, end)
            if first == 0:
                sample = slice(0, max(1, SAMPLE // math.prod(x.shape[1:])))
                wanted, before = added[sample], x[sample]
                kept = self._rounded(before + wanted) - self._rounded(before)
                self.wanted, self.kept = float(np.vdot(wanted, wanted)), float(np.vdot(kept, wanted))
            x += added
        if not np.isfinite(x).all():
            raise BadRequestError(
                f"{self._name}, rows {first} to {end - 1}: values that are not finite once the adapter is added to the "
                "base model. Export an earlier checkpoint, or use an undamaged copy of the base model."
            )
        return x

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self._dtype).astype(np.float32)


def _say_what_rounding_took(parts: list[_Merged], dtype: str) -> None:
    wanted = sum(part.wanted for part in parts)
    share = sum(part.kept for part in parts) / wanted if wanted else 1.0
    if share < LEAST_KEPT:
        logger.warning(
            "%s keeps %.0f %% of what the adapter adds to the weights: most of it is smaller than the steps between "
            "two numbers there. Export as float32, or the adapter alone (PEFT)",
            dtype,
            100 * share,
        )


def _hf_config(source: ModelSource, dtype: str, untied: bool) -> JsonObject:
    if source.kind == "gguf":
        file = read_gguf(source.path)
        config = as_hf_config(file) | {"model_type": architecture(file), "hidden_act": "silu"}
        if (bos := file.metadata.get("tokenizer.ggml.bos_token_id")) is not None:
            config["bos_token_id"] = bos
    else:
        # The weights are written as plain numbers, whatever they were.
        config = without_quantization(hf.read_json(source.path, hf.CONFIG))
    # transformers 5 writes `dtype`; versions before 4.56, and servers built on them, read `torch_dtype` alone.
    said = {"dtype": dtype, "torch_dtype": dtype} | ({"tie_word_embeddings": False} if untied else {})
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = text | {key: value for key, value in said.items() if key in text}
    return config | said


def _write_tokenizer(directory: Path, source: ModelSource) -> None:
    """Copy the tokenizer's files and the generation settings, or write those of a GGUF file; both may lack them."""
    if source.kind == "hf":
        for name in COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(hf.inside(source.path, name), directory / name)
        for path in sorted((source.path / hf.NAMED_TEMPLATES).glob("*.jinja")):
            (directory / hf.NAMED_TEMPLATES).mkdir(exist_ok=True)
            template = f"{hf.NAMED_TEMPLATES}/{path.name}"
            shutil.copyfile(hf.inside(source.path, template), directory / template)
        return
    if "tokenizer.ggml.model" not in read_gguf(source.path).metadata:
        return
    load_tokenizer(source).save_pretrained(str(directory))
    path = directory / "tokenizer_config.json"
    # transformers 5 writes a class name that earlier versions do not know; both know this one.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
