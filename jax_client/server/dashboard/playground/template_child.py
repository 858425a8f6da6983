"""How is a chat template rendered? In this program, a process of its own with little time and memory.

A template comes with a model's files, from anyone. jinja's sandbox keeps it from Python's objects, not from loops
without end or texts without bounds; the limits of the process do. It reads {"template", "messages", "special"} as JSON
and writes {"text"} or {"error"}. Not to be imported.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import NoReturn

MAX_TEXT = 2**20
CPU_SECONDS, MEMORY_BYTES = 4, 512 * 2**20


def _limit() -> None:
    try:
        import resource
    except ImportError:  # the parent's time limit is left
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def _render(asked: dict[str, object]) -> str:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what a model says, for training; here it is what stands in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def as_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **more: object) -> str:
        separators = more.get("separators")
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=tuple(separators) if isinstance(separators, list | tuple) else None,  # type: ignore[arg-type]
            sort_keys=bool(more.get("sort_keys")),
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    special = asked["special"]
    values = {
        **(special if isinstance(special, dict) else {}),
        "messages": asked["messages"],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    text, size = [], 0
    for piece in environment.from_string(str(asked["template"])).generate(values):
        size += len(piece)
        if size > MAX_TEXT:
            raise ValueError(f"the text is longer than {MAX_TEXT:,} characters")
        text.append(piece)
    return "".join(text)


def main() -> None:
    """Render what stdin asks for."""
    asked = json.load(sys.stdin)
    _limit()
    try:
        answer = {"text": _render(asked)}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
