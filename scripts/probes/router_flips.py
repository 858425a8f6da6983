"""How often do trainer and sampler send a token to other experts, and what does that do to its logprob?

Random prompts are continued by decoding, one at a time; the sequences are scored by prefill, and trained on, packed and
each in a call of its own, all with one adapter, on a random mixture of experts in the layout of Qwen3-MoE. Of each pass
every router's choices go to the host: `moe.route` is wrapped, and an `io_callback` sends what enters the router, the
choices, and which tokens these are. A callback names its layer and its tokens, so it needs no order, and programs may
run side by side. With `--check` all passes run without callbacks, too, and are compared bit for bit.

    python scripts/probes/router_flips.py
    python scripts/probes/router_flips.py --router 0.5 --dtypes bfloat16 --json flips.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import io_callback
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_rows import machine
from jax_client.config import EngineConfig
from jax_client.engine.core.requests import GenerationRequest, LossSpec
from jax_client.engine.engine import Engine
from jax_client.engine.sample.device import programs as sample_programs
from jax_client.engine.train import programs as train_programs
from jax_client.models.families.registry import config_from_hf
from jax_client.models.lora_arrays import flatten, lora_arrays
from jax_client.models.parts.mixture import moe
from jax_client.values import AdapterState, LoraSpec, TrainExample
from jax_client.weights.read.names import expected_tensors
from jax_client.weights.read.source import resolve

CROSS_ENTROPY = LossSpec(name="cross_entropy")
DECODE, PREFILL, PACKED, ALONE = "decode", "prefill", "trainer, packed", "trainer, alone"
PAIRS = ((PACKED, DECODE), (PACKED, PREFILL), (PREFILL, DECODE), (PACKED, ALONE))
HEAD_WIDTH, LORA_RANK = 32, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The model, and what it is asked.

    Attributes:
        layers, width, experts, each, hidden, vocabulary: L, D, E, k, F and V of the model.
        router: standard deviation of a router's logits, for a normed token.
        sequences, shortest, longest: how many there are, and of how many tokens.
        prompt: tokens of each that are not sampled.
        seed: of weights, adapter and prompts.
    """

    layers: int = 8
    width: int = 256
    experts: int = 64
    each: int = 8
    hidden: int = 128
    vocabulary: int = 512
    router: float = 1.0
    sequences: int = 8
    shortest: int = 256
    longest: int = 512
    prompt: int = 32
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """Return the model's config.json."""
        heads = self.width // HEAD_WIDTH
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "moe_intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "head_dim": HEAD_WIDTH,
            "num_experts": self.experts,
            "num_experts_per_tok": self.each,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2 * self.longest,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one router has done in one run of a program.

    Attributes:
        key: the router's first weight, which no other router has.
        what_BT: the tokens of packed rows, the positions of tiles and rows to decode.
        segments_BT: of packed rows; else the positions once more.
        h_MD, choice_Mk: what the router got, and the experts.
    """

    key: float
    what_BT: np.ndarray
    segments_BT: np.ndarray
    h_MD: np.ndarray
    choice_Mk: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """A way to compute the sequences. Lists have an entry for each.

    Attributes:
        logprobs: (T,) of the tokens after the first; NaN where the pass gives none.
        choices: what it met in the routers.
    """

    logprobs: list[np.ndarray]
    choices: list[Choices]


def write_model(directory: Path, sizes: Sizes) -> np.ndarray:
    """Write a random model whose layers all matter; return its routers (L, D, E)."""
    rng, config, tensors = np.random.default_rng(sizes.seed), sizes.config(), {}
    for name, shape in sorted(expected_tensors(config_from_hf(config, str(directory))).items()):
        scale = shape[-1] ** -0.5
        if name.endswith("mlp.gate.weight"):
            scale *= sizes.router
        elif name.startswith("lm_head"):
            scale *= 2  # so that some tokens are much likelier than others
        elif name.endswith("embed_tokens.weight"):
            scale = 1.0
        random = rng.normal(0, scale, shape).astype(np.float32)
        tensors[name] = np.ones(shape, np.float32) if "norm" in name else random
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return np.stack([tensors[f"model.layers.{i}.mlp.gate.weight"].T for i in range(sizes.layers)])


def adapter(engine: Engine, sizes: Sizes) -> AdapterState:
    """Return an adapter without zeros; it adds about a quarter of what the base model's matrices give."""
    rng, spec = np.random.default_rng(sizes.seed + 1), LoraSpec(rank=LORA_RANK, seed=0)
    weights = {
        name: rng.normal(0, array.fan_in**-0.5 if array.fan_in else 0.03, array.shape).astype(np.float32)
        for name, array in flatten(lora_arrays(engine.model, spec)).items()
    }
    return AdapterState(spec=spec, step=0, weights=weights)


