"""Does the server still do its work? The answer to health checks, and a look at all threads when it is no."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import weakref
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jax_client.runs.lifecycle import base_models

logger = logging.getLogger(__name__)
_ILL = ("stuck", "dead")


class Watchdog:
    """Looks at every loaded engine when it is asked; no thread of its own."""

    def __init__(self) -> None:
        self._reported: weakref.WeakSet[Any] = weakref.WeakSet()

    async def check(self, request: Request) -> Response:
        """Answer GET /healthz: 200, or 503 with what is stuck or dead. Waits for nothing, and for no free thread."""
        found = [(model, model.engine.health()) for model in base_models.loaded()]
        ill = [(model, health) for model, health in found if health["state"] in _ILL]
        for model, health in found:
            self._report(model, health)
        shown = [{"model": model.source.name, **health} for model, health in found]
        if not ill:
            return JSONResponse({"status": "ok", "engines": shown})
        # The one answer of this kind: the SDK does not ask this.
        return JSONResponse({"status": "; ".join(_sentence(*each) for each in ill), "engines": shown}, 503)

    def _report(self, model: Any, health: dict[str, Any]) -> None:
        """Log all stacks when an engine is found ill, once until it is well again."""
        if health["state"] not in _ILL:
            self._reported.discard(model.engine)
        elif model.engine not in self._reported:
            self._reported.add(model.engine)
            logger.error("%s\n%s", _sentence(model, health), stacks())


def _sentence(model: Any, health: dict[str, Any]) -> str:
    return (
        f"engine {model.source.name!r} is {health['state']}: {health['waiting']} requests wait, and nothing has moved "
        f"for {health['stalled_seconds']:.0f} s"
    )


def stacks() -> str:
    """Return where every thread of the process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    )
