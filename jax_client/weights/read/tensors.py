"""When do the tensors of weight files fit the model? When they are exactly those of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jax_client.errors import BadRequestError, UnsupportedError


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


# Buffers that old checkpoints saved and no layer reads.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias")


def check_tensors(reader: TensorReader, expected: Mapping[str, tuple[int, ...]], *, tied: bool, where: str) -> None:
    """Raise if the file's tensors are not exactly those of the model.

    Args:
        reader: the opened files.
        expected: Hugging Face name to shape, from the config.
        tied: the output projection is the embedding; a stored copy of it is ignored.
        where: directory or file, for messages.

    Raises:
        BadRequestError: missing, extra or misshapen tensors: how many, and the first five with both shapes.
        UnsupportedError: a dtype that is not read, by name.
    """
    found = reader.tensors
    ignored = {"lm_head.weight"} if tied else set()
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
        raise BadRequestError(
            f"{where}: the tensors do not fit its config: {len(missing)} missing, {len(misshapen)} misshapen, "
            f"{len(extra)} extra. First: {first}. Use a complete copy of the model, with its own config.json."
        )
    for name in expected:
        if found[name].dtype not in reader.supported_dtypes:
            raise UnsupportedError(
                f"{found[name].file}: tensor {name} has dtype {found[name].dtype}, which is not loaded; supported are "
                f"{', '.join(reader.supported_dtypes)}. Use an unquantised copy of the model."
            )
