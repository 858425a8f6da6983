"""Which tokens is a chat? Those of the text that the tokenizer's own template makes of the messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax_client.errors import BadRequestError, RequestFailedError, UnsupportedError, shown
from jax_client.values import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS = 10.0
MOST_MESSAGES, MAX_TEMPLATE = 200, 2**20
ROLES = ("system", "user", "assistant", "tool", "developer")
_CHILD = Path(__file__).with_name("template_child.py")


def chat_tokens(tokenizer: PreTrainedTokenizerFast, messages: Sequence[JsonObject]) -> list[int]:
    """Return the tokens of a conversation, up to where the model answers.

    Args:
        tokenizer: the model's.
        messages: as `checked_messages` returns them.

    Raises:
        UnsupportedError: the tokenizer has no template.
        BadRequestError: the template refuses the messages, or takes too long.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise UnsupportedError("this model has no chat template; give a prompt in place of messages.")
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    text = rendered(template, messages, special)
    return list(tokenizer.encode(text, add_special_tokens=False))


def checked_messages(value: object) -> list[JsonObject]:
    """Return messages of role and content. Raises BadRequestError."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise BadRequestError(f"messages is {shown(value)}; give a list of 1 to {MOST_MESSAGES} messages.")
    found: list[JsonObject] = []
    for index, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise BadRequestError(
                f"messages[{index}] is {shown(message)}; give role and content, the role one of {', '.join(ROLES)}."
            )
        found.append({"role": role, "content": content})
    return found


def rendered(template: str, messages: Sequence[JsonObject], special: JsonObject, seconds: float = SECONDS) -> str:
    """Return the text that a template makes, rendered in another process, within limits.

    Args:
        template: jinja's, of the model's files.
        messages: of the conversation.
        special: the tokenizer's special tokens by their names.
        seconds: the limit.

    Raises:
        BadRequestError: it fails, or goes over a limit.
        RequestFailedError: no process can be started.
    """
    if len(template) > MAX_TEMPLATE:
        raise BadRequestError(f"the chat template has {len(template):,} characters; the limit is {MAX_TEMPLATE:,}.")
    asked = json.dumps({"template": template, "messages": list(messages), "special": special})
    # -P: the folder of the program is not searched for modules. No secrets of this process's environment.
    command = [sys.executable, "-P", str(_CHILD)]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "PYTHONHOME", "LANG") if name in os.environ}
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, encoding="utf-8", timeout=seconds, env=kept
        )
    except subprocess.TimeoutExpired:
        raise BadRequestError(f"the model's chat template takes longer than {seconds:.0f} s; give a prompt.") from None
    except OSError as error:
        raise RequestFailedError(f"the chat template cannot be rendered: {error}.", category="server") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise BadRequestError(
            "the model's chat template goes over its limit of time or memory; give a prompt."
        ) from None
    if "error" in answer:
        raise BadRequestError(f"the model's chat template refuses this conversation ({answer['error']}).")
    return str(answer["text"])
