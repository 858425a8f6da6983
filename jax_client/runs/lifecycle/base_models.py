"""Which base models are loaded in this process, and who uses them?

One engine serves all sessions that ask for the same files with the same settings. The last release closes it. Files
that are written anew are another model.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

from jax_client import interpreter_end, process
from jax_client.config import EngineConfig
from jax_client.errors import BadRequestError, NotFoundError
from jax_client.process import Step
from jax_client.threads import start_thread
from jax_client.weights.decoder import Decoder
from jax_client.weights.read.identity import Stamp, identity, stamp
from jax_client.weights.read.progress import Progress, observed
from jax_client.weights.read.source import ModelSource, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from jax_client.engine.protocol import Engine

logger = logging.getLogger(__name__)


def open_engine(source: ModelSource, config: EngineConfig) -> tuple[Engine, str]:
    """Load the weights onto the devices, and onto those of samplers; return the engine and the weights' fingerprint."""
    # Imported here: a process that never loads a model must not initialise a backend.
    from jax_client.engine import engine
    from jax_client.weights.read.identity import fingerprint

    if not config.samplers:
        return engine.Engine(source, config), fingerprint(source)
    from jax_client.engine.hosts.samplers.engine import open_with_samplers

    weights = fingerprint(source)
    return open_with_samplers(source, weights, config, lambda: engine.Engine(source, config)), weights


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load the tokenizer that belongs to the weights."""
    from jax_client.weights.read.tokenizer import load_tokenizer as load

    return load(source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """How base models get into this process. The tests give one whose engines need neither files nor devices.

    Attributes:
        resolve: `f(name) -> ModelSource`.
        open_engine: `f(source, config) -> (engine, fingerprint of the weights)`.
        load_tokenizer: `f(source) -> tokenizer`.
        stamp: `f(source) -> stamp of the files`; equal ones mean equal files.
        identity: `f(source) -> name of the files as they are now`; asked where the stamp is another.
    """

    resolve: Callable[[str], ModelSource] = resolve
    open_engine: Callable[[ModelSource, EngineConfig], tuple[Engine, str]] = open_engine
    load_tokenizer: Callable[[ModelSource], PreTrainedTokenizerFast] = load_tokenizer
    stamp: Callable[[ModelSource], Stamp | None] = stamp
    identity: Callable[[ModelSource], str] = identity


class BaseModel:
    """A loaded base model: its engine, its identity, and its tokenizer on demand."""

    def __init__(self, source: ModelSource, engine: Engine, fingerprint: str, loader: Loader) -> None:
        self.source = source
        self.engine = engine
        self.fingerprint = fingerprint
        self._loader = loader
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._lock = threading.Lock()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the model's tokenizer, loaded on first use and then shared."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._loader.load_tokenizer(self.source)
            return self._tokenizer

    @property
    def decode(self) -> Decoder:
        """Turns token ids into text, special tokens included, in samplers too. Made anew: it refers to this model."""
        return Decoder(self.source, self.tokenizer)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """The right to use a base model until `release`.

    Attributes:
        name: what the session calls it.
        source: the files that the name meant when it was resolved.
        key: of the loaded model.
    """

    name: str
    source: ModelSource
    key: _Key
    model: BaseModel
    models: BaseModels

    def retain(self) -> None:
        """Count one more user of the model; each user calls `release`."""
        self.models.retain(self)

    def release(self) -> None:
        """Release the model. The last release closes its engine, and waits for that."""
        self.models.release(self)

    def is_current(self) -> bool:
        """Return whether the files are those that were loaded, or are gone, so that there are no others."""
        return self.models.is_current(self)


@dataclass(slots=True)
class _Entry:
    model: Future[BaseModel] = field(default_factory=Future)
    users: int = 0
    progress: Progress = field(default_factory=lambda: Progress(stage="loading"))

    def set_progress(self, progress: Progress) -> None:
        self.progress = progress


_Key = tuple[object, ...]


class BaseModels:
    """The base models by their files and settings, each with the number of its users. Thread-safe.

    Args:
        loader: how a model is loaded.
    """

    def __init__(self, loader: Loader | None = None) -> None:
        self._loader = loader or Loader()
        self._entries: dict[_Key, _Entry] = {}
        # The same entries by requested name, while the name is being resolved to files.
        self._named: dict[_Key, _Entry] = {}
        self._identities: dict[str, tuple[Stamp | None, str]] = {}  # of the files at a path
        self._lock = threading.Lock()
        _registries.add(self)

    def acquire(self, name: str, config: EngineConfig) -> ModelRef:
        """Find or load the base model `name`; waits for the load.

        Raises:
            NotFoundError: there is no such model.
            BadRequestError: the model or the mesh is not supported, or the files were written while they were read.
        """
        settings, new = _settings(config), _Entry()
        called = (name, *settings)
        _start_janitor()
        with self._lock:
            self._named.setdefault(called, new)
        # A download or a load takes minutes and cannot be told to end.
        with observed(new.set_progress), process.not_waited_for():
            try:
                source = self._loader.resolve(name)
                # Links and relative names lead to one copy of the weights too.
                key = (*self._identify(source), *settings)
            except BaseException:
                with self._lock:
                    self._forget_names(new)
                raise
            with self._lock:
                entry = self._named[called] = self._entries.setdefault(key, new)
                entry.users += 1
                older = [each for each in self._entries if each[0] == key[0] and each[2:] == key[2:] and each != key]
            if entry is new:
                if older:
                    logger.warning(
                        "%s was written anew since %d earlier version(s) of it were loaded. Both stay in memory until "
                        "the clients of the earlier ones are closed, which keep the earlier weights.",
                        source.path,
                        len(older),
                    )
                try:
                    entry.model.set_result(self._load(source, config, key))
                except BaseException as error:
                    # Forgotten, not cached: the next call may find the file that was missing.
                    with self._lock:
                        self._entries.pop(key, None)
                        self._forget_names(entry)
                    entry.model.set_exception(error)
        return ModelRef(name=name, source=source, key=key, model=entry.model.result(), models=self)

    def _load(self, source: ModelSource, config: EngineConfig, key: _Key) -> BaseModel:
        engine, fingerprint = self._loader.open_engine(source, config)
        if self._identify(source) != key[:2]:
            engine.close()
            raise BadRequestError(f"{source.path} was written while it was read; nothing was loaded. Load it again.")
        return BaseModel(source, engine, fingerprint, self._loader)

    def _identify(self, source: ModelSource) -> tuple[str, str]:
        """Return where the files of a model lie, without links, and what they are."""
        path, now = os.path.realpath(source.path), self._loader.stamp(source)
        known = self._identities.get(path)
        if known is None or now is None or known[0] != now:
            # The stamp is the older of the two: what changes in between has another stamp the next time.
            known = self._identities[path] = now, self._loader.identity(source)
        return path, known[1]

    def is_current(self, model_ref: ModelRef) -> bool:
        """Return whether a model's files are those that were loaded, or are gone, so that there are no others."""
        try:
            return self._identify(model_ref.source) == model_ref.key[:2]
        except (OSError, BadRequestError, NotFoundError):
            return True

    def loading(self, name: str, config: EngineConfig) -> Progress | None:
        """Return how far the load of a base model is; None when it is loaded, or was never requested."""
        entry = self._named.get((name, *_settings(config)))
        return None if entry is None or entry.model.done() else entry.progress

    def progress(self, name: str, config: EngineConfig, kind: str | None = None) -> str | None:
        """Return what requests of a base model wait for, such as "loading 4.1/8.0 GB" or "compiling forward (8x512)".

        Takes no lock: it may be asked at any rate, by any thread.

        Args:
            name: of the base model.
            config: the settings that it was requested with.
            kind: "sample" or "train", of the requests; None for both.

        Returns:
            None where they wait for neither: the model is loaded, or was never requested.
        """
        entry = self._named.get((name, *_settings(config)))
        if entry is None:
            return None
        if not entry.model.done():
            return str(entry.progress)
        if entry.model.exception() is not None:
            return None
        for each in entry.model.result().engine.monitor.health()["compiling"]:
            if each["cause"] != "background" and kind in (None, each["kind"]):
                return f"compiling {each['program']} ({each['shapes']})"
        return None

    def loaded(self) -> list[BaseModel]:
        """Return the loaded base models; waits for none that is being loaded."""
        with self._lock:
            models = [entry.model for entry in self._entries.values()]
        return [model.result() for model in models if model.done() and model.exception() is None]

    def retain(self, model_ref: ModelRef) -> None:
        """Count one more user of a model."""
        with self._lock:
            self._entries[model_ref.key].users += 1

    def release(self, model_ref: ModelRef) -> None:
        """Take one user from a model; close its engine after the last one, and wait for that."""
        with self._lock:
            entry = self._entries.get(model_ref.key)
            if entry is None or entry.model.result() is not model_ref.model:
                return
            entry.users -= 1
            if entry.users:
                return
            del self._entries[model_ref.key]
            self._forget_names(entry)
        model_ref.model.engine.close()

    def keep_in_fork(self) -> None:
        """Forget the parent's engines, which do not run here, without freeing them."""
        interpreter_end.keep_in_fork(self._entries.copy(), self._named.copy())
        self._lock = threading.Lock()
        self._entries.clear()
        self._named.clear()

    def _forget_names(self, entry: _Entry) -> None:
        """With the lock held."""
        for called in [called for called, each in self._named.items() if each is entry]:
            del self._named[called]


