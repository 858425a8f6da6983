"""How does a checkpoint leave as files that other programs load, and how does an adapter of theirs come in?

An export is written beside its place, checked, and renamed when it is whole and durable: a directory of that name is a
complete export or none.
"""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jax_client.checkpoint.disk import files
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.host import places
from jax_client.runs import checks
from jax_client.runs.lifecycle import base_models
from jax_client.runs.results import api_records
from jax_client.values import CheckpointKey
from jax_client.weights.read.source import resolve

if TYPE_CHECKING:
    from jax_client.checkpoint.store import CheckpointStore
    from jax_client.config import EngineConfig
    from jax_client.runs.lifecycle.export_check import ExportCheck
    from jax_client.values import AdapterState
    from jax_client.weights.write.peft import Program

logger = logging.getLogger(__name__)

Format = Literal["peft", "merged"]
DType = Literal["bfloat16", "float32"]
# Most bytes of a weight file of a merged model, as transformers' own default.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was exported.

    Attributes:
        directory: where to.
        files, size_bytes: of it.
        check: how its logits, read back, compare with the checkpoint's; None if there was not the memory for that.
        unchecked: why there was no check, "" if there was.
    """

    directory: Path
    files: int
    size_bytes: int
    check: ExportCheck | None
    unchecked: str = ""


def export_checkpoint(
    store: CheckpointStore,
    path: CheckpointKey,
    output: Path,
    format: Format,
    dtype: DType,
    config: EngineConfig,
    program: Program | None = None,
) -> ExportReport:
    """Write a checkpoint's adapter, alone or merged into its base model, and check what it computes.

    Args:
        store: where the checkpoint is.
        path: of kind weights or sampler_weights.
        output: a directory that is not there yet, or empty.
        format: "peft" is an adapter in float32, "merged" a model in Hugging Face layout.
        dtype: of a merged model.
        config: of the engine that checks.
        program: what will load a "peft" export; None may be any. Some adapters are exact in certain programs only.

    Raises:
        NotFoundError: there is no such checkpoint, or its base model is not found.
        BadRequestError: `output` is taken; the base model is not the one that the checkpoint was trained on.
        UnsupportedError: this adapter has no such form.
        RequestFailedError: the checkpoint is damaged, the disk failed, or the export computes something else.

        Whichever it is, nothing is left at `output`.
    """
    output = places.expand(output, "output").absolute()
    refuse_taken(output)
    base_model = api_records.base_model(store.record(path).metadata)
    # Imported here, as all that imports jax: most commands do without.
    from jax_client.weights.read.identity import fingerprint
    from jax_client.weights.read.load import read_config
    from jax_client.weights.write.merged import write_merged
    from jax_client.weights.write.peft import write_adapter

    source = resolve(base_model)
    state, record = store.load(path)
    if fingerprint(source) != record.metadata["base_fingerprint"]:
        raise BadRequestError(
            f"checkpoint {path} was trained on other weights than {source.path} holds now; nothing was exported. Put "
            f"the files of {base_model!r} back as they were."
        )
    model = read_config(source)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.temporary_directory(output.parent) as temporary:
            # One more level: the temporary directory is closed to others, an export is as open as the user's files are.
            directory = temporary / output.name
            os.mkdir(directory)
            if format == "peft":
                write_adapter(directory, state, model, base_model, program)
            else:
                write_merged(directory, source, model, state, dtype=dtype, shard_bytes=SHARD_BYTES)
            files.fsync_tree(directory)
            check, unchecked = _check(base_model, config, state, directory, output)
            sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
            files.move(directory, output)
    except OSError as error:
        raise RequestFailedError(
            f"{output} was not written: {error}. Check that {output.parent} is writable and has room."
        ) from error
    return ExportReport(directory=output, files=len(sizes), size_bytes=sum(sizes), check=check, unchecked=unchecked)


def refuse_taken(output: Path) -> None:
    """Raise BadRequestError unless a path is free for a new directory: not there, or an empty directory."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        kind = "a directory with files in it" if output.is_dir() else "no directory"
        raise BadRequestError(f"{output} is there already and is {kind}; give a new directory, or empty this one.")


def _check(
    base_model: str, config: EngineConfig, state: AdapterState, directory: Path, output: Path
) -> tuple[ExportCheck | None, str]:
    from jax_client.runs.lifecycle.export_check import check_export

    try:
        model_ref = base_models.shared.acquire(base_model, config)
        try:
            return check_export(model_ref.model.engine, state, directory), ""
        finally:
            model_ref.release()
    except RequestFailedError as error:
        text = error.message.replace(str(directory), str(output))
        # The files may be wanted for a machine that has the memory which this one lacks.
        if error.category == "user":
            return None, text
        raise RequestFailedError(f"nothing was exported: {text}") from error


def import_adapter(store: CheckpointStore, directory: Path, base_model: str, name: str) -> CheckpointKey:
    """Make a PEFT adapter a checkpoint of a new run: to sample from, or to train on with a fresh optimizer.

    Args:
        store: where to.
        directory: with adapter_config.json and adapter_model.safetensors.
        base_model: that the adapter was trained on.
        name: of the new checkpoint, of kind weights.

    Returns:
        The path of the checkpoint.

    Raises:
        BadRequestError, NotFoundError: a malformed name; no such model; files that are damaged, missing or do not fit.
        UnsupportedError: the adapter is more than LoRA on linear layers.
        RequestFailedError: the disk failed.
    """
    checks.checkpoint_name(name)
    from jax_client.weights.read import hf
    from jax_client.weights.read.identity import fingerprint
    from jax_client.weights.read.load import open_tensors, read_config
    from jax_client.weights.write.peft import read_adapter
    from jax_client.weights.write.peft_config import CONFIG

    source = resolve(base_model)
    state = read_adapter(directory, read_config(source), open_tensors(source))
    trained_on = hf.read_json(directory, CONFIG).get("base_model_name_or_path")
    if trained_on and trained_on not in (base_model, source.lasting_name):
        logger.warning(
            "%s says that the adapter was trained on %s. It fits %s, but computes something else if the weights differ",
            directory / CONFIG,
            trained_on,
            base_model,
        )
    session_id = str(uuid.uuid4())
    path = CheckpointKey(f"{session_id}:train:0", "weights", name)
    run = api_records.run_metadata(
        session_id=session_id,
        base_model=source.lasting_name,
        spec=state.spec,
        user_metadata=None,
        project_id=None,
        display_name=None,
        session_metadata=None,
    )
    saved = api_records.checkpoint_metadata(
        source.lasting_name,
        fingerprint(source),
        state.spec,
        step=state.step,
        optimizer=None,
        user_metadata=None,
    )
    store.put_run(path.run_id, run)
    store.save(key=path, state=state, metadata=saved)
    return path
