"""Is each attention of this package right on the devices at hand? Each is compared with plain softmax in float64.

Packed rows with documents of one token, padding between and behind them, and heads of both usual widths; for sampling,
pages in a shuffled order, and rows of different lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core.attention_check import PLATFORMS, make, plain_attention, unsuited
from jax_client.engine.core.paged_check import preferred_attention
from jax_client.engine.devices.arrays import put_rows, put_whole
from jax_client.engine.sample.pages import PAGE
from jax_client.models.kernels.cache import PagedAttention, small_turns, wide_turns
from jax_client.models.layers import to_bits
from jax_client.models.parts.attention import Attention
from jax_client.selftest import toy
from jax_client.selftest.goldens import largest
from jax_client.selftest.reference import attention, attention_backward
from jax_client.selftest.row import Row, gap_row
from jax_client.sharding import ways_of

DTYPES = ("float32", "bfloat16")
ROW = 256  # tokens
DOCUMENTS = ((70, 1, 100, 40), (3, 200))  # of a row each, with padding behind
WIDTHS = (128, 64)
KV_HEADS, GROUP = 2, 2
# Largest difference relative to the largest value. Leaking a document into the next gives 0.3 and more.
BARS = {"float32": 1e-4, "bfloat16": 0.03}
LENGTHS = (1, 31, 33, 100)  # of the rows that are sampled, the newest token included


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """Random queries, keys, values and cotangents of packed rows, on the host, and what plain softmax makes of them.

    Attributes:
        expected: the output and the cotangents of q, k and v, 0 at padding.
    """

    q_BTKGH: np.ndarray
    k_BTKH: np.ndarray
    v_BTKH: np.ndarray
    do_BTKGH: np.ndarray
    segments_BT: np.ndarray
    expected: list[np.ndarray]


def operands(rows: int, width: int, dtype: str) -> Operands:
    """Draw the operands of `rows` packed rows, as the type holds them."""
    rng, K, G, H = np.random.default_rng(0), KV_HEADS, GROUP, width
    draw = lambda *shape: rng.standard_normal(shape).astype(jnp.dtype(dtype)).astype(np.float32)  # noqa: E731
    segments_BT = np.zeros((rows, ROW), np.int32)
    for row in range(rows):
        lengths = DOCUMENTS[row % len(DOCUMENTS)]
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segments_BT[row, : len(ids)] = ids
    q, k, v = draw(rows, ROW, K, G, H), draw(rows, ROW, K, H), draw(rows, ROW, K, H)
    do = draw(rows, ROW, K, G, H) * (segments_BT > 0)[..., None, None, None]
    found: list[list[np.ndarray]] = []
    for row, ids in enumerate(segments_BT):
        visible_TT = np.tril(ids[:, None] == ids) & (ids > 0)
        q_TNH, do_TNH = (x[row].reshape(ROW, K * G, H).astype(np.float64) for x in (q, do))
        k_SKH, v_SKH = (x[row].astype(np.float64) for x in (k, v))
        o_TNH, p_NTS = attention(q_TNH, k_SKH, v_SKH, visible_TT)
        found.append([o_TNH, *attention_backward(do_TNH, q_TNH, k_SKH, v_SKH, p_NTS)])
    stacked = [np.stack(each) for each in zip(*found, strict=True)]
    expected = [a.reshape(like.shape) for a, like in zip(stacked, (q, q, k, v), strict=True)]
    return Operands(q_BTKGH=q, k_BTKH=k, v_BTKH=v, do_BTKGH=do, segments_BT=segments_BT, expected=expected)


def training_rows(mesh: Mesh, candidates: list[Attention | str] | None = None) -> Iterator[Row]:
    """Compare each attention that training may use on this mesh with plain softmax.

    Args:
        mesh: of the devices.
        candidates: attentions; of one that is not used here, "NAME: why not". None takes all that there are.
    """
    where = f" on {mesh.size} devices" if mesh.size > 1 else ""
    skipped = set[str]()
    for dtype in DTYPES:
        for candidate in known(mesh, dtype) if candidates is None else candidates:
            if isinstance(candidate, str):
                name, _, why = candidate.partition(": ")
                if candidate not in skipped:
                    yield Row(check=f"attention {name}{where}", verdict="SKIP", meaning=f"not used here: {why}")
                skipped.add(candidate)
                continue
            gaps = [gap(candidate, mesh, operands(_rows(mesh), width, dtype), dtype) for width in WIDTHS]
            note = ", ".join(f"heads of {width}: {each:.1g}" for width, each in zip(WIDTHS, gaps, strict=True))
            yield gap_row(
                f"{dtype} attention {candidate.name}{where}",
                largest(gaps),
                BARS[dtype],
                f"the {candidate.name} kernel gives wrong outputs or gradients on this device: it mixes heads or "
                "documents up, or was compiled wrongly. Report this table; other versions of jax may be right.",
                note,
            )


def known(mesh: Mesh, dtype: str) -> list[Attention | str]:
    """Return the attentions that training may use on a mesh in a type; of each other one its name and why not."""
    found: list[Attention | str] = [plain_attention(mesh)]
    for name in PLATFORMS:
        if why := unsuited(name, mesh, jnp.dtype(dtype)):
            found.append(f"{name}: {why}")
            continue
        try:
            found.append(make(name, mesh))
        except Exception as error:  # whatever the reason, an engine takes another one then
            found.append(f"{name}: it cannot be loaded: {error}")
    return found


def gap(candidate: Attention, mesh: Mesh, given: Operands, dtype: str) -> float:
    """Return the largest difference of an attention's output and cotangents, relative to the largest value."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
        o, residual = candidate.forward(q, k, v, segments, jnp.dtype(dtype))
        return o, *candidate.backward(q, k, v, segments, o, residual, do, jnp.dtype(dtype))

    arrays = given.q_BTKGH, given.k_BTKH, given.v_BTKH, given.do_BTKGH, given.segments_BT
    found = jax.device_get(jax.jit(both)(*(put_rows(array, mesh) for array in arrays)))
    real = given.segments_BT > 0  # what stands at padding is left to the kernel
    pairs = [(a[real], b[real]) for a, b in zip(found, given.expected, strict=True)]
    return largest(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def sampling_rows(mesh: Mesh) -> Iterator[Row]:
    """Compare each attention that may sample here with plain softmax on one device: of prompts, and single tokens."""
    platform = mesh.devices.flat[0].platform
    plain = small_turns() if platform == "cpu" else wide_turns(platform)
    for dtype in DTYPES:
        gaps: dict[str, dict[int, float]] = {}
        for width in WIDTHS:
            model = toy.Toy(kv_heads=KV_HEADS, head_width=width).model()
            choice = preferred_attention(mesh, model, jnp.dtype(dtype))
            for candidate in {each.name: each for each in (choice.attention, plain)}.values():
                gaps.setdefault(candidate.name, {})[width] = paged_gap(candidate, mesh, width, dtype)
            if choice.refused:
                check = f"the kernel of sampling, {dtype}, heads of {width}"
                yield Row(check=check, verdict="SKIP", meaning=f"not used here: {choice.refused}")
        for name, by_width in gaps.items():
            yield gap_row(
                f"{dtype} attention {name}",
                largest(by_width.values()),
                BARS[dtype],
                "the sampler's attention reads other keys and values than those of its row: samples are wrong.",
                ", ".join(f"heads of {width}: {each:.1g}" for width, each in by_width.items()),
            )


def paged_gap(candidate: PagedAttention, mesh: Mesh, width: int, dtype: str) -> float:
    """Return the largest difference for rows that have pages of their own, relative to the largest value.

    All tokens but each row's newest are written as whole pages, the newest alone, as a prompt and a decode step do.
    """
    rng, K, G, H, R = np.random.default_rng(0), KV_HEADS, GROUP, width, len(LENGTHS)
    n = -(-max(LENGTHS) // PAGE)
    kind = jnp.dtype(dtype)
    draw = lambda *shape: rng.standard_normal(shape).astype(kind).astype(np.float32)  # noqa: E731
    q_R1KGH, k_RSKH, v_RSKH = draw(R, 1, K, G, H), draw(R, n * PAGE, K, H), draw(R, n * PAGE, K, H)
    table_Rn = 1 + rng.permutation(R * n).reshape(R, n).astype(np.int32)
    last_R = np.asarray(LENGTHS, np.int32) - 1
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def run(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, last: jax.Array) -> jax.Array:
        shapes = candidate.token_shapes(K, H).items()  # what lies in an unwritten place must not be seen
        pool = {name: jnp.full((1 + R * n, PAGE, *token), 7.0, kind) for name, token in shapes}
        pool = to_bits(pool) if on_cpu else pool
        none = jnp.zeros((R, PAGE, K, G, H))
        for i in range(n):
            k_page, v_page = (x[:, i * PAGE : (i + 1) * PAGE].astype(kind) for x in (k, v))
            position = jnp.broadcast_to(i * PAGE + jnp.arange(PAGE), (R, PAGE))
            _, pool = candidate.attend(none, k_page, v_page, pool, table, table[:, i], position, kind)
        at = jnp.take_along_axis(table, (last // PAGE)[:, None], axis=1)[:, 0]
        k_new, v_new = (jnp.take_along_axis(x, last[:, None, None, None], axis=1).astype(kind) for x in (k, v))
        return candidate.attend(q, k_new, v_new, pool, table, at, last[:, None], kind)[0]

    arrays = q_R1KGH, k_RSKH, v_RSKH, table_Rn, last_R
    found = jax.device_get(jax.jit(run)(*(put_whole(array, mesh) for array in arrays)))
    expected = []
    for row, last in enumerate(last_R):
        visible_1S = (np.arange(n * PAGE) <= last)[None]
        q_1NH = q_R1KGH[row].reshape(1, K * G, H).astype(np.float64)
        k_SKH, v_SKH = (x[row].astype(np.float64) for x in (k_RSKH, v_RSKH))
        expected.append(attention(q_1NH, k_SKH, v_SKH, visible_1S)[0])
    wanted = np.stack(expected).reshape(found.shape)
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


def _rows(mesh: Mesh) -> int:
    return 2 * ways_of(mesh)
