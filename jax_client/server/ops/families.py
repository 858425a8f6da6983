"""Which values does Prometheus read? Those of engines, runs, keys, and of the writer of metrics, as families."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from jax_client.runs.lifecycle.base_models import BaseModels
from jax_client.runs.results import run_metrics
from jax_client.runs.results.run_metrics import MetricsWriter, RunMetrics
from jax_client.server.ops.prometheus import Family
from jax_client.server.wire.accounts import Account, Quota

if TYPE_CHECKING:
    from jax_client.engine.core.programs import CompileRecord
    from jax_client.engine.protocol import Engine

Labels = Mapping[str, str]

# Engine states that count as up.
_WELL = ("idle", "busy", "compiling")

# The metrics of a run's newest step, each with its family's name and description.
_RUN_GAUGES = {
    "loss:sum": ("run_loss", "Loss of the newest step, summed over its tokens."),
    "tokens:sum": ("run_loss_tokens", "Tokens with a loss of the newest step."),
    "grad_norm:mean": ("run_grad_norm", "Norm of the gradient of the newest step, before clipping."),
    "learning_rate:mean": ("run_learning_rate", "Learning rate of the newest step."),
    "tokens_per_second:mean": ("run_tokens_per_second", "Tokens per second of device time in the newest step."),
    "padding_waste:mean": ("run_padding_waste_ratio", "Share of the computed tokens that were padding."),
    "ratio:mean": ("run_policy_ratio", "Mean of the trainer's probability over the sampler's."),
    "kl_sample_train:mean": ("run_kl_sample_train", "Mean gap of sampler and trainer, as KL divergence in nats."),
}
_RUN_COUNTERS: Mapping[str, tuple[str, Callable[[RunMetrics], float]]] = {
    "run_steps_total": ("Optimizer steps taken.", lambda run: run.totals.steps),
    "run_skipped_steps_total": ("Steps left out for a gradient that was not finite.", lambda run: run.totals.skipped),
    "run_passes_total": ("Calls with a gradient.", lambda run: run.totals.passes),
    "run_loss_tokens_total": ("Tokens with a loss.", lambda run: run.totals.scored_tokens),
    "run_input_tokens_total": ("Tokens of the calls with a gradient.", lambda run: run.totals.input_tokens),
}
# The keys of `usage()["training"]` and `usage()["sampling"]`, each with its family's name and description.
_TRAINING = {
    "tokens": ("engine_train_tokens_total", "Tokens trained on."),
    "computed": ("engine_train_computed_tokens_total", "Tokens computed for training, with padding."),
}
_SAMPLING = {
    "prompt_tokens": ("engine_prompt_tokens_total", "Prompt tokens received."),
    "prompt_tokens_cached": ("engine_prompt_tokens_cached_total", "Prompt tokens found in the prefix cache."),
    "prompt_tokens_computed": ("engine_prompt_tokens_computed_total", "Prompt tokens computed."),
    "sampled_tokens": ("engine_sampled_tokens_total", "Tokens drawn."),
    "decode_blocks": ("engine_decode_blocks_total", "Blocks of decode steps."),
    "decode_rows": ("engine_decode_rows_total", "Samples in those blocks."),
    "decode_slots": ("engine_decode_slots_total", "Slots for samples in those blocks, used or not."),
    "rows_running": ("engine_sample_rows_running", "Samples that are being drawn."),
    "rows_waiting": ("engine_sample_rows", "Samples without an answer yet."),
    "cache_tokens": ("engine_cache_tokens", "Tokens that the key/value cache has room for."),
}


# What a key's clients have sent and got, by the names of `Account.totals`.
_OF_KEYS = {
    "requests": "Requests that were let in.",
    "refused": "Requests that were refused with status 429.",
    "trained_tokens": "Tokens trained on.",
    "samples": "Samples drawn.",
    "sampled_tokens": "Tokens drawn.",
}


def all_families(models: BaseModels, accounts: Mapping[str, Account] = MappingProxyType({})) -> list[Family]:
    """Return the families of the loaded engines, of the live runs, of accounts by name, and of the metrics' writer."""
    named = _named(models)
    runs, keys = _of_runs(run_metrics.live()), _of_keys(accounts, named)
    return [*_of_engines(named), *runs, *keys, *_of_writer(run_metrics.shared)]


def own_families(models: BaseModels, accounts: Mapping[str, Account], is_own: Callable[[str], bool]) -> list[Family]:
    """Return the families of accounts by name, and of the live runs of which `is_own(run_id)` is true."""
    runs = [run for run in run_metrics.live() if is_own(run.run_id)]
    return [*_of_runs(runs), *_of_keys(accounts, _named(models))]


def _named(models: BaseModels) -> list[tuple[str, Engine]]:
    named: list[tuple[str, Engine]] = []
    for model in models.loaded():
        name, taken = model.source.name, {name for name, _ in named}
        # One model with two settings has two engines, and no two values have the same labels.
        names = itertools.chain([name], (f"{name}#{i}" for i in itertools.count(2)))
        named.append((next(each for each in names if each not in taken), model.engine))
    return named


