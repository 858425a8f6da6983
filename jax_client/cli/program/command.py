"""How is a command line read that ends in a program? Options stand before the first `--`, the program behind it."""

from __future__ import annotations

import click

# Of `click.command`: a word ends the options, so that the message can name it.
CONTEXT = {"allow_extra_args": True, "allow_interspersed_args": False}
METAVAR = "[OPTIONS] -- PROGRAM [ARGUMENT]..."


class ProgramCommand(click.Command):
    """A command with options of its own and, behind the first `--`, a program with its arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options, and leave the program in `ctx.args`."""
        end = args.index("--") if "--" in args else len(args)
        words = super().parse_args(ctx, args[: end + 1])
        if words:
            self.refuse_word(ctx, words[0])
        ctx.args = args[end + 1 :]
        return ctx.args

    def refuse_word(self, ctx: click.Context, word: str) -> None:
        """Fail, because a word that is no option stands before the program."""
        ctx.fail(f"{word!r} is no option; a program stands behind --, as in '{ctx.info_name} -- {word}'.")
