"""What do `jax_client sample` and `chat` say? What the SDK's sample gives, and nothing else on stdout."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jax_client
from jax_client import types
from jax_client.checkpoint.disk import run_lock
from jax_client.cli.talk import chat
from jax_client.cli.talk.voice import on_terminal
from jax_client.errors import RequestFailedError
from jax_client.server.state.server import Server
from support.server.serving import KEY, Running, write_model

pytestmark = pytest.mark.usefixtures("clean_environment", "in_float32")
ANSWER = ["--max-tokens", "6", "--seed", "3"]


@pytest.fixture
def in_float32(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in the dtype of the tests' servers."""
    monkeypatch.setenv("JAX_CLIENT_DTYPE", "float32")


@pytest.fixture(scope="module")
def running(trained: Any) -> Iterator[Running]:
    """A server, which is made before a test captures its output: uvicorn closes the handler of absl's log."""
    server = Running(Server(trained.settings))
    yield server
    server.stop()


def by_the_sdk(trained: Any, text: str, path: str | None, **params: Any) -> list[Any]:
    with jax_client.ServiceClient(config=trained.settings) as service:
        of = {"base_model": trained.model} if path is None else {"model_path": path}
        sampler = service.create_sampling_client(**of).result()
        prompt = types.ModelInput.from_ints(sampler.get_tokenizer().encode(text))
        return sampler.sample(prompt, 2, types.SamplingParams(max_tokens=6, seed=3, **params)).result().sequences


def test_sample_answers_as_the_sdk_does(cli: Any, trained: Any) -> None:
    for name, path in ((trained.model, None), (trained.sampler, trained.sampler), (trained.weights, trained.sampler)):
        expected = by_the_sdk(trained, "the lamp", path, temperature=0.7)
        arguments = ["--state-dir", trained.home, "sample", name, "--prompt", "the lamp", *ANSWER, "--num-samples", 2]
        answers = json.loads(cli(*arguments, "--json").out)
        assert [each["tokens"] for each in answers] == [each.tokens for each in expected]
        assert [each["logprobs"] for each in answers] == [each.logprobs for each in expected]
        done = cli(*arguments)
        assert done.out == "\n---\n".join(each["text"] for each in answers) + "\n"
        if any(each["stop_reason"] == "length" for each in answers):
            assert "cut at 6 tokens (--max-tokens)" in done.err


