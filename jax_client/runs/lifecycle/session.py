"""What is one use of this package? A session: its models, runs, samplers and checkpoints, until it is closed."""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from jax_client import process
from jax_client.checkpoint.store import CheckpointStore
from jax_client.config import EngineConfig, default_mirror, default_state_dir
from jax_client.errors import BadRequestError, NotFoundError
from jax_client.host import places
from jax_client.host.reporting import check_installed
from jax_client.runs.lifecycle import autosave, base_models
from jax_client.runs.lifecycle.base_models import BaseModels, ModelRef
from jax_client.runs.lifecycle.futures import background, link, settled, then
from jax_client.runs.lifecycle.run_checkpointer import End, RunCheckpointer
from jax_client.runs.results import run_metrics
from jax_client.threads import Workers
from jax_client.values import JsonObject, Owner

if TYPE_CHECKING:
    from jax_client.engine.protocol import Description

logger = logging.getLogger(__name__)
A = TypeVar("A")
T = TypeVar("T")
# Most that closing waits for uploads.
MIRROR_SECONDS = 300.0
Status = Literal["success", "errored", "interrupted"]
# What the runs of a closed session record of their end.
_ENDS: dict[Status, End] = {"success": "closed", "errored": "errored", "interrupted": "interrupted"}


class SessionClosedError(NotFoundError, RuntimeError):
    """The session was closed, its models and adapters are gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """What the user said about a session; `script` is the program that made it, where that is known."""

    user_metadata: Mapping[str, str] | None = None
    project_id: str | None = None
    display_name: str | None = None
    script: str | None = None

    def to_json(self) -> JsonObject:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: JsonObject) -> SessionInfo:
        """Undo `to_json`."""
        return cls(**fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerInfo:
    """What can be asked about a sampler: its id, its base model and, unless ephemeral, the checkpoint it serves."""

    sampler_id: str
    base_model: str
    model_path: str | None


@dataclass(slots=True)
class _Resources:
    """What a session holds and must give back, kept apart so that a destructor can reach it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model_refs: dict[str, Future[ModelRef]] = field(default_factory=dict)
    # Those whose files were written anew: clients made before keep them.
    earlier: list[Future[ModelRef]] = field(default_factory=list)


# Samplers and sessions of this process, for RestClient; checkpoints tell about the other processes.
live_sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
process.register("sessions", "the open sessions by id, for listings", after_fork=live_sessions.clear)


