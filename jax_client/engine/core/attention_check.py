"""Which attention does an engine run, and can it be trusted on packed rows?

A vendor's kernel is the fastest, but kernels have ignored segments before, silently. So each start compares it with the
plain one on small packed rows, on the device at hand, forwards and backwards, in memory that holds NaN before: what a
kernel reads and nothing has written then shows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.devices.arrays import put_rows
from jax_client.engine.devices.local import local_mesh
from jax_client.models.config import ModelConfig
from jax_client.models.parts.attention import Attention, Extras, blockwise, cudnn, splash
from jax_client.sharding import replicated, ways_of

logger = logging.getLogger(__name__)

# Documents of two rows of every way, of which the first ends in padding and the second does not.
PROBE_LENGTHS = ((70, 1, 100, 213), (300, 212))
PROBE_ROW = 512
# Largest gap between two bfloat16 attentions, relative to the largest value. Leaking one document into the next, or
# dropping the scale, gives 0.3 and more.
TOLERANCE = 0.03
POISON = 2**24  # floats, 64 MiB: the arrays and workspaces of the probe have room in it
# The platform of each vendor's kernel, as jax names it and as people do.
PLATFORMS = {"splash": ("tpu", "TPUs"), "cudnn": ("gpu", "NVIDIA GPUs")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The attention of an engine, and why it is not another one.

    Attributes:
        attention: that is used.
        refused: by the name of each other kernel, in words why not.
        failed: whether one of them should work here, and does not.
    """

    attention: Attention
    refused: Mapping[str, str]
    failed: bool = False