def test_sample_reads_stdin_and_speaks_the_chat_template(cli: Any, trained: Any, monkeypatch: Any) -> None:
    (first, _) = by_the_sdk(trained, "u:the lamp;a:", None, temperature=0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the lamp"))
    arguments = ("sample", trained.model, "--prompt", "-", "--chat", *ANSWER, "--temperature", 0, "--json")
    assert json.loads(cli("--state-dir", trained.home, *arguments).out)[0]["tokens"] == first.tokens


def test_the_state_directory_is_only_read(cli: Any, trained: Any, monkeypatch: Any) -> None:
    def files() -> dict[Path, float]:
        return {path: path.stat().st_mtime_ns for path in trained.home.rglob("*") if path.is_file()}

    monkeypatch.setattr("jax_client.checkpoint.store.CheckpointStore.sweep_expired", lambda self: 1 / 0)
    before = files()
    cli("--state-dir", trained.home, "sample", trained.weights, "--prompt", "a", *ANSWER)
    after = files()
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert not {name for name in changed if not name.startswith("catalogue.sqlite")}, changed
    assert before.keys() == {path for path in after if not path.name.endswith(("-wal", "-shm"))} | {
        path for path in before if path.name.endswith(("-wal", "-shm"))
    }


def test_where_a_server_has_the_directory_that_is_said_and_it_can_be_asked(
    cli: Any, trained: Any, running: Running, monkeypatch: Any
) -> None:
    arguments = ("--state-dir", trained.home, "sample", trained.sampler, "--prompt", "the lamp", *ANSWER, "--json")
    claim = run_lock.acquire(trained.home)
    try:
        here = cli(*arguments)
    finally:
        claim.release()
    assert f"a server (process {os.getpid()} on " in here.err and "set TINKER_BASE_URL" in here.err
    monkeypatch.setenv("TINKER_BASE_URL", running.url)
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    there = cli(*arguments)
    assert f"answers on the server {running.url}" in there.err
    assert json.loads(there.out) == json.loads(here.out)


def test_wrong_names_and_missing_templates_are_a_line(cli: Any, trained: Any, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        done = cli("--state-dir", trained.home, *arguments)
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.code in (1, 2) and done.out == "" and len(lines) == 1, done
        return lines[0]

    missing = trained.weights.replace("/weights/s", "/weights/none")
    assert "none" in error("sample", missing, "--prompt", "a")
    export = trained.weights.replace("/weights/", "/external_weights/")
    assert "is an export for other programs" in error("chat", export)
    assert "Did you mean" in error("sample", "qwen/qwen3-8b", "--prompt", "a")
    bare = write_model(tmp_path)
    (Path(bare) / "tokenizer.json").write_text((Path(trained.model) / "tokenizer.json").read_text())
    settings = json.loads((Path(trained.model) / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (Path(bare) / "tokenizer_config.json").write_text(json.dumps(settings))
    for arguments in (("chat", bare), ("sample", bare, "--prompt", "a", "--chat")):
        assert "has no chat template" in error(*arguments)


def test_chat_keeps_a_history_until_it_is_reset(cli: Any, trained: Any, monkeypatch: Any) -> None:
    prompts: list[str] = []
    asked = chat.Conversation.tokens

    def tokens(self: chat.Conversation) -> list[int]:
        found = asked(self)
        prompts.append(self.voice.tokenizer.decode(found))
        return found

    monkeypatch.setattr(chat.Conversation, "tokens", tokens)
    monkeypatch.setattr(chat, "PIECE", 4)
    lines = ["hi", "", "/temperature 0", "/temperature hot", "/dance", "so", "/reset", "end", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    done = cli("--state-dir", trained.home, "chat", trained.sampler, "--system", "be", *ANSWER)
    assert done.code == 0, done
    answers = done.out.splitlines()
    assert len(answers) == 3 and "hi" not in done.out
    said = [text.removesuffix("…") for text in answers]
    assert f"s:be;u:hi;a:{said[0]};u:so;a:" in prompts and prompts[-1] == "s:be;u:end;a:"
    assert (
        "temperature 0\n" in done.err and "'hot' is no temperature" in done.err and "/dance is no command" in done.err
    )
    assert "begun anew" in done.err


def test_what_does_not_fit_the_context_is_left_out(cli: Any, trained: Any, monkeypatch: Any) -> None:
    lines = [f"message {number} " + "x" * 20 for number in range(6)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    done = cli("--state-dir", trained.home, "chat", trained.sampler, *ANSWER)
    assert done.code == 0 and len(done.out.splitlines()) == 6
    assert "of the oldest messages no longer fit the context" in done.err


def test_a_terminal_is_safe_from_what_a_model_says() -> None:
    assert on_terminal("a\x1b[31mb\r\n\tü…") == "a\\x1b[31mb\\r\n\tü…"


# A conversation with a model that answers with what it was asked, and is interrupted where that is "stop".
TERMINAL = """
import contextlib, sys
sys.modules["torch"] = None
from types import SimpleNamespace
from jax_client.cli import main
from jax_client.cli.talk import chat

def ask(tokens, num_samples, params):
    if bytes(tokens) == b"stop":
        raise KeyboardInterrupt
    return [SimpleNamespace(tokens=list(tokens), stop_reason="stop")]

voice = SimpleNamespace(
    encode_chat=lambda said: list(said[-1]["content"].encode()),
    decode=lambda tokens: bytes(tokens).decode(),
    ask=ask,
    max_context=None,
)
chat.opened = lambda *args, **kwargs: contextlib.nullcontext(voice)
sys.exit(main())
"""


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    own = {"TERM": "xterm", "JAX_CLIENT_HOME": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | own
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, "chat", "m"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([main], [], [], 30)[0], shown
            shown += os.read(main, 4096)
        shown = shown.partition(text)[2]

    try:
        until(b"> ")
        for said, answer in ((b"hi", b"\x1b[36mhi\x1b[0m"), (b"stop", b"(stopped)"), (b"so", b"\x1b[36mso\x1b[0m")):
            os.write(main, said + b"\n")
            until(answer)
            until(b"> ")
        os.write(main, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(main)


@pytest.mark.parametrize("said", [0, 2, 6])
def test_a_question_that_failed_is_not_in_the_history(said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        name, max_context = "m", 100

        def encode_chat(self, messages: list[Any]) -> list[int]:
            return [0] * (20 * len(messages))

        def ask(self, *_: object) -> Any:
            raise RequestFailedError("the server is busy", category="server")

    before = [{"role": ("user", "assistant")[number % 2], "content": str(number)} for number in range(said)]
    conversation = chat.Conversation(
        voice=Busy(),  # type: ignore[arg-type]
        system=None,
        max_tokens=10,
        temperature=1.0,
        seed=None,
        said=list(before),
    )
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=len, flush=list))
    chat._answer(conversation, "the question")
    assert conversation.said == before
