"""What is in a model directory in Hugging Face layout? A config and safetensors; pickles and code are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from jax_client.errors import BadRequestError, NotFoundError, UnsupportedError
from jax_client.models.families.hf_config import eos_ids
from jax_client.models.families.registry import SUPPORTED_ARCHITECTURES
from jax_client.models.quantization import read_quantization
from jax_client.values import JsonObject
from jax_client.weights.read import safetensors
from jax_client.weights.read.quantized.reader import QuantizedReader
from jax_client.weights.read.tensors import TensorInfo, TensorReader
from jax_client.weights.towers import TowerReader, tower_of

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Where transformers keeps the chat templates that have names, such as "tool_use".
NAMED_TEMPLATES = "additional_chat_templates"
MAX_JSON_BYTES = 64 * 2**20


class HfReader:
    """The tensors of a directory's shards, as views of the mapped files."""

    supported_dtypes = tuple(safetensors.NUMPY_DTYPES)

    def __init__(self, directory: Path) -> None:
        """Read and check every shard's header; no tensor is read.

        Raises:
            BadRequestError: a shard is damaged, missing, outside the directory, or not the one that the index names.
        """
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, safetensors.Entry]] = {}
        index = _weight_map(directory)
        for shard in shards(directory):
            for name, entry in safetensors.read_header(shard).items():
                if name in self._places:
                    raise BadRequestError(f"{shard}: tensor {name} is also in {self._places[name][0].name}.")
                self.tensors[name] = TensorInfo(shape=entry.shape, dtype=entry.dtype, file=str(shard))
                self._places[name] = (shard, entry)
        for name, file in index.items():
            if name not in self._places or self._places[name][0].name != file:
                raise BadRequestError(
                    f"{directory / INDEX}: tensor {name} should be in {file}, but is not. {safetensors.AGAIN}"
                )

    def read(self, name: str) -> np.ndarray:
        """Return a lazy view of one tensor in the file's own dtype, one of `safetensors.STORED_DTYPES`."""
        return safetensors.view(*self._places[name])

    def read_expert(self, name: str, expert: int) -> np.ndarray:
        """Return `read(name)[expert]`, a lazy view."""
        return self.read(name)[expert]


def open_weights(directory: Path, dtype: DTypeLike = np.float32) -> TensorReader:
    """Open a directory's shards; of a quantised release, as the tensors that its codes and scales stand for.

    Of a model with several towers the reader shows the text model's, see `weights.towers`.

    Args:
        directory: with a config.json.
        dtype: that FP8 weights are read in. Others are read as they are stored.

    Raises:
        BadRequestError: as `HfReader`; codes and scales that do not fit each other; a tensor of no tower.
        UnsupportedError: a quantised format that is not read.
    """
    config = read_json(directory, CONFIG)
    quantization, tower = read_quantization(config, str(directory / CONFIG)), tower_of(config)
    files: TensorReader = HfReader(directory)
    if quantization is not None:
        files = QuantizedReader(files, quantization, dtype)
    return files if tower is None else TowerReader(files, tower)


def has_weights(directory: Path) -> bool:
    """Return whether the directory holds any file that looks like weights."""
    suffixes = (".safetensors", ".gguf", *PICKLES)
    return (directory / INDEX).exists() or any(p.suffix in suffixes for p in directory.iterdir())


def is_complete(directory: Path) -> bool:
    """Return whether config.json and every shard are there; used where an incomplete directory is not an error yet."""
    try:
        return (directory / CONFIG).is_file() and all(s.is_file() for s in shards(directory))
    except (BadRequestError, NotFoundError):
        return False


def check_directory(directory: Path) -> None:
    """Raise unless the directory has the files of a model that may be loaded.

    Raises:
        NotFoundError: no config.json or no weights; says what was looked for and what is there.
        UnsupportedError: pickled weights only, or custom code.
        BadRequestError: config.json or the index is damaged, or a file lies outside the directory.
    """
    if not (directory / CONFIG).is_file():
        raise NotFoundError(f"{directory}: looked for {CONFIG} and .safetensors files; {_listing(directory)}")
    check_code(read_json(directory, CONFIG), str(directory))
    shards(directory)