class Session:
    """The shared state behind a ServiceClient and every client made by it. Thread-safe; does no work when constructed.

    Args:
        config: engine settings.
        info: what the user said about the session.
        session_id: of a session that is continued; None makes a new one.
        models: where base models are loaded; None shares those of the process.
        owner: whose session it is; None may use every run and checkpoint.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        info: SessionInfo | None = None,
        session_id: str | None = None,
        *,
        models: BaseModels | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.owner = owner
        self.config = config or EngineConfig()
        check_installed(self.config.trackers)
        _ = self.config.webhook  # raises here, where nothing has begun
        self.info = info or SessionInfo()
        self.session_id = session_id or str(uuid.uuid4())
        self.models = models or base_models.shared
        self.samplers: dict[str, SamplerInfo] = {}
        self.loss_keys: set[str] = set()
        self._lock = threading.RLock()
        self._counts = {"train": 0, "sample": 0}
        self._in_flight: set[Future[object]] = set()
        self._saving: dict[str, Future[object]] = {}
        self._closed: str | None = None
        self._how = "closed", ""
        self._closing: Future[None] | None = None
        self._store: CheckpointStore | None = None
        self._checkpointers: weakref.WeakSet[RunCheckpointer] = weakref.WeakSet()
        self._at_close: list[Callable[[], None]] = []
        self._when_closing: list[Callable[[], None]] = []
        self._disk: Workers | None = None
        self._resources = _Resources()
        weakref.finalize(self, _drop, self._resources).atexit = False
        live_sessions[self.session_id] = self

    @property
    def owner_name(self) -> str:
        """Who pays for what the session does on the device, "" for no one."""
        return "" if self.owner is None else self.owner.name

    @property
    def state_dir(self) -> Path:
        """Where this session's checkpoints live."""
        return state_dir(self.config)

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints in `state_dir`, opened on first use."""
        with self._lock:
            if self._store is None:
                mirror = self.config.mirror or default_mirror()
                self._store = CheckpointStore(self.state_dir, mirror, self.owner)
                self._store.sweep_expired()
            return self._store

    def new_id(self, kind: Literal["train", "sample"]) -> str:
        """Return the next id, such as `SESSION:train:0`."""
        with self._lock:
            number = self._counts[kind]
            self._counts[kind] = number + 1
        return f"{self.session_id}:{kind}:{number}"

    def base_model(self, name: str) -> Future[ModelRef]:
        """Return the future of the base model `name` as its files are now; load it in the background if need be."""
        self.check_open()
        resources = self._resources
        with resources.lock:
            known = resources.model_refs.get(name)
        outdated = known is not None and _is_loaded(known) and not known.result().is_current()
        with resources.lock:
            found = resources.model_refs.get(name)
            if found is not None and found is known and outdated:
                resources.earlier.append(found)
            elif found is not None and not (found.done() and found.exception() is not None):
                return found
            config, models = self.config, self.models
            loading = background(lambda: models.acquire(name, config), "load")
            resources.model_refs[name] = loading

        def forget_failed(done: Future[ModelRef]) -> None:
            with resources.lock:
                if done.exception() is not None and resources.model_refs.get(name) is done:
                    del resources.model_refs[name]

        # Outside of the lock: a load may have ended already. A name that means nothing is not remembered.
        loading.add_done_callback(forget_failed)
        return loading

    def same_base_model(self, model_ref: ModelRef) -> Future[ModelRef]:
        """Return the future of the base model that `model_ref` was made for, loaded again if it was released.

        Raises:
            BadRequestError: through the future, if the model's files were written anew since.
        """
        with self._resources.lock:
            held = [*self._resources.model_refs.values(), *self._resources.earlier]
        for each in held:
            if _is_loaded(each) and each.result().key == model_ref.key:
                return each

        def check(found: ModelRef) -> ModelRef:
            if found.key != model_ref.key:
                raise BadRequestError(
                    f"the files of {model_ref.name!r} in {found.source.path} were written anew since this client was "
                    "made, and its weights are no longer in memory. Make a new client, or put the files back."
                )
            return found

        return then(self.base_model(model_ref.name), check, owner=self)

    def release_unused(self, keep: Collection[str | None]) -> bool:
        """Release the base models that this session no longer uses; return whether any were.

        Waits for the engines that are closed by that.

        Args:
            keep: the names of those that it uses.
        """
        with self._resources.lock:
            model_refs = self._resources.model_refs
            unused = [name for name, model_ref in model_refs.items() if name not in keep and model_ref.done()]
            released = [model_refs.pop(name) for name in unused]
            earlier = self._resources.earlier
            released += [each for each in earlier if each.result().name not in keep]
            earlier[:] = [each for each in earlier if each not in released]
        base_models.release_all(released)
        return bool(released)

    def keep(self, checkpointer: RunCheckpointer) -> None:
        """Save a run by itself, as often as the settings say, and when the session is closed."""
        self._checkpointers.add(checkpointer)
        autosave.watch(checkpointer, self.config.autosave_minutes)

    def at_close(self, function: Callable[[], None]) -> None:
        """Call `function` when the session is closed and its requests are finished."""
        with self._lock:
            self._at_close.append(function)

    def when_closing(self, function: Callable[[], None]) -> None:
        """Call `function` as soon as the session is being closed, before its requests are finished."""
        with self._lock:
            if self._closed is None:
                self._when_closing.append(function)
                return
        function()

    def track(self, future: Future[T]) -> Future[T]:
        """Count a request as in flight until it is done; closing waits for it."""
        with self._lock:
            self._in_flight.add(cast("Future[object]", future))
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[T]) -> None:
        with self._lock:
            self._in_flight.discard(cast("Future[object]", future))

    def on_disk(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the session's disk thread, after what was given to it before."""
        with self._lock:
            if self._disk is None:
                self._disk = Workers("jax_client-disk", 1)
            return self._disk.submit(function)

    def save(self, path: str, state: Future[A], write: Callable[[A], T]) -> Future[T]:
        """Write `state` on the disk thread when it is there; the future resolves after the commit.

        The end of the program waits for it.
        """
        saved: Future[T] = Future()
        autosave.finish_at_exit(saved)
        with self._lock:
            self._saving[path] = cast("Future[object]", saved)
        saved.add_done_callback(lambda _: self._saved(path, saved))

        def start(done: Future[A]) -> None:
            try:
                link(self.on_disk(lambda: write(done.result())), saved)
            except BaseException as error:
                saved.set_exception(error)

        state.add_done_callback(start)
        return saved

    def _saved(self, path: str, saved: Future[T]) -> None:
        with self._lock:
            if self._saving.get(path) is saved:
                del self._saving[path]

    def read(self, path: str, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the disk thread, after a save of `path` that is still under way."""
        with self._lock:
            pending = self._saving.get(path)
        if pending is None:
            return self.on_disk(function)
        answer: Future[T] = Future()

        def start(_: Future[object]) -> None:
            try:
                link(self.on_disk(function), answer)
            except BaseException as error:
                answer.set_exception(error)

        pending.add_done_callback(start)
        return answer

    def is_saving(self, path: str) -> bool:
        """Return whether a save of `path` is under way."""
        with self._lock:
            return path in self._saving

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed is not None

    def check_open(self) -> None:
        """Raise SessionClosedError after `close`."""
        if self._closed is not None:
            raise SessionClosedError(
                f"ServiceClient is closed ({self._closed}), its models are unloaded. Make a new ServiceClient; "
                "create_training_client_from_state_with_optimizer continues from a saved checkpoint."
            )

    def close(self, status: Status, detail: str | None) -> Future[None]:
        """Refuse new requests, finish those in flight, give the models back. The first call decides the status."""
        with self._lock:
            if self._closing is not None:
                return self._closing
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            if self._closed is None:
                self._closed = f"{status} at {when}" + (f": {detail}" if detail else "")
                self._how = _ENDS[status], detail or ""
            functions, self._when_closing = self._when_closing, []
        for function in functions:
            function()
        with self._lock:
            if self._closing is not None:
                return self._closing
            pending = list(self._in_flight)
            if not pending and not self._resources.model_refs:
                self._closing = settled(None)
                return self._closing
            self._closing = background(lambda: self._finish(pending), "close")
            return self._closing

    def _finish(self, pending: list[Future[object]]) -> None:
        wait(pending)
        for function in self._at_close:
            function()
        if self._disk is not None:
            self._disk.close(wait=True)
        checkpointers = list(self._checkpointers)
        autosave.save_now(checkpointers)
        for checkpointer in checkpointers:
            checkpointer.end(*self._how)
        run_metrics.shared.finish()
        if self._store is not None and not self._store.flush_mirror(MIRROR_SECONDS):
            logger.warning("not every checkpoint in %s was copied to the mirror", self.state_dir)
        base_models.release_all(_take(self._resources))

    def describe(self) -> Description:
        """Return what the loaded engines say about themselves; the newest one's entries also at the top level."""
        with self._resources.lock:
            loads = [*self._resources.earlier, *self._resources.model_refs.values()]
        loaded = {ref.model: ref for load in loads if _is_loaded(load) for ref in [load.result()]}
        described = [
            model.engine.monitor.describe() | {"files_changed": not ref.is_current()} for model, ref in loaded.items()
        ]
        newest = described[-1] if described else {}
        try:
            home = str(self.state_dir)
        except BadRequestError as error:  # only what is saved needs one
            home = f"none: {error}"
        own: Description = {"session_id": self.session_id, "state_dir": home, "engines": described}
        if self.config.map_loss:
            own["mapped_losses"] = dict(self.config.map_loss)
        if self._store is not None:
            own |= self._store.describe()
        return {**newest, **own}


def state_dir(config: EngineConfig) -> Path:
    """Return where checkpoints live under `config`."""
    if config.state_dir is None:
        return default_state_dir()
    return places.expand(config.state_dir, "EngineConfig.state_dir").absolute()


def _take(resources: _Resources) -> list[Future[ModelRef]]:
    with resources.lock:
        model_refs = [*resources.model_refs.values(), *resources.earlier]
        resources.model_refs.clear()
        resources.earlier.clear()
    return model_refs


def _is_loaded(load: Future[ModelRef]) -> bool:
    return load.done() and load.exception() is None


def _drop(resources: _Resources) -> None:
    base_models.drop([*resources.model_refs.values(), *resources.earlier])
