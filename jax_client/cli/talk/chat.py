"""`jax_client chat`: how does one talk to a model? Line by line, on a terminal or through a pipe, with a history."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from jax_client.cli.options import reads_state
from jax_client.cli.talk.options import sampling_options
from jax_client.cli.talk.voice import Message, Voice, on_terminal, opened
from jax_client.config import DType

# Sampled at once, so that an answer appears as it grows: the engine gives whole answers only.
PIECE = 32
HELP = "/reset begins anew, /temperature X sets it, /quit ends (so does Ctrl-D); Ctrl-C stops an answer."


@click.command("chat")
@click.argument("name", metavar="PATH|MODEL")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@sampling_options
@reads_state
def chat(
    home: Path, name: str, system: str | None, max_tokens: int, temperature: float, seed: int | None, dtype: DType
) -> None:
    """Talk to a checkpoint (tinker://RUN/KIND/NAME) or a base model.

    Each line is a message; /reset, /temperature X and /quit are commands. Without a terminal every line of stdin is a
    message, and stdout has the answers alone. Where TINKER_BASE_URL is set, that server answers.
    """
    with opened(home, name, dtype, tells=True) as voice:
        conversation = Conversation(
            voice=voice, system=system, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        conversation.tokens()  # refuses a model without a template before anything is asked
        if sys.stdin.isatty():
            click.echo(f"{name}. {HELP}", err=True)
        for line in _lines():
            if line.startswith("/"):
                if not _command(conversation, line):
                    return
            elif line.strip():
                _answer(conversation, line)


@dataclass(kw_only=True, slots=True)
class Conversation:
    """What was said, and how the next answer is sampled."""

    voice: Voice
    system: str | None
    max_tokens: int
    temperature: float
    seed: int | None
    said: list[Message] = field(default_factory=list)

    def tokens(self) -> list[int]:
        """Return the prompt of the next answer."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.voice.encode_chat([*first, *(self.said or [{"role": "user", "content": ""}])])

    def forget_what_does_not_fit(self) -> int:
        """Drop the oldest messages until prompt and answer fit the context; return how many were dropped."""
        before, limit = len(self.said), self.voice.max_context
        while limit is not None and len(self.said) > 1 and len(self.tokens()) + self.max_tokens > limit:
            del self.said[:2]
        return before - len(self.said)

    def answer(self) -> Generator[str, None, None]:
        """Yield the next answer piece by piece, and add it to what was said; it ends early where the caller stops."""
        from tinker import types

        prompt, sampled, shown, stopped = self.tokens(), [], "", False
        try:
            while not stopped and len(sampled) < self.max_tokens:
                params = types.SamplingParams(
                    max_tokens=min(PIECE, self.max_tokens - len(sampled)),
                    temperature=self.temperature,
                    seed=None if self.seed is None else self.seed + len(sampled),
                )
                (piece,) = self.voice.ask([*prompt, *sampled], 1, params)
                sampled += piece.tokens
                stopped = piece.stop_reason == "stop"
                # A character of several tokens is whole when its last one is there.
                text = self.voice.decode(sampled)
                text = text if stopped else text.rstrip("\ufffd")
                yield text.removeprefix(shown)
                shown = text
            if not stopped:
                yield "…"
        finally:
            self.said.append({"role": "assistant", "content": shown})


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines, and has a history)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return


def _command(conversation: Conversation, line: str) -> bool:
    """Carry out a command; return whether the conversation continues."""
    word, _, value = line.strip().partition(" ")
    if word in ("/quit", "/exit"):
        return False
    if word == "/reset":
        conversation.said.clear()
        click.echo("begun anew", err=True)
    elif word == "/temperature":
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            click.echo(f"{value!r} is no temperature; give a number from 0 on, such as /temperature 0.7", err=True)
        else:
            conversation.temperature = number
            click.echo(f"temperature {number:g}", err=True)
    else:
        click.echo(f"{word} is no command. {HELP}", err=True)
    return True


def _answer(conversation: Conversation, line: str) -> None:
    from jax_client.errors import JaxClientError

    before = list(conversation.said)
    conversation.said.append({"role": "user", "content": line})
    dropped = conversation.forget_what_does_not_fit()
    if dropped:
        click.echo(f"({dropped} of the oldest messages no longer fit the context, and are left out)", err=True)
    terminal = sys.stdout.isatty()
    pieces = conversation.answer()
    try:
        for piece in pieces:
            click.echo(click.style(on_terminal(piece), fg="cyan") if terminal else piece, nl=False)
    except KeyboardInterrupt:
        if not terminal:
            raise
        click.echo(" (stopped)", nl=False, err=True)
    except JaxClientError as error:
        # As if it had not been asked; what was dropped for it is there, too.
        conversation.said[:] = before
        click.echo(f"error: {error}", err=True)
        if not terminal:
            raise
    finally:
        pieces.close()
    click.echo()
