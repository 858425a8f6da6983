"""What is an adapter on the device, how does it start, and how does it become host arrays and back?"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_client.engine.core.accounting import Work
from jax_client.errors import BadRequestError
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import ParamSpec
from jax_client.sharding import sharding_for
from jax_client.values import AdapterState, LoraSpec

Weights = dict[str, Any]
# How often an adapter was loaded, and the optimizer steps it has; grows with every change of the weights.
Version = tuple[int, int]


@dataclass(slots=True, eq=False)
class Adapter:
    """A trainable adapter: its weights, Adam's moments, the gradient and work accumulated so far, and the step count.

    Arrays are replaced, never donated: a failed program leaves the adapter as it was, and a snapshot is a reference.

    Attributes:
        loads: how often its weights were replaced by saved ones, after which steps are counted anew.
        lock: held while the weights, moments and step change, and while another thread takes them all.
    """

    spec: LoraSpec
    weights: Weights
    mu: Weights
    nu: Weights
    step: int = 0
    loads: int = 0
    grads: Weights | None = None
    skipped_in_a_row: int = 0
    work: Work = field(default_factory=Work)  # since the last step
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def version(self) -> Version:
        """Which of the weights that the adapter has had these are."""
        return self.loads, self.step


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot:
    """Immutable adapter weights to sample from; `version` tells one snapshot from every other of the process."""

    spec: LoraSpec
    weights: Weights
    version: int = field(default_factory=itertools.count(1).__next__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Held:
    """An adapter at one moment. Arrays are immutable: holding them costs nothing until the adapter has others.

    Attributes:
        version: the adapter's.
        accumulating: whether there are gradients that no step was taken with. They are not part of a saved state.
    """

    spec: LoraSpec
    step: int
    version: Version
    weights: Weights
    mu: Weights | None
    nu: Weights | None
    accumulating: bool

    def fetch(self) -> AdapterState:
        """Copy it to the host. Blocks; call it off the dispatch thread."""
        host = [None if tree is None else jax.device_get(flatten(tree)) for tree in (self.weights, self.mu, self.nu)]
        return AdapterState(spec=self.spec, step=self.step, weights=host[0] or {}, mu=host[1], nu=host[2])


def hold(adapter: Adapter, optimizer: bool) -> Held:
    """Return the adapter as it is now, with Adam's moments if asked."""
    with adapter.lock:
        moments = (adapter.mu, adapter.nu) if optimizer else (None, None)
        return Held(
            spec=adapter.spec,
            step=adapter.step,
            version=adapter.version,
            weights=adapter.weights,
            mu=moments[0],
            nu=moments[1],
            accumulating=adapter.grads is not None,
        )


def _shapes(c: ModelConfig, spec: LoraSpec) -> dict[str, dict[str, dict[str, tuple[Any, Any, int]]]]:
    """Return {"layers" | "unembed": {module: {"A" | "B": (shape, axes, fan_in)}}}."""
    L, D, F, K, G, H, R = c.n_layers, c.d_model, c.d_ff, c.n_kv_heads, c.group, c.head_dim, spec.rank
    into = ((L, R, D), (None, None, "embed"), D)
    out_D, out_F = ((L, R, D), (None, None, "embed"), 0), ((L, R, F), (None, None, "ffw"), 0)
    q_heads, kv_heads = (None, None, "kv_heads", None, None), (None, None, "kv_heads", None)
    layers: dict[str, Any] = {}
    if spec.train_attn:
        layers["q"] = {"A": into, "B": ((L, R, K, G, H), q_heads, 0)}
        layers["k"] = {"A": into, "B": ((L, R, K, H), kv_heads, 0)}
        layers["v"] = {"A": into, "B": ((L, R, K, H), kv_heads, 0)}
        layers["o"] = {"A": ((L, R, K, G, H), q_heads, K * G * H), "B": out_D}
    if spec.train_mlp:
        layers["gate"] = {"A": into, "B": out_F}
        layers["up"] = {"A": into, "B": out_F}
        layers["down"] = {"A": ((L, R, F), (None, None, "ffw"), F), "B": out_D}
    unembed: dict[str, Any] = {}
    if spec.train_unembed:
        unembed = {"A": ((R, D), (None, "embed"), D), "B": ((R, c.vocab_size), (None, "vocab"), 0)}
    return {"layers": layers, "unembed": unembed}


