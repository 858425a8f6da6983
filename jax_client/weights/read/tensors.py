"""When do the tensors of weight files fit the model? When they are exactly those of its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jax_client.errors import BadRequestError, UnsupportedError

logger = logging.getLogger(__name__)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Shape as Hugging Face stores it ([out, in]), the file's own dtype name, and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class TensorReader(Protocol):
    """An opened model: tensors under Hugging Face names, read one at a time."""

    supported_dtypes: tuple[str, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the files hold, by Hugging Face name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in Hugging Face's layout and a float dtype; a lazy view of the file where possible."""
        ...

    def read_expert(self, name: str, expert: int) -> np.ndarray:
        """Return `read(name)[expert]`, of stacked experts one; of a quantised release no other is decoded."""
        ...


# Buffers that old checkpoints saved and no layer reads.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias")


def check_tensors(reader: TensorReader, expected: Mapping[str, tuple[int, ...]], *, tied: bool, where: str) -> None:
    """Raise if the file's tensors are not exactly those of the model.

    Args:
        reader: the opened files.
        expected: Hugging Face name to shape, from the config.
        tied: the output projection is the embedding; a stored one is ignored, with a warning if it is another.
        where: directory or file, for messages.

    Raises:
        BadRequestError: missing, extra or misshapen tensors: how many, and the first five with both shapes.
        UnsupportedError: a dtype that is not read, by name.
    """
    found = reader.tensors
    ignored = {HEAD} if tied else set()
    missing = [f"{n}: expected {shape}, not there" for n, shape in expected.items() if n not in found]
    misshapen = [
        f"{n}: expected {shape}, found {found[n].shape}"
        for n, shape in expected.items()
        if n in found and found[n].shape != tuple(shape)
    ]
    extra = [
        f"{n}: not expected, found {info.shape}"
        for n, info in found.items()
        if n not in expected and n not in ignored and not n.endswith(IGNORED_SUFFIXES)
    ]
    if missing or misshapen or extra:
        first = "; ".join([*missing, *misshapen, *extra][:5])
        flag = (
            f" {HEAD} is missing, and tie_word_embeddings is not true: if this model's output projection is its "
            'embedding, set "tie_word_embeddings": true in config.json.'
            if HEAD in expected and HEAD not in found
            else ""
        )
        raise BadRequestError(
            f"{where}: the tensors do not fit its config: {len(missing)} missing, {len(misshapen)} misshapen, "
            f"{len(extra)} extra. First: {first}. Use a complete copy of the model, with its own config.json.{flag}"
        )
    for name in expected:
        if found[name].dtype not in reader.supported_dtypes:
            raise UnsupportedError(
                f"{found[name].file}: tensor {name} has dtype {found[name].dtype}, which is not loaded; supported are "
                f"{', '.join(reader.supported_dtypes)}. Use an unquantised copy of the model."
            )
    if tied and HEAD in found:
        _compare_head(reader, where)


def _compare_head(reader: TensorReader, where: str, rows: int = 4096) -> None:
    """Warn if a model that ties its output projection to its embedding has another one in its files, too."""
    embedding, head = reader.tensors[EMBEDDING], reader.tensors[HEAD]
    if head.dtype not in reader.supported_dtypes:
        difference = f"its dtype is {head.dtype}, and the embedding's {embedding.dtype}"
    elif head.shape != embedding.shape:
        difference = f"its shape is {head.shape}, and the embedding's {embedding.shape}"
    else:
        embedding_VD, head_VD = reader.read(EMBEDDING), reader.read(HEAD)
        strips = [slice(first, first + rows) for first in range(0, len(head_VD), rows)]
        differing, largest = 0, 0.0
        for strip in strips:
            if np.array_equal(embedding_VD[strip], head_VD[strip]):
                continue
            apart = np.abs(embedding_VD[strip].astype(np.float32) - head_VD[strip].astype(np.float32))
            differing, largest = differing + int((apart != 0).any(-1).sum()), max(largest, float(apart.max()))
        if not differing:
            return
        difference = f"it differs in {differing} of {len(head_VD)} rows, by up to {largest:.3g}"
    logger.warning(
        "%s: tie_word_embeddings is true, but there is a %s that is not the embedding: %s. The embedding is used, as "
        "the config says; transformers 5 uses the stored one. To use the stored one, set tie_word_embeddings to false "
        "in config.json; to keep the embedding without this warning, remove %s from the weight files",
        where,
        HEAD,
        difference,
        HEAD,
    )
