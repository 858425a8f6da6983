"""How does someone who looks at no page learn of an alert? Each new one is posted to an address that the user allowed.

A thread of its own looks at the open runs twice a minute. It follows no redirect. What an address does not take is
posted again, later each time, until it is given up; that is reported once.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import ssl
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jax_client import process
from jax_client.host.disk import free_share
from jax_client.metrics.store import MetricsStore
from jax_client.runs.overview.alerts import alerts_of
from jax_client.threads import BatchWriter
from jax_client.values import JsonObject

logger = logging.getLogger(__name__)
TIMEOUT_SECONDS = 10.0
MOST_WAITING = 100
# Of one alert: 30 s after the first, then twice as long each time, a quarter of an hour in all.
MOST_TRIES = 6
DELAY_SECONDS = 30.0
TICK_SECONDS = 15.0


@dataclass(slots=True)
class _Waiting:
    """An alert that is not posted yet; `due` is by the monotonic clock."""

    body: JsonObject
    tries: int = 0
    due: float = 0.0


class AlertPoster:
    """Posts the alerts of runs to one address. What is called neither waits nor raises.

    Args:
        url: as `host.reporting.webhook_url` returned it.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._known: set[tuple[str, str]] = set()
        self._waiting: dict[tuple[str, str], _Waiting] = {}
        self._complained = False
        self._writer: BatchWriter[tuple[Path, str, str]] = BatchWriter(
            "jax_client-alerts",
            self._look,
            seconds=0.0,
            most=MOST_WAITING,
            capacity=MOST_WAITING,
            tick=self._post_due,
            tick_seconds=TICK_SECONDS,
        )

    def look(self, path: Path, run: str, name: str) -> None:
        """Look at an open run of a metrics file, and post what is new."""
        self._writer.put((path, run, name))

    def flush(self, timeout: float) -> bool:
        """Wait until what was asked for is done, `timeout` seconds at most; return whether it is."""
        return self._writer.flush(timeout)

    def end(self) -> None:
        """Have the thread end; do not wait for it."""
        self._writer.end()

    def restart_in_fork(self) -> None:
        """Begin anew in a forked process: what waits is the parent's to post."""
        self._waiting = {}
        self._writer.restart_in_fork()

    def _look(self, asked: Collection[tuple[Path, str, str]]) -> None:
        for path in {path for path, _, _ in asked}:
            summaries, free = MetricsStore(path).summaries(), free_share(path.parent)
            for run, name in {(run, name) for where, run, name in asked if where == path}:
                if (summary := summaries.get(run)) is None:
                    continue
                found = alerts_of(summary, is_open=True, now=time.time(), free=free)
                alerts = {alert.kind: alert for alert in found}
                # One that has passed may come back.
                self._known = {(r, kind) for r, kind in self._known if r != run or kind in alerts}
                for kind, alert in alerts.items():
                    key = run, kind
                    if key not in self._known and key not in self._waiting and len(self._waiting) < MOST_WAITING:
                        body = {"run": run, "name": name, "host": socket.gethostname(), **alert.to_json()}
                        self._waiting[key] = _Waiting(body)
        self._post_due()

    def _post_due(self) -> None:
        """Post what waits and is due; at the end of the process only what was not tried."""
        for key, each in list(self._waiting.items()):
            if each.due > time.monotonic() or (each.tries and process.ending()):
                continue
            answer = self._post(each.body)
            each.tries += 1
            each.due = time.monotonic() + DELAY_SECONDS * 2 ** (each.tries - 1)
            if (answer is not None and 200 <= answer < 300) or each.tries >= MOST_TRIES:
                del self._waiting[key]
                self._known.add(key)
            if answer is None:
                break  # nor would it answer for the others

    def _post(self, body: JsonObject) -> int | None:
        """Return the status of the answer, None where there was none."""
        parts = urlsplit(self._url)
        secure = parts.scheme == "https"
        try:
            connection = (
                http.client.HTTPSConnection(
                    parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context()
                )
                if secure
                else http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
            )
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                headers = {"Content-Type": "application/json", "User-Agent": "jax_client"}
                connection.request("POST", target, json.dumps(body).encode(), headers)
                status = connection.getresponse().status
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            self._complain(str(error))
            return None
        if not 200 <= status < 300:
            self._complain(f"it answered {status}")
        return status

    def _complain(self, why: str) -> None:
        # Without the address, which may hold a secret.
        if not self._complained:
            self._complained = True
            logger.warning("an alert could not be posted to %s: %s", urlsplit(self._url).hostname, why)