def _of_keys(accounts: Mapping[str, Account], named: list[tuple[str, Engine]]) -> Iterable[Family]:
    if not accounts:
        return
    for total, description in _OF_KEYS.items():
        values = [({"key": name}, account.totals[total]) for name, account in accounts.items()]
        yield Family(name=f"key_{total}_total", kind="counter", description=description, values=values)
    seconds = [(model, engine.monitor.usage()["owner_seconds"]) for model, engine in named]
    yield Family(
        name="key_device_seconds_total",
        kind="counter",
        description="Time of the engine's turns; owners in one turn of sampling share it by their rows.",
        values=[
            ({"key": name, "model": model}, used[name]) for model, used in seconds for name in accounts if name in used
        ],
    )
    for name, description in (("in_use", "What is in use now, by kind."), ("limit", "The most that may be in use.")):
        yield Family(
            name=f"key_{name}",
            kind="gauge",
            description=description,
            values=[
                ({"key": key, "kind": kind}, account.used(kind) if name == "in_use" else account.limit(kind))
                for key, account in accounts.items()
                for kind in Quota.__slots__
            ],
        )


def _of_engines(named: list[tuple[str, Engine]]) -> Iterable[Family]:
    monitors = [({"model": name}, engine.monitor) for name, engine in named]
    states = [(labels, monitor.usage(), monitor.health(), monitor.compiled()) for labels, monitor in monitors]
    yield Family(
        name="engine_up",
        kind="gauge",
        description="1 if the engine is idle, busy or compiling, 0 if it is stuck or dead.",
        values=[(labels, health["state"] in _WELL) for labels, _, health, _ in states],
    )
    yield Family(
        name="engine_compiling",
        kind="gauge",
        description="Programs that are being compiled.",
        values=[(labels, len(health["compiling"])) for labels, _, health, _ in states],
    )
    yield Family(
        name="engine_waiting_requests",
        kind="gauge",
        description="Requests that have not finished; all sampling counts as one.",
        values=[(labels, health["waiting"]) for labels, _, health, _ in states],
    )
    yield Family(
        name="engine_stalled_seconds",
        kind="gauge",
        description="Time since anything moved while requests wait.",
        values=[(labels, health["stalled_seconds"]) for labels, _, health, _ in states],
    )
    yield Family(
        name="engine_memory_bytes",
        kind="gauge",
        description="Memory by kind, all devices together; available is what one device may still allocate.",
        values=[
            ({**labels, "kind": kind}, size)
            for labels, usage, _, _ in states
            for kind, size in usage["memory_bytes"].items()
            if kind != "activations_per_token"
        ],
    )
    yield Family(
        name="engine_host_up",
        kind="gauge",
        description="1 if another host of the engine, or a sampler beside it, is ready.",
        values=[
            ({**labels, **{name: str(host[name]) for name in ("host", "role", "number")}}, host["state"] == "ready")
            for labels, _, health, _ in states
            for host in health.get("hosts", [])
        ],
    )
    yield from _of_compiles([(labels, compiled) for labels, _, _, compiled in states])
    yield Family(
        name="engine_train_seconds_total",
        kind="counter",
        description="Time of training calls by part: queue, host, compile, device.",
        values=[
            ({**labels, "part": part}, usage["training"][f"{part}_s"])
            for labels, usage, _, _ in states
            for part in run_metrics.PARTS
        ],
    )
    for part, table in (("training", _TRAINING), ("sampling", _SAMPLING)):
        for key, (name, description) in table.items():
            yield Family(
                name=name,
                kind="counter" if name.endswith("_total") else "gauge",
                description=description,
                values=[(labels, usage[part][key]) for labels, usage, _, _ in states],
            )


def _of_compiles(compiled: list[tuple[Labels, list[CompileRecord]]]) -> Iterable[Family]:
    counts: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for labels, records in compiled:
        for record in records:
            key = labels["model"], record.cause, "cache" if record.cached else "compiler"
            counts[key] += 1
            seconds[key] += record.seconds
    description = "Programs made, by what asked for them and where they came from."
    for name, text, values in (
        ("engine_compiles_total", description, counts),
        ("engine_compile_seconds_total", "Time that making them took.", seconds),
    ):
        labelled = [
            ({"model": model, "cause": cause, "source": source}, value)
            for (model, cause, source), value in values.items()
        ]
        yield Family(name=name, kind="counter", description=text, values=labelled)


def _of_runs(runs: list[RunMetrics]) -> Iterable[Family]:
    yield Family(
        name="run_step",
        kind="gauge",
        description="Optimizer steps that the run has taken in all.",
        values=[({"run": run.run_id}, run.step) for run in runs],
    )
    for key, (name, description) in _RUN_GAUGES.items():
        values = [({"run": run.run_id}, newest[key]) for run in runs if key in (newest := run.newest)]
        yield Family(name=name, kind="gauge", description=description, values=values)
    for name, (description, value) in _RUN_COUNTERS.items():
        values = [({"run": run.run_id}, value(run)) for run in runs]
        yield Family(name=name, kind="counter", description=f"{description} Since the run was opened.", values=values)
    yield Family(
        name="run_seconds_total",
        kind="counter",
        description="Time of the run's steps by part: queue, host, compile, device. Since the run was opened.",
        values=[
            ({"run": run.run_id, "part": part}, seconds) for run in runs for part, seconds in run.totals.seconds.items()
        ],
    )


def _of_writer(writer: MetricsWriter) -> Iterable[Family]:
    for name, value in (("written", writer.written), ("dropped", writer.dropped)):
        description = f"Points and events that were {name}."
        yield Family(name=f"metrics_{name}_total", kind="counter", description=description, values=[({}, value)])
