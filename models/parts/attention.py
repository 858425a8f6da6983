"""Which attention does a pass run, and what do layers ask of it?

An `Attention` is a pair of functions, since the layers' backward pass is written by hand. The forward one also returns
what the backward one needs besides the inputs and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.models.kernels.blockwise import blockwise_backward, blockwise_forward

Output = tuple[jax.Array, Any]
Gradients = tuple[jax.Array, jax.Array, jax.Array]
# The vendors' kernels take rows in multiples of this; shorter prompts go blockwise.
KERNEL_ROWS = 128


class Reach(TypedDict, total=False):
    """How far a query sees, and the scale of its scores, as for `blockwise_forward`."""

    window: int | None
    scale: float | None


class Extras(Reach, total=False):
    """What an attention may have beside causality and segments."""

    sinks: jax.Array | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Causal attention within segments, forwards and backwards.

    Attributes:
        name: for `describe()` and the log.
        forward: `forward(q_BTKGH, k_BTKH, v_BTKH, segments_BT, dtype) -> (o_BTKGH, residual)`, float32.
        backward: `backward(q, k, v, segments, o, residual, do, dtype) -> (dq, dk, dv)`, float32. Both take the keywords
            `window`, `sinks` and `scale`, as for `blockwise_forward`; None, the default of each, is for attention
            without it. Both get the same.
        row_length: longest row that several sequences should share. None: the work follows the segments' lengths and
            not the row's, so a long row of short ones is cheap.
        max_segments: most segments of a row; None for any number.
        lacks: those of the keywords that the vendor's kernels do not take: layers that need one go blockwise.
    """

    name: str
    forward: Callable[..., Output]
    backward: Callable[..., Gradients]
    row_length: int | None
    max_segments: int | None = None
    lacks: frozenset[str] = frozenset()


def blockwise(one_cpu: bool) -> Attention:
    """Return the attention that runs everywhere, in plain JAX; `one_cpu` as for its functions."""

    def forward(*args: Any, **more: Unpack[Extras]) -> Output:
        return blockwise_forward(*args, one_cpu=one_cpu, **more)

    def backward(*args: Any, **more: Unpack[Extras]) -> Gradients:
        return blockwise_backward(*args, one_cpu=one_cpu, **_without_sinks(more))

    return Attention(name="blockwise", forward=forward, backward=backward, row_length=None if one_cpu else 2048)


def splash(mesh: Mesh, interpret: bool = False) -> Attention:
    """Return the TPU's kernel."""
    # Here and below: only the platform that runs a kernel imports it, for Pallas is large and cuDNN's part is private.
    from jax_client.models.kernels.splash import splash_backward, splash_forward

    own = {"mesh": mesh, "interpret": interpret}

    def forward(*args: Any, **more: Unpack[Extras]) -> Output:
        *operands, dtype = args
        return splash_forward(*operands, dtype=dtype, **own, **more)

    def backward(*args: Any, **more: Unpack[Extras]) -> Gradients:
        *operands, dtype = args
        return splash_backward(*operands, dtype=dtype, **own, **_without_sinks(more))

    return _for_long_rows(Attention(name="splash", forward=forward, backward=backward, row_length=2048))


def cudnn(mesh: Mesh, max_segments: int = 64, *, described: bool = False) -> Attention:
    """Return NVIDIA's kernel, for bfloat16; raise RuntimeError where cuDNN is missing or too old.

    Of devices that are only `described`, nothing is asked: nothing will run.

    Its softmax statistics take (rows, segments, heads, row length): both limits keep them small. They are not kept for
    the backward pass, in whose program the forward kernel runs again. jax's derivative of it is wrong where the
    statistics are used, as sinks would, and its windows were never measured here: such layers go blockwise.
    """
    from jax_client.models.kernels.cudnn import cudnn_attention, refuse_old_cudnn

    if not described:
        refuse_old_cudnn()

    def kernel(segments: jax.Array, dtype: jnp.dtype, more: Extras) -> Callable[..., jax.Array]:
        scale = more.get("scale")
        options: Any = {"dtype": dtype, "mesh": mesh, "max_segments": max_segments, "scale": scale}
        return lambda q, k, v: cudnn_attention(q, k, v, segments, **options)

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, dtype: jnp.dtype, **more: Unpack[Extras]
    ) -> Output:
        return kernel(segments, dtype, more)(q, k, v), ()

    def backward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array,
        o: jax.Array,
        residual: tuple[()],
        do: jax.Array,
        dtype: jnp.dtype,
        **more: Unpack[Extras],
    ) -> Gradients:
        return jax.vjp(kernel(segments, dtype, more), q, k, v)[1](do)

    kernels = Attention(
        name="cudnn",
        forward=forward,
        backward=backward,
        row_length=4096,
        max_segments=max_segments,
        lacks=frozenset({"window", "sinks"}),
    )
    return _for_long_rows(kernels)


def _without_sinks(more: Extras) -> Reach:
    """Return what a backward pass is told: sinks are in the sums that it reads."""
    return Reach(window=more.get("window"), scale=more.get("scale"))


def _for_long_rows(kernels: Attention) -> Attention:
    """Return an attention that runs a vendor's kernels on rows and layers that they take, and else blockwise."""
    plain = blockwise(one_cpu=False)

    def chosen(q_BTKGH: jax.Array, more: Extras) -> Attention:
        needed = {name for name, value in more.items() if value is not None}
        return plain if q_BTKGH.shape[1] % KERNEL_ROWS or kernels.lacks & needed else kernels

    def forward(*args: Any, **more: Unpack[Extras]) -> Output:
        return chosen(args[0], more).forward(*args, **more)

    def backward(*args: Any, **more: Unpack[Extras]) -> Gradients:
        return chosen(args[0], more).backward(*args, **more)

    return replace(kernels, forward=forward, backward=backward)
