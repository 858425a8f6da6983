"""`jax_client runs watch`: how does a run do now? Its curves on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jax_client.cli import output
from jax_client.cli.options import find_run, reads_state
from jax_client.cli.runs.charts import bar, chart
from jax_client.cli.runs.entries import COLOURS, count, figure, logs_option, open_overview
from jax_client.errors import NotFoundError

if TYPE_CHECKING:
    from rich.console import Group

    from jax_client.runs.overview.records import RunRow
    from jax_client.runs.overview.rows import Overview

POINTS = 1_000
HEIGHT = 8
# A run that is at its end is not watched any longer.
ENDED = ("done", "crashed")
MEMORY = "memory_bytes/"
_SPEED = "tokens_per_second:mean"
# The others are shares of one.
_DEVICE = ("sampler/occupancy:mean", _SPEED, "padding_waste:mean")


@click.command("watch")
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, metavar="SECONDS", help="Of looks."
)
@click.option("--once", is_flag=True, help="Show it once, and end.")
@logs_option
@reads_state
def watch(home: Path, run_id: str | None, interval: float, once: bool, logs: Sequence[Path]) -> None:
    """Draw a run's loss, reward and use of the device as it trains. Ends with the run, and with Ctrl-C.

    RUN is its id, or as much of the beginning as no other run shares; by default the run with the newest sign of life.
    Where the output is no terminal, a line is printed for each change.
    """
    overview = open_overview(home, logs)
    rows = {row.run: row for row in overview.runs()}
    if not rows:
        raise NotFoundError(f"there are no runs under {home}; a training client makes one.")
    chosen = next(iter(rows)) if run_id is None else find_run(list(rows), run_id, home)
    try:
        if sys.stdout.isatty():
            _draw(overview, chosen, interval, once)
        else:
            _print(overview, chosen, interval, once)
    except KeyboardInterrupt:
        # What was asked for: it is the way to end.
        click.echo(err=True)


def _print(overview: Overview, run: str, interval: float, once: bool) -> None:
    known = ""
    while True:
        row = overview.run(run)
        line = _line(row)
        if line != known:
            known = line
            click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")
        if once or row.state in ENDED:
            return
        _wait(overview, interval)


def _wait(overview: Overview, interval: float) -> None:
    """Wait until something may have changed, looking at every interval."""
    token = overview.changed()
    time.sleep(interval)
    while overview.changed() == token:
        time.sleep(interval)


def _line(row: RunRow) -> str:
    words = [output.shown(row.name), row.state, f"step {row.step or 0}", f"loss {figure(row.loss)}"]
    if row.reward is not None:
        words.append(f"reward {figure(row.reward)}")
    words.append(f"tokens {count(row.tokens)}")
    if row.tokens_per_second is not None:
        words.append(f"{_speed(row.tokens_per_second)} tokens/s")
    words += [f"! {output.shown(alert.text)}" for alert in row.alerts]
    if row.reason is not None:
        words.append(f"({output.shown(row.reason)})")
    return "  ".join(words)


def _draw(overview: Overview, run: str, interval: float, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            row = overview.run(run)
            live.update(picture(overview, row, console.width), refresh=True)
            if once or row.state in ENDED:
                return
            _wait(overview, interval)


def picture(overview: Overview, row: RunRow, width: int) -> Group:
    """Return what a terminal of some width shows of a run."""
    from rich.console import Group
    from rich.text import Text

    series = overview.series(row.run, None, points=POINTS).series
    parts: list[Text] = []
    state = Text.assemble((output.shown(row.name), "bold"), "  ", (row.state, COLOURS[row.state]))
    state.append(f"  step {row.step or 0}  {count(row.tokens)} tokens  {_age(row)}")
    parts.append(state)
    for title, values in _curves(row, series):
        newest = f"{values[-1]:.4g}" if values else "-"
        parts.append(Text.assemble((title, "bold"), f"  {newest}"))
        parts += [Text(line, style="cyan", no_wrap=True) for line in chart(values, width=width, height=HEIGHT)]
    parts += [Text(line, no_wrap=True) for line in _device(series, width)]
    parts += [Text(f"! {output.shown(alert.text)}", style="yellow") for alert in row.alerts]
    if row.reason is not None:
        parts.append(Text(output.shown(row.reason), style="dim"))
    return Group(*parts)


def _curves(row: RunRow, series: Mapping[str, Mapping[str, list[float]]]) -> list[tuple[str, list[float]]]:
    from jax_client.metrics.summary import LOSSES, reward_name

    loss = next((series[name]["value"] for name in LOSSES if name in series), [])
    curves = [("loss", loss)]
    if (reward := reward_name(series.keys())) is not None:
        curves.append((reward, series[reward]["value"]))
    return curves


def _device(series: Mapping[str, Mapping[str, list[float]]], width: int) -> list[str]:
    lines = []
    for name in _DEVICE:
        if name in series:
            value = series[name]["value"][-1]
            shown = _speed(value) if name == _SPEED else f"{100 * value:.0f} %  {bar(value, 20)}"
            lines.append(f"{name.partition(':')[0]}  {shown}")
    kinds = {name.removeprefix(MEMORY): series[name]["value"][-1] for name in series if name.startswith(MEMORY)}
    used = {kind: size for kind, size in kinds.items() if kind not in ("available", "activations_per_token") and size}
    if used:
        parts = ", ".join(f"{kind} {output.human_size(size)}" for kind, size in sorted(used.items()))
        free = f"; {output.human_size(kinds['available'])} free" if "available" in kinds else ""
        lines.append(f"memory  {parts}{free}"[:width])
    return lines


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _age(row: RunRow) -> str:
    return "" if row.updated is None else output.human_time(output.iso_time(row.updated)).partition("(")[2].rstrip(")")
