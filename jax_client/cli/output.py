"""How is an answer printed? As tables and fields for people, as JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import click

_UNITS = (("year", 365 * 86400), ("month", 30 * 86400), ("day", 86400), ("h", 3600), ("min", 60))


def print_json(objects: Sequence[Mapping[str, object]]) -> None:
    """Print a list of objects; text is in ASCII, so that any terminal and any pipe takes it."""
    click.echo(json.dumps(objects, indent=2))


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Iterable[str] = (),
    colours: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Print rows under their headers: styled on a terminal, plain aligned text elsewhere.

    Lines are not wrapped or cut, because a path must be copied whole: its column comes last.

    Args:
        right: the headers of columns that are flush right.
        colours: by header, the colour of each value on a terminal.
    """
    if sys.stdout.isatty():
        _print_rich_table(headers, rows, set(right), colours or {})
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    flush_right = [header in set(right) for header in headers]
    for row in (headers, *rows):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, flush_right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _print_rich_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: set[str], colours: Mapping[str, Mapping[str, str]]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without rules: a rule as wide as the longest path would fill two rows of most terminals.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for header in headers:
        justify, style = "right" if header in right else "left", "cyan" if header == headers[-1] else ""
        table.add_column(header, no_wrap=True, justify=justify, style=style)
    for row in rows:
        # As Text, because a name may look like rich's markup.
        styles = [colours.get(header, {}).get(cell, "") for header, cell in zip(headers, row, strict=True)]
        table.add_row(*(Text(cell, style=style) for cell, style in zip(row, styles, strict=True)))
    # The terminal wraps what is too long; rich would cut it.
    Console(width=10_000, highlight=False).print(table)


def print_fields(fields: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {value}")


def shown(value: object) -> str:
    """Return text from outside for a terminal: text that could move the cursor is escaped; None is "-"."""
    if value is None:
        return "-"
    text = str(value)
    return text if text.isprintable() else ascii(text)


def human_size(size: float) -> str:
    """Return bytes as people read them, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def iso_time(when: float | None) -> str | None:
    """Return unix seconds as UTC in ISO 8601, None for None."""
    return None if when is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


def human_time(iso: str | None) -> str:
    """Return what `iso_time` gave as local time, and how long ago that is; "-" for None."""
    if iso is None:
        return "-"
    when = datetime.fromisoformat(iso).timestamp()
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(when))} ({_relative(when - time.time())})"


def _relative(seconds: float) -> str:
    for name, length in _UNITS:
        if (count := int(abs(seconds) // length)) >= 1:
            text = f"{count} {name}{'s' if count > 1 and length >= 86400 else ''}"
            return f"{text} ago" if seconds < 0 else f"in {text}"
    return "just now" if seconds <= 0 else "in less than a minute"