_registries: weakref.WeakSet[BaseModels] = weakref.WeakSet()
# Those of every session that is not given others.
shared = BaseModels()
_lock = threading.Lock()
# The models of sessions that were dropped without close(). A destructor may run inside any allocation, with any lock
# held, so it only puts here (SimpleQueue.put is re-entrant); the janitor's thread releases. None ends that thread.
_dropped: SimpleQueue[list[Future[ModelRef]] | None] = SimpleQueue()
_janitor: threading.Thread | None = None


def release_all(model_refs: list[Future[ModelRef]]) -> None:
    """Release base models that are loaded or still loading; waits for them."""
    for future in model_refs:
        if future.exception() is None:
            future.result().release()


def drop(model_refs: list[Future[ModelRef]]) -> None:
    """Release base models soon, on another thread; for destructors."""
    if model_refs:
        _dropped.put(model_refs)


def _start_janitor() -> None:
    global _janitor
    with _lock:
        if _janitor is None:
            _janitor = start_thread("jax_client-janitor", _release_dropped)


def _release_dropped() -> None:
    while (model_refs := _dropped.get()) is not None:
        try:
            release_all(model_refs)
        except Exception:
            logger.exception("an engine that nobody uses any more could not be closed")
        del model_refs  # a thread that waits must not keep the last engine


def _end_janitor() -> None:
    _dropped.put(None)


def _after_fork() -> None:
    global _lock, _dropped, _janitor
    interpreter_end.keep_in_fork(_dropped)
    _lock, _dropped, _janitor = threading.Lock(), SimpleQueue(), None
    for registry in list(_registries):
        registry.keep_in_fork()


process.register(
    "base models",
    "the engines by their weights and settings, and the thread that closes those that nobody uses any more",
    at_exit={Step.ENGINES: _end_janitor},
    after_fork=_after_fork,
)


def _settings(config: EngineConfig) -> tuple[object, ...]:
    mesh = tuple(sorted(config.mesh.items())) if isinstance(config.mesh, Mapping) else config.mesh
    cache = None if config.compilation_cache_dir is None else str(config.compilation_cache_dir)
    own = config.max_tokens_per_micro_batch, config.remat, config.memory_fraction, config.precompile
    spread = config.on_several_hosts, config.samplers
    return config.dtype, mesh, cache, *own, *spread