def _is_entry(node: Any) -> bool:
    return isinstance(node, tuple)


def shardings(c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> Weights:
    """Return the sharding of every adapter array."""
    return jax.tree.map(lambda e: sharding_for(e[1], e[0], mesh), _shapes(c, spec), is_leaf=_is_entry)


def param_specs(c: ModelConfig, spec: LoraSpec) -> Weights:
    """Return the tree of `ParamSpec` of an adapter; nothing is allocated."""
    f32 = np.dtype(np.float32)
    entry = lambda e: ParamSpec(shape=e[0], dtype=f32, axes=e[1])  # noqa: E731
    return jax.tree.map(entry, _shapes(c, spec), is_leaf=_is_entry)


def abstract_weights(c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> Weights:
    """Return the adapter's arrays as shapes with their places on the mesh, to compile programs with."""
    struct = lambda e, place: jax.ShapeDtypeStruct(e[0], np.float32, sharding=place)  # noqa: E731
    return jax.tree.map(struct, _shapes(c, spec), shardings(c, spec, mesh), is_leaf=_is_entry)


def initial_weights(c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> Weights:
    """Return fresh weights on the mesh: A uniform in ±1/√fan_in (as peft), B zero, float32.

    Drawn on the host: the same for a seed on any mesh, and nothing to compile (a program that drew them with jax.random
    took 5 to 13 s to compile on a CPU).
    """
    rng = np.random.default_rng(spec.seed)

    def start(entry: tuple[Any, Any, int], place: NamedSharding) -> jax.Array:
        shape, _, fan_in = entry
        if not fan_in:
            return jax.device_put(np.zeros(shape, np.float32), place)
        return jax.device_put((2 * rng.random(shape, np.float32) - 1) * np.float32(fan_in**-0.5), place)

    return jax.tree.map(start, _shapes(c, spec), shardings(c, spec, mesh), is_leaf=_is_entry)


def flatten(weights: Weights) -> dict[str, Any]:
    """Return the arrays under flat names: "q.A", ..., "unembed.B"."""
    flat = {f"{m}.{ab}": a for m, pair in weights["layers"].items() for ab, a in pair.items()}
    return flat | {f"unembed.{ab}": a for ab, a in weights["unembed"].items()}


def array_shapes(c: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of an adapter, by flat name."""
    return {name: tuple(entry[0]) for name, entry in flatten(_shapes(c, spec)).items()}


def refuse_other_shapes(subject: str, flat: Any, c: ModelConfig, spec: LoraSpec, advice: str) -> None:
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


def to_host(snapshot: Snapshot) -> AdapterState:
    """Copy a snapshot's weights to the host, without optimizer. Blocks; call it off the dispatch thread."""
    return AdapterState(spec=snapshot.spec, step=0, weights=jax.device_get(flatten(snapshot.weights)))


def unflatten(flat: Any, c: ModelConfig, spec: LoraSpec, mesh: Mesh) -> Weights:
    """Put flat host arrays onto the mesh.

    Raises:
        BadRequestError: a name or a shape is not that of this model with this configuration.
    """
    advice = "Load it into a client with the base model, rank and train_* settings that it was saved with."
    refuse_other_shapes("the saved adapter", flat, c, spec, advice)
    place = flatten(shardings(c, spec, mesh))
    put = {name: jax.device_put(np.asarray(flat[name], np.float32), place[name]) for name in place}
    return _nest(put)


def _nest(flat: dict[str, Any]) -> Weights:
    tree: Weights = {"layers": {}, "unembed": {}}
    for name, array in flat.items():
        module, part = name.split(".")
        owner = tree["unembed"] if module == "unembed" else tree["layers"].setdefault(module, {})
        owner[part] = array
    return tree
