"""Where are a server's figures? As JSON under /api/v1/metrics, and the newest ones for Prometheus at /metrics."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jax_client.errors import BadRequestError, NotFoundError
from jax_client.metrics.store import FILE_NAME, Cursor, MetricsStore
from jax_client.runs.lifecycle import base_models
from jax_client.runs.results import run_metrics
from jax_client.runs.results.run_metrics import MetricsWriter, RunMetrics
from jax_client.server.ops.prometheus import CONTENT_TYPE, Family, render

Handler = Callable[[Request], Awaitable[Response]]
Labels = Mapping[str, str]

MOST_ROWS = 10_000
_WELL = ("idle", "busy", "compiling")

# Of a run's newest step: the name of the metric, and of the family.
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
# Of `usage()["training"]` and `usage()["sampling"]`.
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
    "decode_slots": ("engine_decode_row_places_total", "Places for samples in those blocks, used or not."),
    "rows_running": ("engine_sample_rows_running", "Samples that are being drawn."),
    "rows_waiting": ("engine_sample_rows", "Samples without an answer yet."),
    "cache_tokens": ("engine_cache_tokens", "Tokens that the key/value cache has room for."),
}


def list_runs(state_dir: Path) -> Handler:
    """Return the handler of GET metrics/runs: the runs that have points, the newest first."""
    history = MetricsStore(state_dir / FILE_NAME)

    async def handler(request: Request) -> Response:
        limit, offset = _number(request, "limit", 100, 1, MOST_ROWS), _number(request, "offset", 0, 0, 2**31)
        found = await run_in_threadpool(history.runs)
        live = {run.run_id for run in run_metrics.live()}
        shown = [run | {"live": run["run"] in live} for run in found[offset : offset + limit]]
        return JSONResponse({"runs": shown, "total": len(found)})

    return handler


def read_run(state_dir: Path) -> Handler:
    """Return the handler of GET metrics/runs/RUN: points and events after `since`.

    `limit` is the most of either; `points` asks for all of them instead, thinned out to that many of each kind.
    """
    history = MetricsStore(state_dir / FILE_NAME)

    async def handler(request: Request) -> Response:
        run, since = request.path_params["run"], _cursor(request)
        most, limit = _number(request, "points", 0, 2, MOST_ROWS), _number(request, "limit", 1_000, 1, MOST_ROWS)
        if most:
            found = await run_in_threadpool(history.overview, run, since, most=most)
        else:
            found = await run_in_threadpool(history.read, run, since, limit=limit)
        if since == Cursor() == found.cursor:
            raise NotFoundError(f"nothing was recorded of a run {run!r}; metrics/runs lists those that have points.")
        return JSONResponse(
            {
                "run": run,
                "live": any(each.run_id == run for each in run_metrics.live()),
                "points": [_shown(point) for point in found.points],
                "events": [_shown(event) for event in found.events],
                "next": f"{found.cursor.point}-{found.cursor.event}",
                "more": found.more,
            }
        )

    return handler


async def list_engines(request: Request) -> Response:
    """Answer GET metrics/engines: what each loaded engine says of itself, and its health."""
    models = base_models.loaded()

    def describe() -> list[dict[str, Any]]:
        return [model.engine.describe() | {"health": model.engine.health()} for model in models]

    return JSONResponse({"engines": await run_in_threadpool(describe)})


async def show_metrics(request: Request) -> Response:
    """Answer GET /metrics for Prometheus."""
    return Response(await run_in_threadpool(_text), media_type=CONTENT_TYPE)


def _text() -> str:
    named: list[tuple[str, Any]] = []
    for model in base_models.loaded():
        name, taken = model.source.name, {name for name, _ in named}
        # One model with two settings has two engines, and no two values have the same labels.
        names = itertools.chain([name], (f"{name}#{i}" for i in itertools.count(2)))
        named.append((next(each for each in names if each not in taken), model.engine))
    return render([*_of_engines(named), *_of_runs(run_metrics.live()), *_of_recorder(run_metrics.shared)])


def _of_engines(named: list[tuple[str, Any]]) -> Iterable[Family]:
    found = [({"model": name}, engine.usage(), engine.health(), engine.compiled()) for name, engine in named]
    yield Family(
        name="engine_up",
        kind="gauge",
        about="1 if the engine is idle, busy or compiling, 0 if it is stuck or dead.",
        values=[(labels, health["state"] in _WELL) for labels, _, health, _ in found],
    )
    yield Family(
        name="engine_compiling",
        kind="gauge",
        about="Programs that are being compiled.",
        values=[(labels, len(health["compiling"])) for labels, _, health, _ in found],
    )
    yield Family(
        name="engine_waiting_requests",
        kind="gauge",
        about="Requests that have not finished; all sampling counts as one.",
        values=[(labels, health["waiting"]) for labels, _, health, _ in found],
    )
    yield Family(
        name="engine_still_seconds",
        kind="gauge",
        about="Time since anything moved while requests wait.",
        values=[(labels, health["stalled_seconds"]) for labels, _, health, _ in found],
    )
    yield Family(
        name="engine_memory_bytes",
        kind="gauge",
        about="Memory by kind, all devices together; available is what one device may still allocate.",
        values=[
            ({**labels, "kind": kind}, size)
            for labels, usage, _, _ in found
            for kind, size in usage["memory_bytes"].items()
            if kind != "activations_per_token"
        ],
    )
    yield from _of_compiles([(labels, compiled) for labels, _, _, compiled in found])
    yield Family(
        name="engine_train_seconds_total",
        kind="counter",
        about="Time of training calls by part: queue, host, compile, device.",
        values=[
            ({**labels, "part": part}, usage["training"][f"{part}_s"])
            for labels, usage, _, _ in found
            for part in run_metrics.PARTS
        ],
    )
    for part, table in (("training", _TRAINING), ("sampling", _SAMPLING)):
        for key, (name, about) in table.items():
            yield Family(
                name=name,
                kind="counter" if name.endswith("_total") else "gauge",
                about=about,
                values=[(labels, usage[part][key]) for labels, usage, _, _ in found],
            )


def _of_compiles(compiled: list[tuple[Labels, list[dict[str, Any]]]]) -> Iterable[Family]:
    counts: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for labels, records in compiled:
        for record in records:
            key = labels["model"], record["cause"], "cache" if record["cached"] else "compiler"
            counts[key] += 1
            seconds[key] += record["seconds"]
    about = "Programs made, by what asked for them and where they came from."
    for name, text, values in (
        ("engine_compiles_total", about, counts),
        ("engine_compile_seconds_total", "Time that making them took.", seconds),
    ):
        labelled = [
            ({"model": model, "cause": cause, "source": source}, value)
            for (model, cause, source), value in values.items()
        ]
        yield Family(name=name, kind="counter", about=text, values=labelled)


def _of_runs(runs: list[RunMetrics]) -> Iterable[Family]:
    yield Family(
        name="run_step",
        kind="gauge",
        about="Optimizer steps that the run has taken in all.",
        values=[({"run": run.run_id}, run.step) for run in runs],
    )
    for key, (name, about) in _RUN_GAUGES.items():
        values = [({"run": run.run_id}, newest[key]) for run in runs if key in (newest := run.newest)]
        yield Family(name=name, kind="gauge", about=about, values=values)
    for name, (about, value) in _RUN_COUNTERS.items():
        values = [({"run": run.run_id}, value(run)) for run in runs]
        yield Family(name=name, kind="counter", about=f"{about} Since the run was opened.", values=values)
    yield Family(
        name="run_seconds_total",
        kind="counter",
        about="Time of the run's steps by part: queue, host, compile, device. Since the run was opened.",
        values=[
            ({"run": run.run_id, "part": part}, seconds) for run in runs for part, seconds in run.totals.seconds.items()
        ],
    )


def _of_recorder(recorder: MetricsWriter) -> Iterable[Family]:
    for name, value in (("written", recorder.written), ("dropped", recorder.dropped)):
        about = f"Points and events that were {name}."
        yield Family(name=f"metrics_{name}_total", kind="counter", about=about, values=[({}, value)])


def _shown(row: Any) -> dict[str, Any]:
    # Not asdict, which copies every metric.
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name != "run"}


def _cursor(request: Request) -> Cursor:
    text = request.query_params.get("since", "0-0")
    if not re.fullmatch("[0-9]{1,18}-[0-9]{1,18}", text):
        raise BadRequestError(f"since is {text[:40]!r}; give the `next` of an earlier answer, or leave it out.")
    point, event = map(int, text.split("-"))
    return Cursor(point=point, event=event)


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise BadRequestError(f"{name} is {text[:40]!r}; give a number from {least} to {most}.")
    return int(text)