def choose_attention(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> Attention:
    """Return the platform's kernel where there is one and `agrees` with the blockwise attention, else the latter."""
    return choose(mesh, model, dtype).attention


def choose(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> Choice:
    """Return what `choose_attention` returns, and why the other kernels are not used; log a warning where one fails."""
    plain = plain_attention(mesh)
    refused = {name: why for name in PLATFORMS if (why := unsuited(name, mesh, dtype))}
    for name in PLATFORMS.keys() - refused.keys():  # one at most: each is for a platform of its own
        try:
            candidate, own = make(name, mesh), local_mesh(mesh)
            if lacking := candidate.lacks & extras_of_all(model):
                return Choice(
                    attention=plain, refused={**refused, name: f"it takes no {' and '.join(sorted(lacking))}"}
                )
            # On a mesh of several hosts each probes the kernel on its own devices: a probe decides, and is not launched
            # by all.
            probed = candidate if own is mesh else make(name, own)
            why = objection(probed, plain, own, model, dtype)
        except Exception as error:  # such as a private module that a newer jax no longer has
            candidate, why = plain, f"cannot be loaded: {error}"
        if not why:
            if lacking := candidate.lacks & model.attention_extras:
                logger.info("%s attention takes no %s; layers with it use %s", name, ", ".join(lacking), plain.name)
            return Choice(attention=candidate, refused=refused)
        logger.warning("the %s kernel for attention %s; using %s", name, why, plain.name)
        return Choice(attention=plain, refused={**refused, name: f"it {why}"}, failed=True)
    return Choice(attention=plain, refused=refused)


def plain_attention(mesh: Mesh) -> Attention:
    """Return the attention that runs everywhere."""
    return blockwise(one_cpu=mesh.size == 1 and mesh.devices.flat[0].platform == "cpu")


def attention_named(name: str, mesh: Mesh) -> Attention:
    """Return the attention that another host has chosen, by its name."""
    return make(name, mesh) if name in PLATFORMS else plain_attention(mesh)


def extras_of_all(model: ModelConfig) -> frozenset[str]:
    """Return which keywords the attention of every layer needs; a kernel that lacks one of them is of no use."""
    windows = model.windows
    some = {"window"} if windows is not None and len(windows.layers) < model.n_layers else set()
    return model.attention_extras - some


def kernel_of(mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> Attention | None:
    """Return the kernel of a described mesh's platform; None where there is none, or not with this jax or model."""
    for name in PLATFORMS:
        if not unsuited(name, mesh, dtype):
            try:
                kernel = make(name, mesh, described=True)
                return None if kernel.lacks & extras_of_all(model) else kernel
            except ImportError as error:
                logger.warning("the %s kernel for attention cannot be loaded: %s", name, error)
    return None


def make(name: str, mesh: Mesh, *, described: bool = False) -> Attention:
    """Return a vendor's kernel by name, unchecked; `described` as of `cudnn`."""
    return splash(mesh) if name == "splash" else cudnn(mesh, described=described)


def unsuited(kernel: str, mesh: Mesh, dtype: jnp.dtype) -> str:
    """Return in words why a vendor's kernel is not even tried on a mesh in a type; "" if it is."""
    platform, people = PLATFORMS[kernel]
    if (found := mesh.devices.flat[0].platform) != platform:
        return f"it is for {people}, and this is a {found}"
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, and the model is {dtype.name}"
    return ""


def cudnn_version() -> str | None:
    """Return the version of the cuDNN that jax has loaded, None where there is none or jax does not say."""
    try:
        from jax._src.lib import cuda_versions

        number = None if cuda_versions is None else cuda_versions.cudnn_get_version()
    except Exception:  # private, and without a GPU absent
        number = None
    if number is None:
        return None
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def agrees(candidate: Attention, plain: Attention, mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> bool:
    """Return whether two attentions give the same outputs and gradients on packed rows; log a warning if not."""
    if why := objection(candidate, plain, mesh, model, dtype):
        logger.warning("attention %s %s, using %s", candidate.name, why, plain.name)
    return not why


def objection(candidate: Attention, plain: Attention, mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> str:
    """Return in words why an attention cannot be trusted here, "" if it gives what the plain one does."""
    try:
        gap = _largest_gap(candidate, plain, mesh, model, dtype)
    except Exception as error:  # whatever a kernel raises on this device, there is one that works
        return f"does not run here: {error}"
    return "" if gap <= TOLERANCE else f"is off by {gap:.3g} on a packed row"


def _largest_gap(candidate: Attention, plain: Attention, mesh: Mesh, model: ModelConfig, dtype: jnp.dtype) -> float:
    ways = ways_of(mesh)
    rows = ways * len(PROBE_LENGTHS)
    K, G, H = model.n_kv_heads, model.group, model.head_dim
    rng = np.random.default_rng(0)
    each = [np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), row) for row in PROBE_LENGTHS]
    segments_BT = np.tile([np.pad(ids, (0, PROBE_ROW - len(ids))) for ids in each], (ways, 1))
    shapes = [(rows, PROBE_ROW, K, G, H), (rows, PROBE_ROW, K, H), (rows, PROBE_ROW, K, H), (rows, PROBE_ROW, K, G, H)]
    q, k, v, do = (put_rows(rng.normal(size=shape).astype(np.float32), mesh) for shape in shapes)
    segments = put_rows(segments_BT, mesh)
    real = segments_BT > 0
    # With one that it lacks, the candidate would be the plain attention, and so always right.
    extras = probe_extras(model, (K, G), PROBE_ROW, candidate.lacks)

    def run(attention: Attention) -> list[np.ndarray]:
        def both(*args: jax.Array) -> tuple[jax.Array, ...]:
            q, k, v, segments, do = args
            o, residual = attention.forward(q, k, v, segments, dtype, **extras)
            return o, *attention.backward(q, k, v, segments, o, residual, do, dtype, **extras)

        do_real = do * real.reshape(*real.shape, 1, 1, 1)  # as in training: nothing flows back from padding
        compiled = jax.jit(both).lower(q, k, v, segments, do_real).compile()
        _poison(mesh)
        return [np.asarray(a, np.float32)[real] for a in compiled(q, k, v, segments, do_real)]

    pairs = zip(run(candidate), run(plain), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def probe_extras(
    model: ModelConfig, heads: tuple[int, int], tokens: int, lacks: frozenset[str] = frozenset()
) -> Extras:
    """Return the keywords that layers of a model need, for a probe over rows of some tokens.

    Args:
        model: whose layers need them.
        heads: K and G.
        tokens: of a row. A window as long as that would not show.
        lacks: those that are left out.
    """
    found: Extras = {}
    if model.windows is not None and "window" not in lacks:
        found["window"] = model.windows.size if model.windows.size < tokens else tokens // 4
    if model.sinks and "sinks" not in lacks:
        found["sinks"] = jnp.asarray(np.random.default_rng(1).normal(size=heads).astype(np.float32))
    if model.query_scale is not None and "scale" not in lacks:
        found["scale"] = model.query_scale
    return found


def _poison(mesh: Mesh) -> None:
    """Fill memory that the next program gets with NaN, where an accelerator gives freed memory out again."""
    if mesh.devices.flat[0].platform != "cpu":
        jax.block_until_ready([jnp.full(POISON, jnp.nan, device=replicated(mesh)) for _ in range(4)])
