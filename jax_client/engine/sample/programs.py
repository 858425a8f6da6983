"""Which programs sample? Prefill of tiles into the paged cache, and blocks of decode steps.

A tile is one page of one row's tokens, at a fixed place of the row; a prefill takes tiles of any rows, so that two
programs serve every mix of prompts. It stores all of a prompt but its last token and scores it where asked. A decode
step takes each row's newest token, stores its key and value, and draws the next, so the first step is like any other; a
block runs up to `BLOCK_STEPS` steps, as many as it is told, with no host round trip. Of a prompt that is scored and
continued by one token, prefill computes the last token too, and draws from its logits.

Arrays have a leading axis W, the ways that a mesh splits rows: each way has its own pages and its own rows. The
programs are written for one device, which has one way's rows and its own heads of them; `Shards` says what it asks of
the others.
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
from jax_client.engine.sample.pages import PAGE, page_bytes
from jax_client.engine.sample.shards import Shards
from jax_client.engine.sample.token_sampling import draw_tokens
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, output_head_VD, param_specs
from jax_client.models.kernels.paged import paged_attention, write_pages, write_tokens
from jax_client.models.layers import contract, from_bits, rms_norm
from jax_client.models.lora_arrays import lora_arrays
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.block import Context, MixedLinears, layer_forward, mixed_pairs
from jax_client.models.parts.lora import Pair
from jax_client.models.transformer import context
from jax_client.sharding import sharding_for
from jax_client.values import LoraSpec

BLOCK_STEPS = 32
SCORE_CHUNK = 64  # positions whose scores over the vocabulary exist at once
HEAD_BLOCK = 16_384  # tokens of the vocabulary whose weights exist at once, where the ways gather them
# "k" and "v": (W, L, P, S, K, H), in the matmul type or its bits.
Pool = dict[str, jax.Array]
Batch = dict[str, jax.Array]
# Whether any way goes on, the number of the step, the pool, the rows' state, and what the block has drawn.
Carry = tuple[jax.Array, jax.Array, Pool, Batch, Batch]
# f(q, k, v, k_N, v_N, first) -> (o, k_N, v_N): attention over the pages, which it writes to; a layer's begin at first.
Attend = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


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
        self._shards = Shards(mesh)
        self._accelerator = mesh.devices.flat[0].platform != "cpu"
        specs = lambda p: sharding_for(p.axes, p.shape, mesh).spec  # noqa: E731
        self._specs: Any = jax.tree.map(specs, param_specs(config, dtype))
        self._head_spec: PartitionSpec = self._specs.get("unembed_VD", self._specs["embed_VD"])
        self._split_vocabulary = "tensor" in (self._head_spec[0] or ())
        versions = lambda loras: f", {len(loras)} adapters" if len(loras) > 1 else ", 1 adapter" if loras else ""  # noqa: E731
        tiles = lambda _, loras, __, batch: "{}x{} tokens".format(*batch["tokens"].shape[1:]) + versions(loras)  # noqa: E731
        rows = lambda _, loras, __, batch: f"{batch['token'].shape[1]} rows" + versions(loras)  # noqa: E731
        whole = NamedSharding(mesh, PartitionSpec())
        outputs = lambda *args: (shardings_of(args[2]), whole)  # noqa: E731
        model = Program.model_text(config, dtype, mesh, attention)
        self.prefill = Program(
            "prefill", self._on_devices(self._prefill), log, outputs, tiles, donate=(2,), kind="sample", model=model
        )
        self.decode = Program(
            "decode", self._on_devices(self._decode), log, outputs, rows, donate=(2,), kind="sample", model=model
        )

    def new_pool(self, ways: int, pages: int) -> Pool:
        """Return an empty pool of zeros, `pages` for each way."""
        shapes = self.pool_shapes(ways, pages)
        if self._mesh.devices.flat[0].platform != "cpu":
            return {name: jnp.zeros(a.shape, a.dtype, device=a.sharding) for name, a in shapes.items()}
        # Memory of a CPU is taken when a page is first written.
        return {name: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding) for name, a in shapes.items()}

    def pool_shapes(self, ways: int, pages: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the arrays of `new_pool` as shapes with their places."""
        c = self._config
        shape = (ways, c.n_layers, pages, PAGE, c.n_kv_heads, c.head_dim)
        as_bits = self._dtype == jnp.bfloat16 and self._mesh.devices.flat[0].platform == "cpu"
        struct = jax.ShapeDtypeStruct(shape, np.uint16 if as_bits else self._dtype, sharding=self._pool_sharding(shape))
        return dict.fromkeys("kv", struct)

    def _pool_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return sharding_for(("rows", None, None, None, "kv_heads", None), shape, self._mesh, "key/value cache")

    def _on_devices(self, body: Callable[..., tuple[Pool, Batch]]) -> Callable[..., tuple[Pool, Batch]]:
        """Return a program of whole arrays from `body`, which each device runs over its own part of them."""

        def run(params: Params, loras: tuple[Weights, ...], pool: Pool, batch: Batch) -> tuple[Pool, Batch]:
            if self._mesh.size == 1:
                return body(params, loras, pool, batch)
            rows = PartitionSpec(("data", "fsdp"))
            pools = jax.tree.map(lambda a: self._pool_sharding(a.shape).spec, pool)
            batches = {name: PartitionSpec() if name in ("wanted", "steps") else rows for name in batch}
            specs = self._specs, tuple(map(self._lora_specs, loras)), pools, batches
            return self._shards.run(body, specs, (pools, rows))(params, loras, pool, batch)

        run.__name__ = body.__name__
        return run

    def _lora_specs(self, lora: Weights) -> Any:
        """Return how a device has an adapter: its own heads and hidden widths, all else whole."""
        whole = lora_arrays(self._config, LoraSpec(rank=1, seed=0))

        def spec(axes: tuple[str | None, ...], array: jax.Array) -> PartitionSpec:
            own = [None if axis == "embed" else axis for axis in axes]
            return sharding_for(own, array.shape, self._mesh).spec

        layers = {
            name: {part: spec(whole["layers"][name][part].axes, array) for part, array in pair.items()}
            for name, pair in lora["layers"].items()
        }
        unembed = {part: spec(whole["unembed"][part].axes, array) for part, array in lora["unembed"].items()}
        return {"layers": layers, "unembed": unembed}

    def page_bytes(self) -> int:
        """Return the bytes of one page, all layers together, on all devices that share it."""
        return page_bytes(self._config, self._dtype)

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
        batch = {name: array if name == "wanted" else array[0] for name, array in batch.items()}
        t, S = batch["tokens"].shape
        start_t1 = batch["start"][:, None]
        position_tS = jnp.where(start_t1 < 0, -1, start_t1 + jnp.arange(S))
        c = context(
            jnp.maximum(position_tS, 0),
            self._config,
            self._dtype,
            self._attention,
            work=jnp.any(start_t1 >= 0),
            accelerator=self._accelerator,
        )
        scale_MV = jnp.repeat(batch["scale"], S, axis=0)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, k_N: jax.Array, v_N: jax.Array, first: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            k_N, v_N = write_pages(k_N, v_N, k, v, first + batch["page"])
            return paged_attention(q, k_N, v_N, first + batch["table"], position_tS, self._dtype), k_N, v_N

        x_tSD = self._shards.rows_of(params["embed_VD"], self._specs["embed_VD"], batch["tokens"])
        x_tSD, pool = self._through_layers(x_tSD, pool, self._layers(params, loras), scale_MV, c, attend)
        h_ND = rms_norm(x_tSD, params["final_norm_D"], self._config.norm_eps).reshape(t * S, -1)
        scores = self._scores(params, loras, h_ND, scale_MV, batch)
        return pool, jax.tree.map(lambda a: a[None], scores)

    @jax.named_scope("scores")
    def _scores(
        self, params: Params, loras: tuple[Weights, ...], h_ND: jax.Array, scale_NV: jax.Array, batch: Batch
    ) -> Batch:
        fields = {"h": h_ND, "scale": scale_NV}
        fields |= {name: batch[name] for name in ("targets", "key", "temperature", "top_k", "top_p")}
        chunks = {name: a.reshape(len(h_ND) // SCORE_CHUNK, SCORE_CHUNK, *a.shape[1:]) for name, a in fields.items()}
        top_tokens = min(MAX_TOPK_PROMPT, self._config.vocab_size)
        empty = {
            "logprobs": jnp.zeros((SCORE_CHUNK, MAX_TARGETS)),
            "top_ids": jnp.zeros((SCORE_CHUNK, top_tokens), jnp.int32),
            "top_logprobs": jnp.zeros((SCORE_CHUNK, top_tokens)),
            "alternatives": jnp.zeros((SCORE_CHUNK, MAX_ALTERNATIVES), jnp.int32),
            "alternative_logprobs": jnp.zeros((SCORE_CHUNK, MAX_ALTERNATIVES)),
        }

        def chunk(args: tuple[Batch, jax.Array]) -> Batch:
            x, (score, top, draws) = args

            def of_rows(logits_RV: jax.Array, x: Batch) -> Batch:
                logprobs_RV = jax.nn.log_softmax(logits_RV)
                out = {"logprobs": jnp.take_along_axis(logprobs_RV, x["targets"], axis=1)}
                out["top_ids"], out["top_logprobs"] = _top(logprobs_RV, top_tokens, top > 0)
                settings = [x[name] for name in ("temperature", "top_k", "top_p")]
                rows = len(logits_RV)

                def draw(j: jax.Array, ids: jax.Array) -> jax.Array:
                    return ids.at[:, j].set(draw_tokens(logits_RV, x["key"], jnp.full(rows, j), *settings))

                ids = jax.lax.fori_loop(0, draws, draw, jnp.zeros((rows, MAX_ALTERNATIVES), jnp.int32))
                return out | {
                    "alternatives": ids,
                    "alternative_logprobs": jnp.take_along_axis(logprobs_RV, ids, axis=1),
                }

            def scored() -> Batch:
                settings = dict(x)
                logits_RV = self._logits(params, loras, settings.pop("h"), settings.pop("scale"))
                return self._shards.by_row(of_rows, logits_RV, settings, split=self._split_vocabulary)

            return jax.lax.cond(score > 0, scored, lambda: empty)

        out = jax.lax.map(chunk, (chunks, batch["wanted"]))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

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
        pool = self._copy_pages(pool, batch["copy"][0])
        # Before the loop, as it is the same at every step.
        layers = self._layers(params, loras)
        flat = {name: batch[name][0] for name in sorted(batch.keys() - {"copy", "steps"})}
        any_top, R = jnp.any(flat["top"]), len(flat["token"])
        likeliest = min(MAX_TOPK_SAMPLE, self._config.vocab_size)

        def goes_on(i: jax.Array, done_R: jax.Array) -> jax.Array:
            return self._shards.any_way((i < batch["steps"]) & ~jnp.all(done_R))

        def draw(logits_RV: jax.Array, s: Batch) -> Batch:
            token_R = draw_tokens(logits_RV, s["key"], s["count"], s["temperature"], s["top_k"], s["top_p"])
            lse_R = jax.nn.logsumexp(logits_RV, axis=-1)
            logprob_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0] - lse_R
            ids_Rk, logprobs_Rk = _top(logits_RV - lse_R[:, None], likeliest, any_top)
            return {"tokens": token_R, "logprobs": logprob_R, "top_ids": ids_Rk, "top_logprobs": logprobs_Rk}

        def step(carry: Carry) -> Carry:
            _, i, pool, row, drawn = carry
            position_R, any_row = row["position"], ~jnp.all(row["done"])
            more: Any = {"work": any_row, "accelerator": self._accelerator}
            c = context(position_R[:, None], self._config, self._dtype, self._attention, **more)

            def attend(
                q: jax.Array, k: jax.Array, v: jax.Array, k_N: jax.Array, v_N: jax.Array, first: jax.Array
            ) -> tuple[jax.Array, jax.Array, jax.Array]:
                table = first + flat["table"]
                page = jnp.take_along_axis(table, (position_R // PAGE)[:, None], axis=1)[:, 0]
                k_N, v_N = write_tokens(k_N, v_N, k[:, 0], v[:, 0], page, position_R % PAGE)
                return paged_attention(q, k_N, v_N, table, position_R[:, None], self._dtype), k_N, v_N

            x_R1D = self._shards.rows_of(params["embed_VD"], self._specs["embed_VD"], row["token"][:, None])
            x_R1D, pool = self._through_layers(x_R1D, pool, layers, flat["scale"], c, attend)
            h_RD = rms_norm(x_R1D, params["final_norm_D"], self._config.norm_eps)[:, 0]
            logits_RV = self._logits(params, loras, h_RD, flat["scale"])
            settings = {name: flat[name] for name in ("key", "temperature", "top_k", "top_p")}
            settings["count"] = row["count"]
            new = self._shards.by_row(draw, logits_RV, settings, split=self._split_vocabulary)
            row = _advance(new["tokens"], row, flat)
            drawn = {name: jax.lax.dynamic_update_index_in_dim(drawn[name], new[name], i, 1) for name in drawn}
            return goes_on(i + 1, row["done"]), i + 1, pool, row, drawn

        drawn = {
            "tokens": jnp.zeros((R, BLOCK_STEPS), jnp.int32),
            "logprobs": jnp.zeros((R, BLOCK_STEPS)),
            "top_ids": jnp.zeros((R, BLOCK_STEPS, likeliest), jnp.int32),
            "top_logprobs": jnp.zeros((R, BLOCK_STEPS, likeliest)),
        }
        row = {name: flat[name] for name in ("token", "position", "count", "done")} | {"stopped": jnp.zeros(R, bool)}
        start = goes_on(jnp.int32(0), row["done"]), jnp.int32(0), pool, row, drawn
        _, _, pool, row, drawn = jax.lax.while_loop(lambda carry: carry[0], step, start)
        out = drawn | {"new": row["count"] - flat["count"], "stopped": row["stopped"], "done": row["done"]}
        return pool, jax.tree.map(lambda a: a[None], out)

    def _layers(self, params: Params, loras: tuple[Weights, ...]) -> Any:
        """Return the layers' weights and their pairs of all adapters: stacks of them, or a list on one CPU."""
        layers = params["layers"]
        if isinstance(layers, list):
            each = [mixed_pairs([_cut(lora["layers"], i) for lora in loras], self._dtype) for i in range(len(layers))]
            return list(zip(from_bits(layers), each, strict=True))
        pairs = (
            jax.vmap(lambda *adapters: mixed_pairs(adapters, self._dtype))(*(lora["layers"] for lora in loras))
            if loras
            else {}
        )
        return layers, pairs

    def _through_layers(
        self, x_BTD: jax.Array, pool: Pool, layers: Any, scale_MV: jax.Array, c: Context, attend: Attend
    ) -> tuple[jax.Array, Pool]:
        """Return the residual stream after all layers, and the pool with what they have stored.

        Stacks of layers are scanned, so that none of them exists twice. A list is unrolled; the layer is traced once
        for all of it: tracing, which one thread does, took as long as a third of XLA's work.
        """
        P, K = pool["k"].shape[2], pool["k"].shape[4]
        pages = lambda a: a.reshape(-1, PAGE, K, a.shape[-1])  # noqa: E731

        @jax.jit
        def layer(
            x_BTD: jax.Array, w: Params, pairs: dict[str, Pair], k_N: jax.Array, v_N: jax.Array, i: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            def attention(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                q, k, v = qkv
                o, k_P, v_P = attend(q, k.astype(self._dtype), v.astype(self._dtype), k_N, v_N, i * P)
                return o, (k_P, v_P)

            linears = MixedLinears(pairs, scale_MV, self._dtype, self._shards.total, accelerator=self._accelerator)
            y_BTD, _, (new_k_N, new_v_N) = layer_forward(x_BTD, w, linears, c, attention)
            return y_BTD, new_k_N, new_v_N

        carry = x_BTD, pages(pool["k"]), pages(pool["v"])
        if isinstance(layers, list):
            for i, (w, pairs) in enumerate(layers):
                with jax.named_scope(f"layer_{i}"):
                    carry = layer(carry[0], w, pairs, carry[1], carry[2], jnp.int32(i))
        else:
            specs = self._specs["layers"]

            def one(carry: Any, xs: Any) -> tuple[Any, None]:
                i, w, pairs = xs
                w = {name: self._shards.whole(a, PartitionSpec(*specs[name][1:])) for name, a in w.items()}
                with jax.named_scope("layer"):
                    return layer(carry[0], from_bits(w), pairs, carry[1], carry[2], i), None

            stacks = jnp.arange(self._config.n_layers, dtype=jnp.int32), *layers
            carry, _ = jax.lax.scan(one, carry, stacks)
        x_BTD, k_N, v_N = carry
        return x_BTD, {"k": k_N.reshape(pool["k"].shape), "v": v_N.reshape(pool["v"].shape)}

    @jax.named_scope("copy_pages")
    def _copy_pages(self, pool: Pool, copy_R2: jax.Array) -> Pool:
        """Return the pool with pages copied, in the decode program because it has the pool anyway."""
        each = lambda a: a.at[0, :, copy_R2[:, 1]].set(a[0, :, copy_R2[:, 0]])  # noqa: E731
        return jax.lax.cond(jnp.any(copy_R2 > 0), lambda p: jax.tree.map(each, p), lambda p: p, pool)

    @jax.named_scope("head")
    def _logits(self, params: Params, loras: tuple[Weights, ...], h_ND: jax.Array, scale_NV: jax.Array) -> jax.Array:
        """Return float32 logits (N, vocabulary)."""
        table_VD = output_head_VD(params)
        D = h_ND.shape[1]
        if table_VD.shape[1] == D:
            logits_NV = contract("ND,VD->NV", h_ND, from_bits(table_VD), self._dtype)
        else:
            logits_NV = self._gathered_logits(table_VD, h_ND)
        for i, lora in enumerate(loras):
            if unembed := lora["unembed"]:
                u_NR = contract("ND,RD->NR", h_ND, unembed["A"], self._dtype) * scale_NV[:, i, None]
                logits_NV += contract("NR,RV->NV", u_NR, unembed["B"], self._dtype)
        return logits_NV

    def _gathered_logits(self, table_VD: jax.Array, h_ND: jax.Array) -> jax.Array:
        """Return the base model's logits where the ways have a part of the table's width each, a block at a time."""
        V = len(table_VD)
        size = min(HEAD_BLOCK, V)

        def block(i: jax.Array, logits_NV: jax.Array) -> jax.Array:
            start = jnp.minimum(i * size, V - size)  # the last one computes some again
            part_VD = self._shards.whole(jax.lax.dynamic_slice_in_dim(table_VD, start, size), self._head_spec)
            part_NV = contract("ND,VD->NV", h_ND, from_bits(part_VD), self._dtype)
            return jax.lax.dynamic_update_slice_in_dim(logits_NV, part_NV, start, axis=1)

        return jax.lax.fori_loop(0, -(-V // size), block, jnp.zeros((len(h_ND), V)))


def sampling_params(params: Params) -> Params:
    """Return the parameters with each layer's in arrays of their own where that costs no memory: on one CPU.

    There the arrays are views of the stored ones, in bfloat16 instead of its bits where a matmul takes them. A program
    that was given the stacks, or the bits, would copy all weights once per block of steps: 9 ms of a step of 61, and 90
    ms of a block.
    """
    leaves = jax.tree.leaves(params)
    devices = leaves[0].sharding.device_set
    device = next(iter(devices))
    if device.platform != "cpu" or len(devices) > 1:
        return params
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
    return jax.tree.map(lambda a: a[layer], stacks)


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
def _advance(token_R: jax.Array, row: Batch, settings: Batch) -> Batch:
    """Return the rows' state after the tokens that were drawn; finished rows stay as they are."""
    live_R = ~row["done"]
    count_R = row["count"] + live_R
    stopped_R = live_R & jnp.any(settings["stop_ids"] == token_R[:, None], axis=-1)
    return {
        "token": jnp.where(live_R, token_R, row["token"]),
        "position": row["position"] + live_R,
        "count": count_R,
        "stopped": row["stopped"] | stopped_R,
        "done": row["done"] | stopped_R | (count_R >= settings["max_tokens"]),
    }
