"""What do torch's ready-made losses compute?"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_client.torch_graph.indexing import gather
from jax_client.torch_graph.pointwise import clamp_min
from jax_client.torch_graph.reductions import log_softmax, norm
from jax_client.torch_graph.values import Table, Value, absolute, floats, number, tensor, together

OPERATIONS = Table()


def _reduced(loss: jax.Array, reduction: Value) -> jax.Array:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return jnp.sum(loss)
    if reduction == "mean":
        return jnp.mean(loss)
    raise ValueError(f"reduction is {str(reduction)[:40]!r}; known are 'none', 'sum' and 'mean'")


def _floats(*values: Value) -> list[jax.Array]:
    return [floats(value) for value in together(*map(tensor, values))]


@OPERATIONS.add("torch.nn.functional.mse_loss")
def mse_loss(input: Value, target: Value, reduction: str = "mean") -> jax.Array:
    """Square the differences."""
    a, b = _floats(input, target)
    return _reduced((a - b) ** 2, reduction)


@OPERATIONS.add("torch.nn.functional.l1_loss")
def l1_loss(input: Value, target: Value, reduction: str = "mean") -> jax.Array:
    """Return absolute differences."""
    a, b = _floats(input, target)
    return _reduced(absolute(a - b), reduction)


@OPERATIONS.add("torch.nn.functional.smooth_l1_loss")
def smooth_l1_loss(input: Value, target: Value, reduction: str = "mean", beta: float = 1.0) -> jax.Array:
    """Square small differences; of those beyond beta take the absolute value."""
    number(beta)
    if beta == 0:
        return l1_loss(input, target, reduction)
    return huber_loss(input, target, reduction, beta, scale=1 / beta)


@OPERATIONS.add("torch.nn.functional.huber_loss")
def _huber(input: Value, target: Value, reduction: str = "mean", delta: float = 1.0) -> jax.Array:
    return huber_loss(input, target, reduction, delta)


def huber_loss(input: Value, target: Value, reduction: str, delta: float, *, scale: float = 1.0) -> jax.Array:
    """Return half the square up to delta, and delta (|x| - delta / 2) beyond, both times scale."""
    number(delta)
    a, b = _floats(input, target)
    away = absolute(a - b)
    return _reduced(jnp.where(away < delta, 0.5 * away * away, delta * (away - 0.5 * delta)) * scale, reduction)


@OPERATIONS.add("torch.nn.functional.binary_cross_entropy_with_logits")
def bce_with_logits(
    input: Value, target: Value, weight: Value = None, reduction: str = "mean", pos_weight: Value = None
) -> jax.Array:
    """Return -y log sigmoid(x) - (1 - y) log sigmoid(-x)."""
    x, y = _floats(input, target)
    negative = jax.nn.softplus(-x)
    if pos_weight is not None:
        negative = negative * (1 + (tensor(pos_weight) - 1) * y)
    loss = (1 - y) * x + negative
    return _reduced(loss if weight is None else _product(loss, weight), reduction)


def _product(loss: jax.Array, weight: Value) -> jax.Array:
    a, b = together(loss, tensor(weight))
    return a * b


@jax.custom_vjp
def _cross_entropy(p: jax.Array, y: jax.Array) -> jax.Array:
    return -(y * clamp_min(jnp.log(p), -100) + (1 - y) * clamp_min(jnp.log1p(-p), -100))


def _cross_entropy_pullback(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    # As torch's: finite where p is exactly 0 or 1, as the probability of a token that is certain.
    p, y = saved
    by_y = clamp_min(jnp.log1p(-p), -100) - clamp_min(jnp.log(p), -100)
    return g * (p - y) / jnp.maximum(p * (1 - p), 1e-12), g * by_y


_cross_entropy.defvjp(lambda p, y: (_cross_entropy(p, y), (p, y)), _cross_entropy_pullback)


@OPERATIONS.add("torch.nn.functional.binary_cross_entropy")
def binary_cross_entropy(input: Value, target: Value, weight: Value = None, reduction: str = "mean") -> jax.Array:
    """Return -y log p - (1 - y) log(1 - p), each logarithm at least -100."""
    loss = _cross_entropy(*jnp.broadcast_arrays(*_floats(input, target)))
    return _reduced(loss if weight is None else _product(loss, weight), reduction)


@OPERATIONS.add("torch.nn.functional.kl_div")
def kl_div(input: Value, target: Value, reduction: str = "mean", log_target: bool = False) -> jax.Array:
    """Return t (log t - x) for log probabilities x."""
    x, t = _floats(input, target)
    loss = jnp.exp(t) * (t - x) if log_target else jax.scipy.special.xlogy(t, t) - t * x
    if reduction == "batchmean":
        return jnp.sum(loss) / jnp.asarray(x.shape[0] if x.ndim else 1, loss.dtype)
    return _reduced(loss, reduction)


@OPERATIONS.add("torch.nn.functional.nll_loss")
def nll_loss(input: Value, target: Value, ignore_index: int = -100, reduction: str = "mean") -> jax.Array:
    """Return minus the log probability of each target; targets of `ignore_index` do not count."""
    x, y = floats(input), tensor(target)
    if x.ndim not in (1, 2) or y.shape != x.shape[:-1] or y.dtype.kind != "i":
        raise ValueError(
            f"input has shape {list(x.shape)}, target {list(y.shape)} of {y.dtype}; give [N, C] and N classes"
        )
    counts = y != ignore_index
    picked = gather(x, -1, jnp.where(counts, y, 0)[..., None])[..., 0]
    loss = jnp.where(counts, -picked, 0.0)
    if reduction == "mean":
        return jnp.sum(loss) / jnp.sum(counts).astype(x.dtype)
    return _reduced(loss, reduction)


@OPERATIONS.add("torch.nn.functional.cross_entropy")
def cross_entropy(
    input: Value, target: Value, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> jax.Array:
    """Return the cross entropy of logits, the targets classes or probabilities."""
    if label_smoothing != 0:
        raise ValueError(f"label_smoothing is {label_smoothing}; only 0 is known")
    logprobs = log_softmax(input, -1 if tensor(input).ndim < 3 else 1)
    y = tensor(target)
    if y.dtype.kind != "f":
        return nll_loss(logprobs, y, ignore_index, reduction)
    if logprobs.ndim not in (1, 2) or y.shape != logprobs.shape:
        raise ValueError(f"input has shape {list(logprobs.shape)}, target {list(y.shape)}; give [N, C] twice")
    return _reduced(-jnp.sum(logprobs * y, axis=-1), reduction)


@OPERATIONS.add("torch.nn.functional.margin_ranking_loss")
def margin_ranking_loss(
    input1: Value, input2: Value, target: Value, margin: float = 0, reduction: str = "mean"
) -> jax.Array:
    """Return max(0, -y (x1 - x2) + margin)."""
    number(margin)
    a, b, y = _floats(input1, input2, target)
    return _reduced(clamp_min(-y * (a - b) + margin, 0), reduction)


@OPERATIONS.add("torch.cosine_similarity", "torch.nn.functional.cosine_similarity")
def cosine_similarity(x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> jax.Array:
    """Return the cosine between two tensors along a dimension."""
    number(eps)
    a, b = jnp.broadcast_arrays(*_floats(x1, x2))
    a, b = (x / clamp_min(norm(x, 2, dim, True), eps) for x in (a, b))
    return jnp.sum(a * b, axis=dim)
