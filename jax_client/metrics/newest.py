"""What did a run do last? Its newest point of one kind and its newest events of another, read without all before."""

from __future__ import annotations

import json
import sqlite3

from jax_client.values import JsonObject

# Two look-ups in an index, however long the series is.
_POINT = (
    "SELECT time, metrics FROM points WHERE series = (SELECT id FROM series WHERE run = ? AND kind = ?) "
    "ORDER BY id DESC LIMIT 1"
)
_EVENTS = "SELECT step, time, details FROM events WHERE kind = ? AND run = ? ORDER BY id DESC LIMIT ?"


def newest(database: sqlite3.Connection, run: str, point: str, event: str, most: int) -> JsonObject:
    """Return {"point", "events"}: the newest point of a run, None without one, and its newest events, oldest first.

    Args:
        database: the metrics file.
        run: its id.
        point, event: their kinds.
        most: events.
    """
    found = database.execute(_POINT, (run, point)).fetchone()
    events = [
        {"step": step, "time": time, "details": json.loads(text)}
        for step, time, text in database.execute(_EVENTS, (event, run, most))
    ]
    return {
        "point": None if found is None else {"time": found[0], "metrics": json.loads(found[1])},
        "events": events[::-1],
    }