def check_code(config: JsonObject, where: str) -> None:
    """Raise UnsupportedError for a config that asks for code of the model's repository."""
    if "auto_map" in config:
        raise UnsupportedError(
            f"{Path(where) / CONFIG}: 'auto_map' asks for code from the model's repository; custom code is never "
            f"executed. Supported architectures are {', '.join(SUPPORTED_ARCHITECTURES)}."
        )


def shards(directory: Path) -> list[Path]:
    """Return the weight files, as the index lists them or the single one.

    Raises: as `check_directory`.
    """
    if (directory / INDEX).exists():
        files = sorted({file if isinstance(file, str) else repr(file) for file in _weight_map(directory).values()})
        where = f"{directory / INDEX}: it names"
    elif (directory / SINGLE).exists():
        files, where = [SINGLE], f"{directory}: it holds"
    else:
        raise _no_weights(directory)
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BadRequestError(f"{where} the shard {file!r}; a shard is a .safetensors file in the same directory.")
        if not (directory / file).exists():
            raise BadRequestError(f"{where} the shard {file!r}, which is not there. Download the model again.")
        inside(directory, file)
        if not (directory / file).is_file():
            raise BadRequestError(f"{where} the shard {file!r}, which is no file. Download the model again.")
    return [directory / file for file in files]


def inside(directory: Path, file: str) -> Path:
    """Return the path of a file, refusing a link that leads out of the directory.

    The hub cache's snapshots link into the blobs of the same model; those links are let through.

    Raises:
        BadRequestError: the file is elsewhere.
    """
    root = directory.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    target = (directory / file).resolve()
    if not target.is_relative_to(root):
        raise BadRequestError(
            f"{directory}: {file!r} is a link to {target}, outside the directory; copy the file into the directory."
        )
    return directory / file


def read_json(directory: Path, file: str) -> JsonObject:
    """Read a JSON object.

    Raises:
        BadRequestError: not JSON, not an object, too large, or outside the directory.
    """
    path = inside(directory, file)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise BadRequestError(f"{path}: {size} bytes, more than the limit of {MAX_JSON_BYTES} for such a file.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"{path}: not valid JSON ({error}); download the file again.") from None
    if not isinstance(value, dict):
        raise BadRequestError(f"{path}: it holds {type(value).__name__}, expected an object; download the file again.")
    return value


def read_hf_config(directory: Path) -> JsonObject:
    """Return config.json; the end-of-sequence ids are joined with those of generation_config.json.

    An instruct model's end-of-turn id is often in the latter alone.
    """
    config = read_json(directory, CONFIG)
    if not (directory / GENERATION).is_file():
        return config
    generation = read_json(directory, GENERATION)
    ids = [*eos_ids(config, str(directory / CONFIG)), *eos_ids(generation, str(directory / GENERATION))]
    return {**config, "eos_token_id": list(dict.fromkeys(ids))}


def _weight_map(directory: Path) -> JsonObject:
    if not (directory / INDEX).exists():
        return {}
    weight_map = read_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadRequestError(
            f"{directory / INDEX}: 'weight_map' is {weight_map!r:.80}; expected tensor names to files."
        )
    return weight_map


def _no_weights(directory: Path) -> Exception:
    names = sorted(p.name for p in directory.iterdir())
    if pickles := [n for n in names if n.endswith(PICKLES)]:
        return UnsupportedError(
            f"{directory}: pickle weights are not loaded ({pickles[0]}): reading them runs code from the file. Convert "
            'them where you trust the source: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        )
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        return NotFoundError(f"{directory}: looked for {SINGLE} or {INDEX}; for the GGUF give {directory / ggufs[0]}.")
    return NotFoundError(f"{directory}: looked for {SINGLE} or {INDEX}; {_listing(directory)}")


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    if not names:
        return "the directory is empty. Give the directory that holds the model's files."
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are {', '.join(names[:8])}{more}. Give the directory that holds the model's files."