@contextlib.contextmanager
def recorder() -> Iterator[list[Seen]]:
    """Collect what the routers do in programs that are compiled in the body."""
    seen: list[Seen] = []
    tracing = threading.local()  # which tokens the layers are traced for; programs are compiled on several threads
    route, context, forward_pass = moe.route, sample_programs.context, train_programs.forward_pass

    def note(key: Any, what_BT: Any, segments_BT: Any, h_MD: Any, choice_Mk: Any) -> None:
        arrays = [np.array(a) for a in (what_BT, segments_BT, h_MD, choice_Mk)]
        names = ("what_BT", "segments_BT", "h_MD", "choice_Mk")
        seen.append(Seen(key=float(key), **dict(zip(names, arrays, strict=True))))

    def marked_context(positions_BT: jax.Array, *args: Any, **more: Any) -> Any:
        tracing.tokens = positions_BT, positions_BT
        return context(positions_BT, *args, **more)

    def marked_pass(params: Any, lora: Any, tokens_BT: jax.Array, segments_BT: jax.Array, *args: Any) -> Any:
        tracing.tokens = tokens_BT, segments_BT
        return forward_pass(params, lora, tokens_BT, segments_BT, *args)

    def noted_route(h_MD: jax.Array, router_DE: jax.Array, k: int, **options: Any) -> Any:
        choice_Mk, weight_Mk = route(h_MD, router_DE, k, **options)
        io_callback(note, None, router_DE[0, 0], *tracing.tokens, h_MD, choice_Mk)
        return choice_Mk, weight_Mk

    with (
        mock.patch.object(moe, "route", noted_route),
        mock.patch.object(sample_programs, "context", marked_context),
        mock.patch.object(train_programs, "forward_pass", marked_pass),
    ):
        yield seen


