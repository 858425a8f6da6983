"""Which arrays does a LoRA adapter of a model have, and in which shapes?

Each covered module has a pair: A (L, R, in...) and B (L, R, out...), stacked over the layers that have the module, with
the heads apart as in the base weights; the output projection's pair lacks the leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypedDict, TypeVar

import numpy as np

from jax_client.errors import BadRequestError
from jax_client.models.config import ModelConfig
from jax_client.models.plan import count, kinds
from jax_client.models.specs import LoraArray
from jax_client.values import LoraSpec

T = TypeVar("T")
# The largest number whose square float32 holds. An optimizer step beyond it fails, so a trained adapter has none.
LARGEST_WEIGHT = 2.0**64


class AdapterTree(TypedDict, Generic[T]):
    """One value for every array of an adapter.

    Attributes:
        layers: by module as `Kind.modules` has them ("q", ..., "down"), then "A" or "B".
        unembed: "A" and "B" of the output projection; empty where the adapter does not cover it.
    """

    layers: dict[str, dict[str, T]]
    unembed: dict[str, T]


def lora_arrays(c: ModelConfig, spec: LoraSpec) -> AdapterTree[LoraArray]:
    """Return the arrays of an adapter with this configuration; nothing is allocated."""
    layers = {
        module: {ab: LoraArray((count(c, kind), *a.shape), (None, *a.axes), a.fan_in) for ab, a in pair.items()}
        for kind in kinds(c)
        if getattr(spec, kind.flag)
        for module, pair in kind.modules(c, spec.rank).items()
    }
    unembed: dict[str, LoraArray] = {}
    if spec.train_unembed:
        unembed["A"] = LoraArray((spec.rank, c.d_model), (None, None), c.d_model)
        unembed["B"] = LoraArray((spec.rank, c.vocab_size), (None, "vocab"), 0)
    return {"layers": layers, "unembed": unembed}


def flatten(tree: AdapterTree[T]) -> dict[str, T]:
    """Return the values under flat names: "q.A", ..., "unembed.B"."""
    flat = {f"{module}.{ab}": value for module, pair in tree["layers"].items() for ab, value in pair.items()}
    return flat | {f"unembed.{ab}": value for ab, value in tree["unembed"].items()}


def nest(flat: Mapping[str, T]) -> AdapterTree[T]:
    """Return the tree of values under flat names: the inverse of `flatten`."""
    tree: AdapterTree[T] = {"layers": {}, "unembed": {}}
    for name, value in flat.items():
        module, part = name.split(".")
        pair = tree["unembed"] if module == "unembed" else tree["layers"].setdefault(module, {})
        pair[part] = value
    return tree


def array_shapes(c: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of an adapter, by flat name."""
    return {name: array.shape for name, array in flatten(lora_arrays(c, spec)).items()}


def refuse_other_shapes(
    subject: str, flat: Mapping[str, np.ndarray], c: ModelConfig, spec: LoraSpec, advice: str
) -> None:
    """Raise BadRequestError unless flat arrays have the names and shapes of this model with this configuration.

    Args:
        subject: of the message.
        flat: arrays by name.
        c, spec: the model and the adapter's configuration.
        advice: what to do.
    """
    expected = array_shapes(c, spec)
    found = {name: tuple(np.shape(array)) for name, array in flat.items()}
    if expected != found:
        names = [n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)]
        wrong = [f"{n}: {found.get(n)} instead of {expected.get(n)}" for n in names]
        raise BadRequestError(
            f"{subject} does not fit this model: {len(wrong)} arrays differ, {'; '.join(wrong[:5])}. {advice}"
        )


def out_of_range(flat: Mapping[str, np.ndarray], limit: float = LARGEST_WEIGHT) -> str | None:
    """Return, in words, which numbers of flat arrays are not finite or exceed `limit` in size; None if none do."""
    # A finite sum of squares, one pass at the memory's speed, says that all is well; only what may not be is looked at.
    with np.errstate(all="ignore"):
        suspects = [name for name, array in flat.items() if not np.isfinite(np.vdot(array, array))]
    wrong = {name: bad for name in suspects if len(bad := np.argwhere(~(np.abs(flat[name]) <= limit)))}
    if not wrong:
        return None
    name, bad = next(iter(wrong.items()))
    at = tuple(int(i) for i in bad[0])
    return (
        f"{flat[name][at]} at {name}{list(at)} is the first of {sum(map(len, wrong.values()))} numbers in "
        f"{len(wrong)} arrays that are not finite, or larger than {limit:.3g}"
    )
