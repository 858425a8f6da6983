"""Which tensors and modules of a model with several towers are the text model's? Those that begin as its family says.

A reader shows the text model's tensors under the names of a model that has text alone, and keeps the other towers'
apart. A tensor of neither is refused by name.
"""

from __future__ import annotations

import numpy as np

from jax_client.errors import BadRequestError
from jax_client.models.config import ModelConfig
from jax_client.models.families.family import HfConfig, Tower
from jax_client.models.families.registry import FAMILIES, SUPPORTED_ARCHITECTURES
from jax_client.weights.read.tensors import IGNORED_SUFFIXES, TensorInfo, TensorReader

# How names begin in a model that has text alone: "model.layers.0.mlp.up_proj.weight".
PLAIN = ("model.", "lm_head.")


def tower_of(hf: HfConfig) -> Tower | None:
    """Return the text tower that a parsed config.json names; None where the model has text alone, or is not read."""
    names = hf.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return None
    family = SUPPORTED_ARCHITECTURES.get(names[0])
    return None if family is None else family.files.tower


def module_name(plain: str, c: ModelConfig) -> str:
    """Return transformers' name of a module or tensor, from its name in a model that has text alone."""
    tower = FAMILIES[c.family].files.tower
    return plain if tower is None or not plain.startswith(PLAIN[0]) else tower.modules + plain.removeprefix(PLAIN[0])


class TowerReader:
    """The tensors of the text model, under the names of one that has text alone.

    Attributes:
        others: the tensors of the other towers, under their own names.
    """

    def __init__(self, files: TensorReader, tower: Tower) -> None:
        """Sort the tensors by the beginnings of their names.

        Args:
            files: all tensors, as they are stored or decoded.
            tower: of the family.

        Raises:
            BadRequestError: a tensor that belongs to no tower.
        """
        self._files = files
        self.supported_dtypes = files.supported_dtypes
        present = [form for form in tower.stored if any(name.startswith(form[0]) for name in files.tensors)]
        self._form = (present or tower.stored)[0]
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, TensorInfo] = {}
        for name, info in files.tensors.items():
            plain = self._plain(name)
            if plain is not None:
                self.tensors[plain] = info
            elif name.startswith(tower.others):
                self.others[name] = info
            elif not name.endswith(IGNORED_SUFFIXES):
                raise BadRequestError(
                    f"{info.file}: tensor {name} was not expected: those of the text model begin with "
                    f"{' or '.join(self._form)}, those that are not read with {', '.join(tower.others)}. Use a "
                    "complete copy of the model, with its own config.json."
                )

    def stored_name(self, plain: str) -> str:
        """Return the name that files of this form give to a tensor of the text model."""
        stored, beginning = next(pair for pair in zip(self._form, PLAIN, strict=True) if plain.startswith(pair[1]))
        return stored + plain.removeprefix(beginning)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor of the text model, by its name in a model that has text alone."""
        return self._files.read(self.stored_name(name))

    def read_expert(self, name: str, expert: int) -> np.ndarray:
        """Return `read(name)[expert]`; no other slice is decoded."""
        return self._files.read_expert(self.stored_name(name), expert)

    def read_other(self, name: str) -> np.ndarray:
        """Return one tensor of the other towers, by its own name."""
        return self._files.read(name)

    def _plain(self, stored: str) -> str | None:
        for beginning, plain in zip(self._form, PLAIN, strict=True):
            if stored.startswith(beginning):
                return plain + stored.removeprefix(beginning)
        return None