class Choices:
    """What one sequence met in the routers.

    Attributes:
        h_LTD, choice_LTk: what they got, and the experts; -1 where nothing was recorded.

    Args:
        routers_LDE: of the model.
        length: tokens of the sequence that were computed.
        each: k.
    """

    def __init__(self, routers_LDE: np.ndarray, length: int, each: int):
        L, D, _ = routers_LDE.shape
        self._layers = {float(key): i for i, key in enumerate(routers_LDE[:, 0, 0])}
        self.h_LTD = np.full((L, length, D), np.nan, np.float32)
        self.choice_LTk = np.full((L, length, each), -1, np.int32)

    def put(self, seen: Seen, m: np.ndarray, positions: np.ndarray) -> None:
        """Take rows m of what a router has done for these positions."""
        layer = self._layers[seen.key]
        if (self.choice_LTk[layer, positions] >= 0).any():
            raise RuntimeError(f"layer {layer} was seen twice at some of the positions {positions.tolist()}")
        self.h_LTD[layer, positions], self.choice_LTk[layer, positions] = seen.h_MD[m], seen.choice_Mk[m]

    def put_positions(self, seen: Seen, prompt: int) -> None:
        """Take what a sampling program that had this sequence alone has done; a tile may be longer than the prompt."""
        width = seen.what_BT.shape[1]
        for b, positions_T in enumerate(seen.what_BT):
            if b > 0 and positions_T[0] == 0:  # no tile, and no row
                continue
            (t,) = np.nonzero(positions_T < (self.choice_LTk.shape[1] if width == 1 else prompt - 1))
            self.put(seen, b * width + t, positions_T[t])


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What the routers have done.

    Attributes:
        routers_LDE: of the model.
        each: k.
        seen: in any order; stays empty where the programs have no callbacks.
    """

    routers_LDE: np.ndarray
    each: int
    seen: list[Seen]

    def choices_of(self, length: int) -> Choices:
        """Return the place for what a sequence of this many computed tokens meets."""
        return Choices(self.routers_LDE, length, self.each)


def sample(
    engine: Engine, asked: Sequence[GenerationRequest], state: AdapterState, record: Record
) -> tuple[Pass, list[np.ndarray]]:
    """Ask one request after the other; return also each prompt with what was drawn after it."""
    # A version of its own for each pass: no page of another pass is found.
    lane, logprobs, choices, sequences = engine.open_lane(), [], [], []
    snapshot = engine.snapshot(lane, engine.open_adapter(lane, state).result()).result()
    for request in asked:
        answer, prompt_T = engine.generate(snapshot, request).result(), request.tokens_T
        jax.effects_barrier()
        if answer.prompt_logprobs_T is not None:
            logprobs.append(answer.prompt_logprobs_T[1:])
            sequences.append(prompt_T)
        else:
            (row,) = answer.rows
            logprobs.append(np.concatenate([np.full(len(prompt_T) - 1, np.nan, np.float32), row.logprobs]))
            sequences.append(np.concatenate([prompt_T, row.tokens]).astype(np.int32))
        choices.append(record.choices_of(len(logprobs[-1])))
        for each in record.seen:
            choices[-1].put_positions(each, len(prompt_T))
        record.seen.clear()
    return Pass(logprobs=logprobs, choices=choices), sequences


def train(engine: Engine, calls: Sequence[list[np.ndarray]], state: AdapterState, record: Record) -> Pass:
    """Call `forward_backward` with the sequences of each call."""
    lane, logprobs, choices = engine.open_lane(), [], {}
    handle = engine.open_adapter(lane, state).result()
    for sequences in calls:
        ones = [np.ones(len(s) - 1, np.float32) for s in sequences]
        examples = [
            TrainExample(tokens_T=s[:-1], targets=s[1:], inputs={"weights": weights})
            for s, weights in zip(sequences, ones, strict=True)
        ]
        logprobs += engine.train_batch(lane, handle, examples, CROSS_ENTROPY).result().logprobs
        choices |= {s[:-1].tobytes(): record.choices_of(len(s) - 1) for s in sequences}
    jax.effects_barrier()
    for each in record.seen:
        tokens_M, segments_M = each.what_BT.ravel(), each.segments_BT.ravel()
        for segment in range(1, segments_M.max() + 1):
            (m,) = np.nonzero(segments_M == segment)
            choices[tokens_M[m].tobytes()].put(each, m, np.arange(len(m)))
    record.seen.clear()
    return Pass(logprobs=logprobs, choices=list(choices.values()))


def run(engine: Engine, sizes: Sizes, record: Record) -> dict[str, Pass]:
    """Sample the sequences, then compute them in every other way."""
    rng, state = np.random.default_rng(sizes.seed + 2), adapter(engine, sizes)
    prompts = [rng.integers(0, sizes.vocabulary, sizes.prompt).astype(np.int32) for _ in range(sizes.sequences)]
    lengths = np.linspace(sizes.shortest, sizes.longest, sizes.sequences).astype(int)
    more = [int(length) + 1 - sizes.prompt for length in lengths]
    asked = [GenerationRequest(tokens_T=p, max_tokens=n, seed=3) for p, n in zip(prompts, more, strict=True)]
    decoded, sequences = sample(engine, asked, state, record)
    scored = [GenerationRequest(tokens_T=s, num_samples=0, prompt_logprobs=True) for s in sequences]
    return {
        DECODE: decoded,
        PREFILL: sample(engine, scored, state, record)[0],
        PACKED: train(engine, [sequences], state, record),
        ALONE: train(engine, [[s] for s in sequences], state, record),
    }


def peakedness(found: Pass, routers_LDE: np.ndarray, sizes: Sizes) -> tuple[dict[str, float], list[np.ndarray]]:
    """Say how peaked the routers are; return also, of each sequence, the gap (L, T) between those chosen and others."""
    k, gaps, largest, together = sizes.each, [], [], []
    for choices in found.choices:
        logits_LTE = np.einsum("LTD,LDE->LTE", choices.h_LTD.astype(np.float64), routers_LDE)
        probability_LTE = np.exp(logits_LTE - logits_LTE.max(-1, keepdims=True))
        probability_LTE = -np.sort(-probability_LTE / probability_LTE.sum(-1, keepdims=True))
        gaps.append(probability_LTE[..., k - 1] - probability_LTE[..., k])
        largest.append(probability_LTE[..., 0].ravel())
        together.append(probability_LTE[..., :k].sum(-1).ravel())
    every = np.concatenate([gap.ravel() for gap in gaps])
    words = {
        "median largest probability": np.median(np.concatenate(largest)),
        "median sum of those chosen": np.median(np.concatenate(together)),
        "median gap of the last chosen and the first other": np.median(every),
        "smallest gap": every.min(),
    }
    return {name: float(value) for name, value in words.items()}, gaps


def compare(a: Pass, b: Pass, gaps: list[np.ndarray], from_position: int) -> dict[str, float]:
    """Return how often two passes choose other sets of experts, and how far their logprobs are apart."""
    differs, gap, nats = [], [], []
    for of_a, of_b, gap_LT, a_T, b_T in zip(a.choices, b.choices, gaps, a.logprobs, b.logprobs, strict=True):
        chosen = [of_a.choice_LTk[:, from_position:], of_b.choice_LTk[:, from_position:]]
        if min(each.min() for each in chosen) < 0:
            raise RuntimeError("the choices of some layer and token were not recorded")
        unequal_LT = np.any(np.sort(chosen[0]) != np.sort(chosen[1]), axis=-1)
        differs.append(unequal_LT)
        gap.append(gap_LT[:, from_position:])
        nats.append(np.abs(a_T - b_T)[from_position:])
    differs_LM, gap_LM, nats_M = np.concatenate(differs, 1), np.concatenate(gap, 1), np.concatenate(nats)
    any_M = differs_LM.any(0)
    mean = lambda values: float(values.mean()) if len(values) else 0.0  # noqa: E731
    return {
        "tokens": len(nats_M),
        "share of token and layer": float(differs_LM.mean()),
        "share of tokens": float(any_M.mean()),
        "share in the first layer": float(differs_LM[0].mean()),
        "share in the last layer": float(differs_LM[-1].mean()),
        "largest gap that flipped": float(gap_LM[differs_LM].max()) if differs_LM.any() else 0.0,
        "mean nats": mean(nats_M),
        "max nats": float(nats_M.max()),
        "mean nats where some layer differs": mean(nats_M[any_M]),
        "mean nats where none does": mean(nats_M[~any_M]),
    }


def measure(directory: Path, sizes: Sizes, dtype: Any, *, check: bool = False) -> dict[str, Any]:
    """Return the figures of one type.

    Args:
        directory: a new one, for the model.
        sizes: of model and data.
        dtype: of the engine.
        check: run all passes without the callbacks, too.
    """
    routers_LDE = write_model(directory, sizes)

    def passes(seen: list[Seen]) -> dict[str, Pass]:
        settings = EngineConfig(dtype=dtype, compilation_cache_dir="", precompile=False)
        engine = Engine(resolve(str(directory)), settings)
        try:
            return run(engine, sizes, Record(routers_LDE=routers_LDE, each=sizes.each, seen=seen))
        finally:
            engine.close()

    with recorder() as seen:
        found = passes(seen)
    peaked, gaps = peakedness(found[PACKED], routers_LDE, sizes)
    first = {pair: sizes.prompt - 1 if DECODE in pair else 0 for pair in PAIRS}
    out = {"routers": peaked}
    out["pairs"] = {" / ".join(p): compare(found[p[0]], found[p[1]], gaps, first[p]) for p in PAIRS}
    if check:
        equal = lambda a, b: all(np.array_equal(*each, equal_nan=True) for each in zip(a, b, strict=True))  # noqa: E731
        plain = passes([])
        out["equal without callbacks"] = {
            name: equal(own.logprobs, plain[name].logprobs) for name, own in found.items()
        }
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--check", action="store_true", help="run everything without the callbacks, too")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = vars(parser.parse_args())
    dtypes, path, check = args.pop("dtypes"), args.pop("json"), args.pop("check")
    sizes = Sizes(**args)
    found: dict[str, Any] = {"machine": machine(), "device": str(jax.devices()[0]), "sizes": asdict(sizes)}
    print(json.dumps(found), flush=True)
    with tempfile.TemporaryDirectory(prefix="flips-") as folder:
        for dtype in dtypes:
            found[dtype] = measure(Path(folder) / dtype, sizes, dtype, check=check)
            print(dtype, json.dumps({name: value for name, value in found[dtype].items() if name != "pairs"}))
            for pair, line in found[dtype]["pairs"].items():
                print(f"  {pair}: " + ", ".join(f"{name} {value:.3g}" for name, value in line.items()), flush=True)
    if path:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
