"""Does the server still work? A `Watchdog` answers health checks, and logs every thread's stack for an ill engine."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import weakref
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jax_client.runs.lifecycle.base_models import BaseModel, BaseModels
from jax_client.torch_graph.traced import compile_queue

if TYPE_CHECKING:
    from jax_client.engine.protocol import Engine, Health

logger = logging.getLogger(__name__)
# Engine states that make a health check fail.
_ILL = ("stuck", "dead")
# For those who are not shown which model it is, nor how much of all keys' work waits.
_ILL_SENTENCE = "an engine of this server is stuck or dead; tell the operator, whose log says more"


class Watchdog:
    """Checks every loaded engine when a request asks for it; has no thread.

    Args:
        models: whose engines are checked.
        whole: whether the answer shows the engines, and what is compiled, or only whether they are well.
    """

    def __init__(self, models: BaseModels, *, whole: bool = True) -> None:
        self._models = models
        self._whole = whole
        self._reported: weakref.WeakSet[Engine] = weakref.WeakSet()

    async def check(self, request: Request) -> Response:
        """Answer GET /healthz without a thread and without waiting: 200, or 503 with the stuck or dead engines."""
        checked = [(model, model.engine.monitor.health()) for model in self._models.loaded()]
        ill = [(model, health) for model, health in checked if health["state"] in _ILL]
        for model, health in checked:
            self._report(model, health)
        engines = [{"model": model.source.name, **health} for model, health in checked]
        shown = {"engines": engines, "losses": compile_queue.shared.running()} if self._whole else {}
        if not ill:
            return JSONResponse({"status": "ok", **shown})
        # The only 5xx status of the server: the SDK does not send health checks.
        status = "; ".join(_sentence(*each) for each in ill) if self._whole else _ILL_SENTENCE
        return JSONResponse({"status": status, **shown}, 503)

    def _report(self, model: BaseModel, health: Health) -> None:
        """Log all stacks when an engine is ill, once until it has recovered."""
        if health["state"] not in _ILL:
            self._reported.discard(model.engine)
        elif model.engine not in self._reported:
            self._reported.add(model.engine)
            logger.error("%s\n%s", _sentence(model, health), stacks())


def _sentence(model: BaseModel, health: Health) -> str:
    return (
        f"engine {model.source.name!r} is {health['state']}: {health['waiting']} requests wait, and nothing has moved "
        f"for {health['stalled_seconds']:.0f} s"
    )


def stacks() -> str:
    """Return the stack of every thread of the process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    )
