"""Which programs sample? Prefill of tiles into the paged cache, and blocks of decode steps.

A tile is one page of one row's tokens, at a fixed place of the row; a prefill takes tiles of any rows, so that two
programs serve every mix of prompts. It stores all of a prompt but its last token and scores it where asked. A decode
step takes each row's newest token, stores its key and value, and draws the next, so the first step is like any other; a
block runs up to `BLOCK_STEPS` steps, as many as it is told, with no host round trip. Of a prompt that is scored and
continued by one token, prefill computes the last token too, and draws from its logits.

Arrays have a leading axis W, the ways that a mesh splits rows: each way has its own pages and its own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.programs import CompileRecord, Program, shardings_of
from jax_client.engine.core.requests import MAX_ALTERNATIVES, MAX_TARGETS, MAX_TOPK_PROMPT, MAX_TOPK_SAMPLE
from jax_client.engine.sample.pages import PAGE
from jax_client.engine.sample.token_sampling import draw_tokens
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, output_head_VD
from jax_client.models.kernels.paged import paged_attention, write_pages, write_tokens
from jax_client.models.layers import contract, from_bits, rms_norm, to_bits
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.block import Context, MixedLinears, layer_forward, mixed_pairs
from jax_client.models.parts.lora import Pair
from jax_client.models.transformer import context, embed
from jax_client.sharding import sharding_for

BLOCK_STEPS = 32
SCORE_CHUNK = 64  # positions whose scores over the vocabulary exist at once
Pool = dict[str, list[jax.Array]]  # "k" and "v": per layer (W, P, K, S, H), in the matmul type or its bits
Batch = dict[str, jax.Array]
# The number of the step, the pool, the rows' state, and what the block has drawn.
Carry = tuple[jax.Array, Pool, Batch, Batch]
# f(q, k, v, k_P, v_P, *tables) -> (o, k_P, v_P): the attention of one way's rows, over its pages after writing to them.
Way = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
# f(x_BTD, w, pairs, k_P, v_P) -> (x_BTD, k_P, v_P): a layer, with its pages of the pool.
Layer = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class SamplePrograms:
    """The compiled sampling programs of one model on one mesh.

    Both programs take the pool's memory over. `loras` are the adapters of a batch, all of one configuration; `scale`
    has alpha / rank in the column of a row's own, and zeros for the base model.
    """

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, mesh: Mesh, attention: Attention, log: list[CompileRecord]
    ):
        self._config = config
        self._dtype = dtype
        self._attention = attention
        self._mesh = mesh
        versions = lambda loras: f", {len(loras)} adapters" if len(loras) > 1 else ", 1 adapter" if loras else ""  # noqa: E731
        tiles = lambda _, loras, __, batch: "{}x{} tokens".format(*batch["tokens"].shape[1:]) + versions(loras)  # noqa: E731
        rows = lambda _, loras, __, batch: f"{batch['token'].shape[1]} rows" + versions(loras)  # noqa: E731
        whole = NamedSharding(mesh, PartitionSpec())
        outputs = lambda *args: (shardings_of(args[2]), whole)  # noqa: E731
        model = Program.model_text(config, dtype, mesh, attention)
        self.prefill = Program("prefill", self._prefill, log, outputs, tiles, donate=(2,), kind="sample", model=model)
        self.decode = Program("decode", self._decode, log, outputs, rows, donate=(2,), kind="sample", model=model)

    def new_pool(self, ways: int, pages: int) -> Pool:
        """Return an empty pool of zeros."""
        c = self._config
        shape = (ways, pages, c.n_kv_heads, PAGE, c.head_dim)
        place = sharding_for(("rows", None, "kv_heads", None, None), shape, self._mesh, "key/value cache")
        kind = to_bits(jnp.zeros((), self._dtype)).dtype
        layer = lambda: jax.device_put(np.zeros(shape, kind), place)  # noqa: E731
        return {name: [layer() for _ in range(c.n_layers)] for name in "kv"}

    def page_bytes(self) -> int:
        """Return the bytes of one page, all layers together, on all devices that share it."""
        c = self._config
        return 2 * c.n_layers * c.n_kv_heads * c.head_dim * PAGE * self._dtype.itemsize

    @jax.named_scope("prefill")
    def _prefill(self, params: Params, loras: tuple[Weights, ...], pool: Pool, batch: Batch) -> tuple[Pool, Batch]:
        """Store tiles, and score their positions where asked.

        Args:
            batch: per tile: `tokens` (W, t, S), `start` (W, t) the position of its first token or -1 for no tile,
                `page` (W, t) where it is stored, `table` (W, t, n) the row's pages up to there, `scale` (W, t, V).
                Per position (N = t x S): `targets` (W, N, `MAX_TARGETS`), and of the tokens to draw `key` (W, N, 2),
                `temperature`, `top_k` and `top_p` (W, N).
                Per chunk of `SCORE_CHUNK` positions: `wanted` (c, 3) int32, whether to score targets, how many top
                tokens (none or all), how many alternatives to draw.

        Returns:
            The pool, and per position `logprobs` of the targets, `top_ids` and `top_logprobs`, `alternatives` and
            `alternative_logprobs`; zeros where not asked for.
        """
        W, t, S = batch["tokens"].shape
        start_Wt1 = batch["start"][..., None]
        position_WtS = jnp.where(start_Wt1 < 0, -1, start_Wt1 + jnp.arange(S))
        place_BS, any_tile = jnp.maximum(position_WtS, 0).reshape(W * t, S), jnp.any(start_Wt1 >= 0)
        c = context(place_BS, self._config, self._dtype, self._attention, work=any_tile)
        scale_MV = jnp.repeat(batch["scale"].reshape(W * t, len(loras)), S, axis=0)

        def way(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            k_P: jax.Array,
            v_P: jax.Array,
            page: jax.Array,
            table: jax.Array,
            position: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            k_P, v_P = write_pages(k_P, v_P, k, v, page)
            return paged_attention(q, k_P, v_P, table, position, self._dtype), k_P, v_P

        layer = self._layer(way, c, scale_MV, W, batch["page"], batch["table"], position_WtS)
        x_BTD = embed(params, batch["tokens"].reshape(W * t, S))
        for i, (w, pairs) in enumerate(self._layers(params, loras)):
            with jax.named_scope(f"layer_{i}"):
                x_BTD, pool["k"][i], pool["v"][i] = layer(x_BTD, w, pairs, pool["k"][i], pool["v"][i])
        h_WND = rms_norm(x_BTD, params["final_norm_D"], self._config.norm_eps).reshape(W, t * S, -1)
        return pool, self._scores(params, loras, h_WND, scale_MV.reshape(W, t * S, len(loras)), batch)

    @jax.named_scope("scores")
    def _scores(
        self, params: Params, loras: tuple[Weights, ...], h_WND: jax.Array, scale_WNV: jax.Array, batch: Batch
    ) -> Batch:
        W, N, _ = h_WND.shape
        per_position = ("targets", "key", "temperature", "top_k", "top_p")
        fields = {"h": h_WND, "scale": scale_WNV, **{name: batch[name] for name in per_position}}

        def cut(a: jax.Array) -> jax.Array:
            """Turn (W, N, ...) into (chunks, W x positions, ...)."""
            a = jnp.moveaxis(a.reshape(W, N // SCORE_CHUNK, SCORE_CHUNK, *a.shape[2:]), 1, 0)
            return a.reshape(len(a), W * SCORE_CHUNK, *a.shape[3:])

        chunks = {name: cut(a) for name, a in fields.items()}

        def chunk(args: tuple[Batch, jax.Array]) -> Batch:
            x, (score, top, draws) = args
            rows, top_tokens = len(x["h"]), min(MAX_TOPK_PROMPT, self._config.vocab_size)
            empty = {
                "logprobs": jnp.zeros((rows, MAX_TARGETS)),
                "top_ids": jnp.zeros((rows, top_tokens), jnp.int32),
                "top_logprobs": jnp.zeros((rows, top_tokens)),
                "alternatives": jnp.zeros((rows, MAX_ALTERNATIVES), jnp.int32),
                "alternative_logprobs": jnp.zeros((rows, MAX_ALTERNATIVES)),
            }

            def scored() -> Batch:
                logits_RV = self._logits(params, loras, x["h"], x["scale"])
                logprobs_RV = jax.nn.log_softmax(logits_RV)
                out = empty | {"logprobs": jnp.take_along_axis(logprobs_RV, x["targets"], axis=1)}
                out["top_ids"], out["top_logprobs"] = _top(logprobs_RV, top_tokens, top > 0)
                settings = [x[name] for name in ("temperature", "top_k", "top_p")]

                def draw(j: jax.Array, ids: jax.Array) -> jax.Array:
                    return ids.at[:, j].set(draw_tokens(logits_RV, x["key"], jnp.full(rows, j), *settings))

                out["alternatives"] = ids = jax.lax.fori_loop(0, draws, draw, empty["alternatives"])
                out["alternative_logprobs"] = jnp.take_along_axis(logprobs_RV, ids, axis=1)
                return out

            return jax.lax.cond(score > 0, scored, lambda: empty)

        out = jax.lax.map(chunk, (chunks, batch["wanted"]))

        def in_order(a: jax.Array) -> jax.Array:
            a = a.reshape(-1, W, SCORE_CHUNK, *a.shape[2:])
            return jnp.moveaxis(a, 0, 1).reshape(W, N, *a.shape[3:])

        return jax.tree.map(in_order, out)

    @jax.named_scope("decode")
    def _decode(self, params: Params, loras: tuple[Weights, ...], pool: Pool, batch: Batch) -> tuple[Pool, Batch]:
        """Run one block of steps.

        Args:
            batch: per row (W, R): `token` its newest token, `position` of that token, `count` tokens drawn so far,
                `max_tokens`, `temperature`, `top_k`, `top_p`, `key` (W, R, 2) uint32, `stop_ids` (W, R, n) padded with
                -1, `top` whether the likeliest tokens are wanted, `table` (W, R, n) its pages, `scale` (W, R, V),
                `copy` (W, R, 2) a page and the one that it is copied into first; a row without work is `done`. And of
                the block: `steps`, int32, the most that it runs.

        Returns:
            The pool, and what the block drew per row: `tokens` and `logprobs` (W, R, `BLOCK_STEPS`), of which the first
            `new` count; `stopped` by a stop id; `top_ids` and `top_logprobs` (W, R, `BLOCK_STEPS`, k).
        """
        W, R = batch["token"].shape
        pool = self._copy_pages(pool, batch["copy"])
        # Sliced before the loop: inside it, XLA would copy each layer's weights out of the stack at every step.
        layers = self._layers(params, loras)
        per_row = batch.keys() - {"copy", "steps"}
        flat = {name: batch[name].reshape(W * R, *batch[name].shape[2:]) for name in sorted(per_row)}
        any_top = jnp.any(flat["top"])

        def step(carry: Carry) -> Carry:
            i, pool, row, drawn = carry
            position_B1, any_row = row["position"][:, None], ~jnp.all(row["done"])
            c = context(position_B1, self._config, self._dtype, self._attention, work=any_row)
            pool = {name: list(arrays) for name, arrays in pool.items()}

            def way(
                q: jax.Array,
                k: jax.Array,
                v: jax.Array,
                k_P: jax.Array,
                v_P: jax.Array,
                table: jax.Array,
                position: jax.Array,
            ) -> tuple[jax.Array, jax.Array, jax.Array]:
                page = jnp.take_along_axis(table, (position // PAGE)[:, None], axis=1)[:, 0]
                k_P, v_P = write_tokens(k_P, v_P, k[:, 0], v[:, 0], page, position % PAGE)
                return paged_attention(q, k_P, v_P, table, position[:, None], self._dtype), k_P, v_P

            layer = self._layer(way, c, flat["scale"], W, batch["table"], row["position"].reshape(W, R))
            x_BTD = embed(params, row["token"][:, None])
            for n, (w, pairs) in enumerate(layers):
                with jax.named_scope(f"layer_{n}"):
                    x_BTD, pool["k"][n], pool["v"][n] = layer(x_BTD, w, pairs, pool["k"][n], pool["v"][n])
            h_BD = rms_norm(x_BTD, params["final_norm_D"], self._config.norm_eps)[:, 0]
            logits_BV = self._logits(params, loras, h_BD, flat["scale"])
            row, new = _advance(logits_BV, row, flat)
            logprobs_BV = logits_BV - new.pop("lse")[:, None]
            new["top_ids"], new["top_logprobs"] = _top(logprobs_BV, MAX_TOPK_SAMPLE, any_top)
            drawn = {name: jax.lax.dynamic_update_index_in_dim(drawn[name], new[name], i, 1) for name in drawn}
            return i + 1, pool, row, drawn

        B, n = W * R, min(MAX_TOPK_SAMPLE, self._config.vocab_size)
        drawn = {
            "tokens": jnp.zeros((B, BLOCK_STEPS), jnp.int32),
            "logprobs": jnp.zeros((B, BLOCK_STEPS)),
            "top_ids": jnp.zeros((B, BLOCK_STEPS, n), jnp.int32),
            "top_logprobs": jnp.zeros((B, BLOCK_STEPS, n)),
        }
        row = {name: flat[name] for name in ("token", "position", "count", "done")} | {"stopped": jnp.zeros(B, bool)}
        unfinished = lambda carry: (carry[0] < batch["steps"]) & ~jnp.all(carry[2]["done"])  # noqa: E731
        _, pool, row, drawn = jax.lax.while_loop(unfinished, step, (jnp.int32(0), pool, row, drawn))
        out = drawn | {"new": row["count"] - flat["count"], "stopped": row["stopped"], "done": row["done"]}
        return pool, {name: a.reshape(W, R, *a.shape[1:]) for name, a in out.items()}

    def _layers(self, params: Params, loras: tuple[Weights, ...]) -> list[tuple[Params, dict[str, Pair]]]:
        """Return each layer's weights and its pairs of all adapters."""
        layers = params["layers"]
        if not isinstance(layers, list):
            layers = [_cut(layers, i) for i in range(self._config.n_layers)]
            for w in layers:
                w["gate_up_L2DF"] = tuple(w["gate_up_L2DF"])
        pairs = [
            mixed_pairs([_cut(lora["layers"], i) for lora in loras], self._dtype) for i in range(self._config.n_layers)
        ]
        return list(zip(from_bits(layers), pairs, strict=True))

    def _layer(self, way: Way, c: Context, scale_MV: jax.Array, ways: int, *tables: jax.Array) -> Layer:
        """Return a layer, whose attention is `way` for the rows, pages and tables of each way.

        It is traced once for all layers: tracing, which one thread does, took as long as a third of XLA's work.
        """

        @jax.jit
        def layer(
            x_BTD: jax.Array, w: Params, pairs: dict[str, Pair], k_P: jax.Array, v_P: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            def attend(*qkv_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                split = [a.reshape(ways, -1, *a.shape[1:]) for a in qkv_BT]
                split[1:] = [a.astype(self._dtype) for a in split[1:]]
                # One way goes without that axis: a CPU's dots are slower with one more batch axis.
                one = lambda *arrays: jax.tree.map(lambda a: a[None], way(*(a[0] for a in arrays)))  # noqa: E731
                o_WR, *stored = (one if ways == 1 else jax.vmap(way))(*split, k_P, v_P, *tables)
                return o_WR.reshape(qkv_BT[0].shape), (stored[0], stored[1])

            linears = MixedLinears(pairs, scale_MV, self._dtype)
            y_BTD, _, (k_P, v_P) = layer_forward(x_BTD, w, linears, c, attend)
            return y_BTD, k_P, v_P

        return layer

    @jax.named_scope("copy_pages")
    def _copy_pages(self, pool: Pool, copy_WR2: jax.Array) -> Pool:
        """Return the pool with pages copied, in the decode program because it has the pool anyway."""
        one = lambda pages, copy: pages.at[copy[:, 1]].set(pages[copy[:, 0]])  # noqa: E731
        each = lambda pages: jax.vmap(one)(pages, copy_WR2)  # noqa: E731
        return jax.lax.cond(jnp.any(copy_WR2 > 0), lambda p: jax.tree.map(each, p), lambda p: p, pool)

    @jax.named_scope("head")
    def _logits(self, params: Params, loras: tuple[Weights, ...], h_ND: jax.Array, scale_NV: jax.Array) -> jax.Array:
        """Return float32 logits (N, vocabulary)."""
        logits_NV = contract("ND,VD->NV", h_ND, from_bits(output_head_VD(params)), self._dtype)
        for i, lora in enumerate(loras):
            if unembed := lora["unembed"]:
                u_NR = contract("ND,RD->NR", h_ND, unembed["A"], self._dtype) * scale_NV[:, i, None]
                logits_NV += contract("NR,RV->NV", u_NR, unembed["B"], self._dtype)
        return logits_NV


def sampling_params(params: Params) -> Params:
    """Return the parameters with each layer's in arrays of their own where that costs no memory: on one CPU.

    There the arrays are views of the stored ones, in bfloat16 instead of its bits where a matmul takes them. A program
    that was given the stacks, or the bits, would copy all weights once per block of steps: 9 ms of a step of 61, and 90
    ms of a block.
    """
    leaves = jax.tree.leaves(params)
    if jax.default_backend() != "cpu" or any(len(leaf.sharding.device_set) > 1 for leaf in leaves):
        return params
    device = next(iter(leaves[0].sharding.device_set))
    numbers = lambda a: a.view(jnp.bfloat16) if a.dtype == np.uint16 else a  # noqa: E731
    stacks = {name: numbers(np.asarray(stack)) for name, stack in params["layers"].items()}
    view = lambda array: jax.device_put(array, device, may_alias=True)  # noqa: E731
    layers = []
    for i in range(len(stacks["down_LFD"])):
        layers.append({name: view(stack[i]) for name, stack in stacks.items() if name != "gate_up_L2DF"})
        layers[i]["gate_up_L2DF"] = tuple(view(half) for half in stacks["gate_up_L2DF"][i])
    # Beside the embedding, whose rows are gathered, also where the two are one.
    return params | {"layers": layers, "unembed_VD": view(numbers(np.asarray(output_head_VD(params))))}


def _cut(stacks: object, layer: int) -> Any:
    """Return one layer of stacked arrays."""
    return from_bits(jax.tree.map(lambda a: a[layer], to_bits(stacks)))


@jax.named_scope("top")
def _top(logprobs_NV: jax.Array, k: int, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the ids and logprobs (N, k) of the likeliest tokens if they are wanted, else zeros."""
    k = min(k, logprobs_NV.shape[1])

    def top() -> tuple[jax.Array, jax.Array]:
        values_Nk, ids_Nk = jax.lax.top_k(logprobs_NV, k)
        return ids_Nk, values_Nk

    shape = (len(logprobs_NV), k)
    return jax.lax.cond(wanted, top, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))


@jax.named_scope("draw")
def _advance(logits_BV: jax.Array, row: Batch, settings: Batch) -> tuple[Batch, Batch]:
    """Draw each row's next token and update its state; finished rows stay as they are."""
    s = settings
    token_B = draw_tokens(logits_BV, s["key"], row["count"], s["temperature"], s["top_k"], s["top_p"])
    lse_B = jax.nn.logsumexp(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - lse_B
    live_B = ~row["done"]
    count_B = row["count"] + live_B
    stopped_B = live_B & jnp.any(s["stop_ids"] == token_B[:, None], axis=-1)
    row = {
        "token": jnp.where(live_B, token_B, row["token"]),
        "position": row["position"] + live_B,
        "count": count_B,
        "stopped": row["stopped"] | stopped_B,
        "done": row["done"] | stopped_B | (count_B >= s["max_tokens"]),
    }
    return row, {"tokens": token_B, "logprobs": logprob_B, "lse": lse_B}
