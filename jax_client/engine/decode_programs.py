"""What runs on the device to sample? Prefill into a key/value cache, blocks of decode steps, and prompt top-k.

Slot s of a row's cache holds the key and value of its token s. Prefill stores all prompt tokens but the last; a decode
step takes the row's newest token, stores its key and value, and draws the next one, so the first step is like any
other. A block runs up to `BLOCK_STEPS` steps in one program with no host round trip.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_client.engine.compiled import CompileRecord, Program, same_place
from jax_client.engine.draw import draw_tokens
from jax_client.models.attention import Attention
from jax_client.models.block import layer_forward, row_attention
from jax_client.models.blockwise import MASKED
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import output_head_VD
from jax_client.models.layers import contract, from_bits, rms_norm, to_bits
from jax_client.models.lora import lora_scale
from jax_client.models.transformer import context, embed, forward_pass
from jax_client.sharding import sharding_for

BLOCK_STEPS = 32
TOPK_CHUNK = 64
Cache = list[dict[str, jax.Array]]  # one {"k", "v"} of (B, S, K, H) per layer
Row = dict[str, jax.Array]


class DecodePrograms:
    """The compiled sampling programs of one model on one mesh."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, mesh: Mesh, attention: Attention, log: list[CompileRecord]
    ):
        self._config = config
        self._dtype = dtype
        self._attention = attention
        self._mesh = mesh
        size = lambda _, __, tokens_PT, *rest: "x".join(map(str, tokens_PT.shape))  # noqa: E731
        slots = lambda _, __, cache, row: "{} rows of {} slots".format(*cache[0]["k"].shape[:2])  # noqa: E731
        self.prefill = Program("prefill", self._prefill, log, lambda *args: self._cache_place(len(args[4])), size)
        self.grow = Program("grow_cache", _grow, log, lambda cache: self._cache_place(len(cache[0]["k"])))
        self.decode = Program("decode", self._decode, log, lambda *args: (*same_place(args[2:]), None), slots)
        self.top_tokens = Program("prompt_top_tokens", self._top_tokens, log, label=size)

    def _cache_place(self, rows: int) -> Any:
        c = self._config
        shape = (rows, 1, c.n_kv_heads, c.head_dim)
        place = sharding_for(("rows", None, "kv_heads", None), shape, self._mesh, "key/value cache")
        return [{"k": place, "v": place}] * c.n_layers

    def _prefill(
        self,
        params: Any,
        weights: Any,
        tokens_PT: jax.Array,
        lengths_P: jax.Array,
        prompt_of_row_B: jax.Array,
        *,
        slots: int,
    ) -> Cache:
        """Return the cache of B rows, of which row b continues prompt `prompt_of_row_B[b]`; each prompt runs once.

        Args:
            tokens_PT: int32 prompts without their last token, right-padded.
            lengths_P: int32 tokens of each.
            slots: S, cache length.
        """
        T = tokens_PT.shape[1]
        positions_PT = jnp.broadcast_to(jnp.arange(T), tokens_PT.shape)
        segments_PT = (positions_PT < lengths_P[:, None]).astype(jnp.int32)
        c = context(positions_PT, self._config, self._dtype, self._attention)
        attend = row_attention(segments_PT, c)

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            w, lora = from_bits(layer)
            y, _, (k, v, _) = layer_forward(x, w, lora, c, attend)
            return y, (k.astype(self._dtype), v.astype(self._dtype))

        _, (k_LPTKH, v_LPTKH) = jax.lax.scan(
            step, embed(params, tokens_PT), to_bits((params["layers"], weights["layers"]))
        )

        def rows(kv_PTKH: jax.Array) -> jax.Array:
            return jnp.pad(kv_PTKH[prompt_of_row_B], ((0, 0), (0, slots - T), (0, 0), (0, 0)))

        return [{"k": rows(k_LPTKH[i]), "v": rows(v_LPTKH[i])} for i in range(self._config.n_layers)]

    def _decode(self, params: Any, weights: Any, cache: Cache, row: Row) -> tuple[Cache, Row, Row]:
        """Run one block of steps.

        Args:
            row: per row: `token` its newest token, `position` of that token, `count` tokens drawn so far, `done`,
                `stopped` by a stop id, and the settings `max_tokens`, `temperature`, `top_k`, `top_p`,
                `key` (B, 2) uint32, `stop_ids` (B, n) padded with -1.

        Returns:
            The new cache and rows, and what the block drew: `tokens` and `logprobs` (B, BLOCK_STEPS), of which a row's
            first entries count, as many as its `count` grew by.
        """
        # Sliced before the loop: inside it, XLA would copy each layer's weights out of the stack at every step.
        layers = [
            from_bits(jax.tree.map(lambda a, i=i: a[i], to_bits((params["layers"], weights["layers"]))))
            for i in range(self._config.n_layers)
        ]

        B = row["token"].shape[0]
        drawn = {"tokens": jnp.zeros((B, BLOCK_STEPS), jnp.int32), "logprobs": jnp.zeros((B, BLOCK_STEPS))}

        def unfinished(carry: tuple[jax.Array, Cache, Row, Row]) -> jax.Array:
            return (carry[0] < BLOCK_STEPS) & ~jnp.all(carry[2]["done"])

        def step(carry: tuple[jax.Array, Cache, Row, Row]) -> tuple[jax.Array, Cache, Row, Row]:
            i, cache, row, drawn = carry
            logits_BV, cache = self._next_logits(params, weights, layers, cache, row)
            row, new = _advance(logits_BV, row)
            drawn = {name: jax.lax.dynamic_update_index_in_dim(drawn[name], new[name], i, 1) for name in drawn}
            return i + 1, cache, row, drawn

        _, cache, row, drawn = jax.lax.while_loop(unfinished, step, (jnp.int32(0), cache, row, drawn))
        return cache, row, drawn

    def _next_logits(
        self, params: Any, weights: Any, layers: list[Any], cache: Cache, row: Row
    ) -> tuple[jax.Array, Cache]:
        position_B1 = row["position"][:, None]
        c = context(position_B1, self._config, self._dtype, self._attention)
        x_BTD = embed(params, row["token"][:, None])
        new_cache = []
        for (w, lora), kv in zip(layers, cache, strict=True):
            x_BTD, _, kv = layer_forward(x_BTD, w, lora, c, self._cache_attention(kv, position_B1))
            new_cache.append(kv)
        h_BD = rms_norm(x_BTD, params["final_norm_D"], self._config.norm_eps)[:, 0]
        return self._logits(params, weights, h_BD), new_cache

    def _cache_attention(self, kv: dict[str, jax.Array], position_B1: jax.Array) -> Any:
        def attend(q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, Any]:
            here = (jnp.arange(q_BTKGH.shape[0]), position_B1[:, 0])
            k_BSKH = kv["k"].at[here].set(k_BTKH[:, 0].astype(self._dtype))
            v_BSKH = kv["v"].at[here].set(v_BTKH[:, 0].astype(self._dtype))
            s_BKGTS = contract("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, self._dtype) * q_BTKGH.shape[-1] ** -0.5
            visible_BS = jnp.arange(k_BSKH.shape[1]) <= position_B1
            s_BKGTS = jnp.where(visible_BS[:, None, None, None], s_BKGTS, MASKED)
            p_BKGTS = jnp.exp(s_BKGTS - jnp.max(s_BKGTS, axis=-1, keepdims=True)).astype(self._dtype)
            l_BKGT = jnp.sum(p_BKGTS, axis=-1, dtype=jnp.float32)  # of what is multiplied, as in `blockwise_forward`
            o_BTKGH = contract("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH, self._dtype)
            return o_BTKGH / jnp.moveaxis(l_BKGT, 3, 1)[..., None], {"k": k_BSKH, "v": v_BSKH}

        return attend

    def _logits(self, params: Any, weights: Any, h_ND: jax.Array) -> jax.Array:
        """Return float32 logits (N, V); N is a batch of single positions, never a whole prompt."""
        logits_NV = contract("ND,VD->NV", h_ND, from_bits(output_head_VD(params)), self._dtype)
        if unembed := weights["unembed"]:
            u_NR = contract("ND,RD->NR", h_ND, unembed["A"], self._dtype) * lora_scale(unembed["A"])
            logits_NV += contract("NR,RV->NV", u_NR, unembed["B"], self._dtype)
        return logits_NV

    def _top_tokens(
        self, params: Any, weights: Any, tokens_1T: jax.Array, length: jax.Array, *, k: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return the k likeliest next tokens at each position of one prompt: ids (T, k) and logprobs (T, k)."""
        positions_1T = jnp.arange(tokens_1T.shape[1])[None]
        segments_1T = (positions_1T < length).astype(jnp.int32)
        c = context(positions_1T, self._config, self._dtype, self._attention)
        h_BTD, _ = forward_pass(params, weights["layers"], tokens_1T, segments_1T, c, None)

        def chunk(h_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
            logprobs_Nk, ids_Nk = jax.lax.top_k(jax.nn.log_softmax(self._logits(params, weights, h_ND)), k)
            return ids_Nk, logprobs_Nk

        ids, logprobs = jax.lax.map(chunk, h_BTD.reshape(-1, min(TOPK_CHUNK, h_BTD.shape[1]), h_BTD.shape[-1]))
        return ids.reshape(-1, k), logprobs.reshape(-1, k)


def _advance(logits_BV: jax.Array, row: Row) -> tuple[Row, Row]:
    """Draw each row's next token and update its state; finished rows stay as they are."""
    token_B = draw_tokens(logits_BV, row["key"], row["count"], row["temperature"], row["top_k"], row["top_p"])
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
    live_B = ~row["done"]
    count_B = row["count"] + live_B
    stopped_B = live_B & jnp.any(row["stop_ids"] == token_B[:, None], axis=-1)
    row = row | {
        "token": jnp.where(live_B, token_B, row["token"]),
        "position": row["position"] + live_B,
        "count": count_B,
        "stopped": row["stopped"] | stopped_B,
        "done": row["done"] | stopped_B | (count_B >= row["max_tokens"]),
    }
    return row, {"tokens": token_B, "logprobs": logprob_B}


def _grow(cache: Cache, *, slots: int) -> Cache:
    """Return the cache with more slots per row."""
    return jax.tree.map(lambda kv: jnp.pad(kv, ((0, 0), (0, slots - kv.shape[1]), (0, 0), (0, 0))), cache)
