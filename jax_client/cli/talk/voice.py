"""Who answers, `sample` and `chat` ask? An engine of this process, or the server that TINKER_BASE_URL names.

A `Voice` has the tokenizer and the sampling client of a checkpoint or a base model. The state directory is read only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jax_client.config import DType, EngineConfig
from jax_client.errors import BadRequestError

if TYPE_CHECKING:
    import tinker
    from tinker import types
    from transformers import PreTrainedTokenizerBase

    from jax_client.runs.lifecycle.sampler_handle import SamplerHandle
    from jax_client.runs.lifecycle.session import Session

SERVER = "TINKER_BASE_URL"
SCHEME = "tinker://"
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """A model that answers.

    Attributes:
        name: of the checkpoint or the base model.
        sampler: the sampling client.
        tokenizer: of the base model.
        max_context: tokens of a prompt and its answer, None where a server does not say.
    """

    name: str
    sampler: tinker.SamplingClient
    tokenizer: PreTrainedTokenizerBase
    max_context: int | None = None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self.tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where the model speaks.

        Raises:
            click.UsageError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise click.UsageError(
                f"the tokenizer of {self.name} has no chat template: it is no model for conversations. "
                "'jax_client sample' without --chat lets it continue a text."
            )
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of sampled tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def ask(
        self, tokens: Sequence[int], num_samples: int, params: types.SamplingParams
    ) -> Sequence[types.SampledSequence]:
        """Return what follows the tokens; Ctrl-C ends the sampling."""
        from tinker import types

        future = self.sampler.sample(types.ModelInput.from_ints(list(tokens)), num_samples, params)
        try:
            return future.result().sequences
        except KeyboardInterrupt:
            future.future().cancel()
            raise


@contextlib.contextmanager
def opened(home: Path, name: str, dtype: DType, *, tells: bool) -> Iterator[Voice]:
    """Open a checkpoint or a base model until the body ends.

    Args:
        home: the state directory.
        name: `tinker://RUN/weights/NAME`, `tinker://RUN/sampler_weights/NAME`, or a model's name, directory or file.
        dtype: of the weights, in this process.
        tells: whether stderr says what is loaded and compiled.

    Raises:
        JaxClientError: there is no such checkpoint or model, or it cannot be loaded.
        click.ClickException: the devices are another process's.
    """
    if url := os.environ.get(SERVER):
        click.echo(f"{name} answers on the server {url} ({SERVER})", err=True)
        with _on_server(name) as voice:
            yield voice
    else:
        with _here(home, name, dtype, tells=tells) as voice:
            yield voice


@contextlib.contextmanager
def _on_server(name: str) -> Iterator[Voice]:
    import tinker

    with tinker.ServiceClient() as service:
        if name.startswith(SCHEME):
            sampler = service.create_sampling_client(model_path=name).result()
        else:
            sampler = service.create_sampling_client(base_model=name).result()
        base = name if not name.startswith(SCHEME) else sampler.get_base_model()
        yield Voice(name=name, sampler=sampler, tokenizer=_local_tokenizer(base) or sampler.get_tokenizer())


def _local_tokenizer(base_model: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model whose files are on this machine; None lets the SDK fetch it."""
    from jax_client.weights.read.source import local_models, resolve
    from jax_client.weights.read.tokenizer import read_tokenizer

    if Path(base_model).exists() or base_model in local_models():
        return read_tokenizer(resolve(base_model))
    return None


@contextlib.contextmanager
def _here(home: Path, name: str, dtype: DType, *, tells: bool) -> Iterator[Voice]:
    from jax_client.checkpoint.disk import run_lock
    from jax_client.clients.sampling import SamplingClient
    from jax_client.runs import progress
    from jax_client.runs.lifecycle.futures import background
    from jax_client.runs.lifecycle.session import Session

    holder = run_lock.lock_holder(home)
    if holder is not None:
        click.echo(
            f"a server (process {holder.pid} on {holder.host}) has {home}, and may have the devices; set {SERVER} to "
            "the URL that it printed to ask it.",
            err=True,
        )
    config = EngineConfig(
        state_dir=home, dtype=dtype, progress=tells, precompile=False, autosave_minutes=None, record_metrics=False
    )
    session = Session(config, tells=progress.wanted(config), read_only=True)
    try:
        handle = session.track(background(lambda: _sampler(session, name), "sampler")).result()
        model = handle.model_ref.model
        yield Voice(
            name=name,
            sampler=SamplingClient(handle),  # type: ignore[arg-type]  (it is registered as the SDK's class)
            tokenizer=model.tokenizer(),
            max_context=model.engine.model.max_context,
        )
    except RuntimeError as error:
        if "initialize backend" not in str(error):
            raise
        raise click.ClickException(
            f"the devices cannot be used ({str(error).splitlines()[0]}); another process may have them. If that is a "
            f"server, set {SERVER} to its URL, else 'jax_client doctor' names the process."
        ) from error
    finally:
        session.close("success", None).result()


def _sampler(session: Session, name: str) -> SamplerHandle:
    from jax_client.runs.lifecycle.sampler_handle import base_sampler, checkpoint_sampler
    from jax_client.values import CheckpointKey

    if not name.startswith(SCHEME):
        return base_sampler(session, name)
    path = CheckpointKey.parse(name)
    if path.kind == "external_weights":
        raise BadRequestError(
            f"{path} is an export for other programs; give the path of save_state or of save_weights_for_sampler."
        )
    return checkpoint_sampler(session, path)


def on_terminal(text: str) -> str:
    """Return a model's text for a terminal: what could move the cursor or change colours is escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
