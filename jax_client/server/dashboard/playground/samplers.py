"""Which weights does the page sample from? The newest few that were asked for, loaded once, and released when idle."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_client.errors import JaxClientError, RequestFailedError, first_line
from jax_client.values import CheckpointKey

if TYPE_CHECKING:
    from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
    from jax_client.runs.lifecycle.session import Session

MOST_LOADED = 4
IDLE_SECONDS = 300.0
# A checkpoint's path, or a model's name.
Name = tuple[str, str]


@dataclass(slots=True)
class Taken:
    """A sampler, loaded or loading, and how many requests use it."""

    handle: Future[SamplerHandle]
    users: int = 0
    used: float = 0.0


class Samplers:
    """The loaded samplers of one owner's playground. Thread-safe.

    Args:
        open_session: `open_session() -> Session`, a session for this alone; called when the first one is loaded.
        fit: `fit(make) -> make()` makes room for what is loaded, where others can be evicted for it.
        refusal: `refusal() -> why nothing can be loaded`, None where it can.
        most: samplers that stay loaded.
    """

    def __init__(
        self,
        open_session: Callable[[], Session],
        fit: Callable[[Callable[[], SamplerHandle]], SamplerHandle] = lambda make: make(),
        refusal: Callable[[], str | None] = lambda: None,
        most: int = MOST_LOADED,
    ) -> None:
        self._open_session, self._fit, self.refusal, self._most = open_session, fit, refusal, most
        self._session: Session | None = None
        self._loaded: OrderedDict[Name, Taken] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: Name) -> Taken:
        """Return a sampler with the future of its handle; it stays loaded until it is given back.

        Raises:
            RequestFailedError: through the future, if it cannot be loaded in this process.
        """
        from jax_client.runs.lifecycle.futures import background

        with self._lock:
            found = self._loaded.get(name)
            if found is None or (found.handle.done() and found.handle.exception() is not None):
                found = self._loaded[name] = Taken(background(lambda: self._load(name), "page-sampler"))
            self._loaded.move_to_end(name)
            found.users += 1
            return found

    def give(self, taken: Taken) -> None:
        """Give back what was taken; where too many are loaded, those go that were not used for the longest."""
        with self._lock:
            taken.users -= 1
            taken.used = time.monotonic()
        self._release(lambda each, left: left > self._most)

    def release_idle(self, seconds: float = IDLE_SECONDS) -> None:
        """Release what was not used for so long; waits until its memory is free."""
        now = time.monotonic()
        self._release(lambda each, left: now - each.used >= seconds)

    def names(self) -> list[Name]:
        """Return what is loaded, or is being loaded."""
        with self._lock:
            return list(self._loaded)

    def loading(self) -> str | None:
        """Return what is being loaded and how far that is, None for nothing."""
        with self._lock:
            session = self._session
            names = [name for name, each in self._loaded.items() if not each.handle.done()]
        if not names:
            return None
        path, model = names[0]
        progress = None if session is None or not model else session.models.loading(model, session.config)
        return f"{progress or 'loading'}: {path or model}"

    def close(self) -> None:
        """Close the session."""
        with self._lock:
            session, self._session = self._session, None
            self._loaded.clear()
        if session is not None:
            session.close("success", None)

    def _release(self, goes: Callable[[Taken, int], bool]) -> None:
        with self._lock:
            session = self._session
            for name, each in list(self._loaded.items()):
                if not each.users and each.handle.done() and goes(each, len(self._loaded)):
                    del self._loaded[name]
                    if session is not None and each.handle.exception() is None:
                        session.samplers.pop(each.handle.result().sampler_id, None)
            kept = [each.handle for each in self._loaded.values()]
        if session is None or any(not handle.done() for handle in kept):
            return
        names = {handle.result().model_ref.name for handle in kept if handle.exception() is None}
        session.release_unused(names)

    def _own_session(self) -> Session:
        with self._lock:
            if self._session is None:
                from jax_client.runs.lifecycle.session import live_sessions

                self._session = self._open_session()
                # Nobody made it: listings of sessions leave it out.
                live_sessions.pop(self._session.session_id, None)
            return self._session

    def _load(self, name: Name) -> SamplerHandle:
        if (refusal := self.refusal()) is not None:
            raise RequestFailedError(refusal, category="user")
        from jax_client.runs.lifecycle.sampler_handle import base_sampler, checkpoint_sampler

        path, model = name
        try:
            session = self._own_session()
            if path:
                return self._fit(lambda: checkpoint_sampler(session, CheckpointKey.parse(path)))
            return self._fit(lambda: base_sampler(session, model))
        except JaxClientError:
            raise
        except (RuntimeError, OSError, MemoryError) as error:
            raise RequestFailedError(
                f"{path or model} cannot be loaded in this process: {first_line(error)}. Where another process has the "
                "devices, end it, or use the page of the server that has them.",
                category="server",
            ) from error
