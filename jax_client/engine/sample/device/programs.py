"""Which programs sample? Prefill of tiles into the paged cache, and blocks of decode steps.

A tile is one page of one row's tokens, at a fixed place of the row; a prefill takes tiles of any rows, so that two
programs serve every mix of prompts. It stores all of a prompt but its last token and scores it where asked. A decode
step takes each row's newest token, stores its key and value, and draws the next, so the first step is like any other; a
block runs up to `BLOCK_STEPS` steps, as many as it is told, with no host round trip. Of a prompt that is scored and
continued by one token, prefill computes the last token too, and draws from its logits.

In recurrent layers tiles run in order, from what a row's tokens before them left at a place of its own.

Arrays have a leading axis W, the ways that a mesh splits rows: each way has its own pages and its own rows. The
programs are written for one device, which has one way's rows and its own heads of them; `Shards` says what it asks of
the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.paged_check import preferred_attention
from jax_client.engine.core.programs import CompileRecord, Program, shardings_of
from jax_client.engine.core.requests import MAX_ALTERNATIVES, MAX_TARGETS, MAX_TOPK_PROMPT, MAX_TOPK_SAMPLE
from jax_client.engine.sample.batches import SCORE_CHUNK, STATE, RowFields, pack_drawn
from jax_client.engine.sample.device.mixing import Mix, mix_of_step, mix_of_tiles
from jax_client.engine.sample.device.pool import STATES, Pool, PoolShapes, copy_pages
from jax_client.engine.sample.device.shards import Shards
from jax_client.engine.sample.device.token_sampling import draw_tokens, make_keys
from jax_client.engine.sample.device.weights import WHOLE, Base, partition_specs, whole_specs
from jax_client.models.config import ModelConfig
from jax_client.models.decoder import Params, output_head_VD, param_specs
from jax_client.models.kernels.cache import PagedAttention
from jax_client.models.layers import contract, from_bits, rms_norm
from jax_client.models.lora_arrays import lora_arrays
from jax_client.models.parts.attention import Attention
from jax_client.models.parts.block import layer_forward
from jax_client.models.parts.kind import Context
from jax_client.models.parts.linears import MixedLinears
from jax_client.models.plan import Layer
from jax_client.models.transformer import context, scaled
from jax_client.sharding import ROWS, sharding_for
from jax_client.values import LoraSpec

BLOCK_STEPS = 32
# Else XLA joins the output table and the adapter's A to one array, a second table, since both are multiplied by h.
_GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": "0"}
HEAD_BLOCK = 16_384  # tokens of the vocabulary whose weights exist at once, where the ways gather them
Batch = dict[str, jax.Array]
# Whether any way goes on, the number of the step, the pool, the rows' state, and what the block has drawn.
Carry = tuple[jax.Array, jax.Array, Pool, Batch, Batch]


class SamplePrograms:
    """The compiled sampling programs of one model on one mesh.

    Both programs take the pool's memory over. `loras` are the adapters of a batch, all of one configuration; `scale`
    has alpha / rank in the column of a row's own, and zeros for the base model.

    Args:
        attention: of training, which the layers know of.
        log: of compiles.
        paged: the attention over the cache; None for what the platform prefers, unchecked.

    Attributes:
        pools: makes the pool.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        attention: Attention,
        log: list[CompileRecord],
        paged: PagedAttention | None = None,
    ):
        self.paged = preferred_attention(mesh, config, dtype).attention if paged is None else paged
        self.pools = PoolShapes(config=config, dtype=dtype, mesh=mesh, paged=self.paged)
        self._config = config
        self._dtype = dtype
        self._attention = attention
        self._mesh = mesh
        self._shards = Shards(mesh)
        self._accelerator = mesh.devices.flat[0].platform != "cpu"
        self._context: Any = {"accelerator": self._accelerator, "mesh": mesh if mesh.size > 1 else None}
        self._context["on_device"] = True
        stored, copied = param_specs(config, dtype), whole_specs(config, dtype)
        self._specs, self._whole_specs = partition_specs(stored, mesh), partition_specs(copied, mesh)
        self._split_vocabulary = "tensor" in (Base(config, {}, self._specs).head_spec[0] or ())
        versions = lambda loras: f", {len(loras)} adapters" if len(loras) > 1 else ", 1 adapter" if loras else ""  # noqa: E731
        tiles = lambda _, loras, __, batch: "{}x{} tokens".format(*batch["tokens"].shape[1:]) + versions(loras)  # noqa: E731
        rows = lambda _, loras, __, batch: f"{batch['state'].shape[1]} rows" + versions(loras)  # noqa: E731
        whole = NamedSharding(mesh, PartitionSpec())
        outputs = lambda *args: (shardings_of(args[2]), whole)  # noqa: E731
        with_state = lambda *args: (*outputs(*args), args[3]["state"].sharding)  # noqa: E731
        model = Program.model_text(config, dtype, mesh, self.paged)
        options = _GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else {}
        program = partial(Program, donate=(2,), kind="sample", model=model, options=options)
        self.prefill = program("prefill", self._on_devices(self._prefill), log, outputs, tiles)
        self.decode = program("decode", self._on_devices(self._decode, states=True), log, with_state, rows)

    def _on_devices(self, body: Callable[..., Any], *, states: bool = False) -> Callable[..., Any]:
        """Return a program of whole arrays from `body`, which each device runs over its own part of them.

        `states` says that it returns the rows' state, too.
        """

        def run(params: Params, loras: tuple[Weights, ...], pool: Pool, batch: Batch) -> Any:
            base_specs = self._whole_specs if WHOLE in params else self._specs
            params = params.get(WHOLE, params)
            on_device = lambda params, *others: body(Base(self._config, params, base_specs), *others)  # noqa: E731
            if self._mesh.size == 1:
                return on_device(params, loras, pool, batch)
            rows = PartitionSpec(ROWS)
            pools = {name: self.pools.sharding(name, a.shape).spec for name, a in pool.items()}
            batches = {name: PartitionSpec() if name in ("wanted", "steps") else rows for name in batch}
            specs = base_specs, tuple(map(self._lora_specs, loras)), pools, batches
            outputs = (pools, rows, rows) if states else (pools, rows)
            return self._shards.run(on_device, specs, outputs)(params, loras, pool, batch)

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

    @jax.named_scope("prefill")
    def _prefill(self, base: Base, loras: tuple[Weights, ...], pool: Pool, batch: Batch) -> tuple[Pool, Batch]:
        """Store tiles, and score their positions where asked.

        Args:
            batch: per tile: `tokens` (W, t, S), `start` (W, t) the position of its first token or -1 for no tile,
                `page` (W, t) where it is stored, `table` (W, t, n) the row's pages up to there, `scale` (W, t, V). Of
                recurrent models `count` (W, t), how many of its tokens are the row's, and `places` (W, t, 3), which
                `mix_tiles` takes.
                Per position (N = t x S): `targets` (W, N, `MAX_TARGETS`), and of the tokens to draw `number` (W, N, 4),
                which makes their key, `temperature`, `top_k` and `top_p` (W, N).
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
            **self._context,
        )
        scale_MV = jnp.repeat(batch["scale"], S, axis=0)

        x_tSD = self._shards.rows_of(base.params["embed_VD"], base.specs["embed_VD"], batch["tokens"])
        layers = base, base.pairs(loras, self._dtype)
        mix = mix_of_tiles(self.paged, batch, position_tS, c)
        x_tSD, pool = self._through_layers(layers, scale_MV, c, mix, scaled(x_tSD, c), pool)
        h_ND = rms_norm(x_tSD, base.params["final_norm_D"], self._config.norm_eps).reshape(t * S, -1)
        scores = self._scores(base, loras, h_ND, scale_MV, batch)
        return pool, jax.tree.map(lambda a: a[None], scores)

    @jax.named_scope("scores")
    def _scores(
        self, base: Base, loras: tuple[Weights, ...], h_ND: jax.Array, scale_NV: jax.Array, batch: Batch
    ) -> Batch:
        fields = {"h": h_ND, "scale": scale_NV}
        fields |= {name: batch[name] for name in ("targets", "temperature", "top_k", "top_p")}
        fields["key"] = make_keys(batch["number"])
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
                logits_RV = self._logits(base, loras, settings.pop("h"), settings.pop("scale"))
                return self._shards.by_row(of_rows, logits_RV, settings, split=self._split_vocabulary)

            return jax.lax.cond(score > 0, scored, lambda: empty)

        out = jax.lax.map(chunk, (chunks, batch["wanted"]))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

    @jax.named_scope("decode")
    def _decode(
        self, base: Base, loras: tuple[Weights, ...], pool: Pool, batch: Batch
    ) -> tuple[Pool, Batch, jax.Array]:
        """Run one block of steps.

        Args:
            batch: `settings` (W, R, F) int32, what `RowFields` says of each row; `state` (W, R, 6) int32, `STATE` of
                each row, whose "done" is 1 for one without work. And of the block: `steps`, int32, the most that it
                runs.

        Returns:
            The pool; what the block drew per row: `drawn`, which `unpack_drawn` reads, `top_ids` and `top_logprobs`
            (W, R, `BLOCK_STEPS`, k); and the state, from which the next block can continue before that is looked at.
        """
        table_width = batch["settings"].shape[-1] - RowFields(0, len(loras)).width
        flat = RowFields(table_width, len(loras)).unpacked(batch["settings"][0])
        flat |= {name: batch["state"][0, :, i] for i, name in enumerate(STATE)}
        flat["done"] = (flat["done"] > 0) | (flat["count"] >= flat["max_tokens"])
        copy_R2 = jnp.stack([flat.pop("copy_from"), flat.pop("copy_to")], axis=-1)
        pool = copy_pages(pool, copy_R2, accelerator=self._accelerator)
        # Before the loop, as it is the same at every step.
        layers = base, base.pairs(loras, self._dtype)
        any_top, R = jnp.any(flat["top"]), len(flat["token"])
        likeliest = min(MAX_TOPK_SAMPLE, self._config.vocab_size)

        def goes_on(i: jax.Array, done_R: jax.Array) -> jax.Array:
            return self._shards.any_way((i < batch["steps"]) & ~jnp.all(done_R), base.split_by_way)

        def draw(logits_RV: jax.Array, s: Batch) -> Batch:
            token_R = draw_tokens(logits_RV, s["key"], s["count"], s["temperature"], s["top_k"], s["top_p"])
            lse_R = jax.nn.logsumexp(logits_RV, axis=-1)
            logprob_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0] - lse_R
            ids_Rk, logprobs_Rk = _top(logits_RV - lse_R[:, None], likeliest, any_top)
            return {"tokens": token_R, "logprobs": logprob_R, "top_ids": ids_Rk, "top_logprobs": logprobs_Rk}

        def step(carry: Carry) -> Carry:
            _, i, pool, row, drawn = carry
            position_R, any_row = row["position"], ~jnp.all(row["done"])
            more: Any = {"work": any_row, **self._context}
            c = context(position_R[:, None], self._config, self._dtype, self._attention, **more)
            x_R1D = self._shards.rows_of(base.params["embed_VD"], base.specs["embed_VD"], row["token"][:, None])
            mix = mix_of_step(self.paged, flat, row, c)
            x_R1D, pool = self._through_layers(layers, flat["scale"], c, mix, scaled(x_R1D, c), pool)
            h_RD = rms_norm(x_R1D, base.params["final_norm_D"], self._config.norm_eps)[:, 0]
            logits_RV = self._logits(base, loras, h_RD, flat["scale"])
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
        out = {name: drawn[name] for name in ("top_ids", "top_logprobs")}
        out["drawn"] = pack_drawn(drawn, row["count"] - flat["count"], row["stopped"], row["done"])
        nothing_R = jnp.zeros(R, jnp.int32)  # is copied once
        state = [row.get(name, nothing_R).astype(jnp.int32) for name in STATE]
        return pool, jax.tree.map(lambda a: a[None], out), jnp.stack(state, axis=-1)[None]

    def _through_layers(
        self,
        layers: tuple[Base, Any],
        scale_MV: jax.Array,
        c: Context,
        mix: Mix,
        x_BTD: jax.Array,
        pool: Pool,
    ) -> tuple[jax.Array, Pool]:
        """Return the residual stream after all layers, and the pool with what they have stored.

        A layer is traced once for all that are like it. Tracing, which one thread does, took a third as long as XLA's
        work.
        """
        base, pairs_of = layers
        P, N = (next((a.shape[2] for name, a in pool.items() if (name in STATES) == of), 0) for of in (False, True))

        @partial(jax.jit, static_argnums=0)
        def layer(
            this: Layer, x_BTD: jax.Array, ws: Any, pairs: Any, pool: Pool, i: jax.Array
        ) -> tuple[jax.Array, Pool]:
            options: Any = {"accelerator": self._accelerator}
            linears = [MixedLinears(own, scale_MV, self._dtype, self._shards.total, **options) for own in pairs]
            mixing = mix(pool, (i * P, i * N))
            y_BTD, _, changed = layer_forward(x_BTD, this.kinds, ws, linears, c.of_layer(this.options), mixing)
            return y_BTD, pool | changed

        def run(this: Layer, carry: Any, ws: Any, pairs: Any, i: jax.Array) -> tuple[jax.Array, Pool]:
            return layer(this, carry[0], ws, pairs, carry[1], i)

        carry = x_BTD, {name: a.reshape(-1, *a.shape[3:]) for name, a in pool.items()}
        carry = base.each_layer(run, carry, pairs_of, self._shards.whole)
        return carry[0], {name: a.reshape(pool[name].shape) for name, a in carry[1].items()}

    @jax.named_scope("head")
    def _logits(self, base: Base, loras: tuple[Weights, ...], h_ND: jax.Array, scale_NV: jax.Array) -> jax.Array:
        """Return float32 logits (N, vocabulary)."""
        table_VD = output_head_VD(base.params)
        D = h_ND.shape[1]
        if table_VD.shape[1] == D:
            logits_NV = contract("ND,VD->NV", h_ND, from_bits(table_VD), self._dtype)
        else:
            logits_NV = self._gathered_logits(table_VD, base.head_spec, h_ND)
        for i, lora in enumerate(loras):
            if unembed := lora["unembed"]:
                u_NR = contract("ND,RD->NR", h_ND, unembed["A"], self._dtype) * scale_NV[:, i, None]
                logits_NV += contract("NR,RV->NV", u_NR, unembed["B"], self._dtype)
        return logits_NV

    def _gathered_logits(self, table_VD: jax.Array, spec: PartitionSpec, h_ND: jax.Array) -> jax.Array:
        """Return the base model's logits where the ways have a part of the table's width each, a block at a time."""
        V = len(table_VD)
        size = min(HEAD_BLOCK, V)

        def block(i: jax.Array, logits_NV: jax.Array) -> jax.Array:
            start = jnp.minimum(i * size, V - size)  # the last one computes some again
            part_VD = self._shards.whole(jax.lax.dynamic_slice_in_dim(table_VD, start, size), spec)
            part_NV = contract("ND,VD->NV", h_ND, from_bits(part_VD), self._dtype)
            return jax.lax.dynamic_update_slice_in_dim(logits_NV, part_NV, start, axis=1)

        return jax.lax.fori_loop(0, -(-V // size), block, jnp.zeros((len(h_ND), V)))


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
