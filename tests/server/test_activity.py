"""Does a server's log say what it does? The tokens per second while it works, and nothing while it rests."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jax_client.cli import stages
from jax_client.runs.lifecycle.session import SessionInfo
from jax_client.server.ops.activity import ActivityLog, rates_in_words
from jax_client.server.state.server import Server
from support.fake_engine import FakeModels
from support.server.serving import config


def usage(trained: int, sampled: int, running: int) -> dict[str, dict[str, float]]:
    sampling = {"sampled_tokens": sampled, "prompt_tokens": 0, "rows_running": running, "rows_waiting": 0}
    return {"training": {"tokens": trained}, "sampling": dict(sampling)}


def test_tokens_per_second_are_told_while_there_is_work(caplog: pytest.LogCaptureFixture) -> None:
    states = iter([usage(0, 0, 0), usage(500, 0, 0), usage(500, 0, 0), usage(500, 0, 0), usage(500, 40, 3)])
    current = [usage(0, 0, 0)]
    seen = SimpleNamespace(count=0)

    def now() -> dict[str, dict[str, float]]:
        seen.count += 1
        current[0] = next(states, current[0])
        return current[0]

    models: Any = SimpleNamespace(
        loaded=lambda: [SimpleNamespace(engine=SimpleNamespace(monitor=SimpleNamespace(usage=now)))]
    )
    with caplog.at_level(logging.INFO, "jax_client"), ActivityLog(models, seconds=0.01):
        while seen.count < 9:
            pass
    lines = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    assert len(lines) == 2 and lines[0].startswith("tokens/s: trained ") and "sampled" not in lines[0]
    assert lines[1].startswith("tokens/s: sampled ") and lines[1].endswith("; 3 samples run, 0 wait")
    assert rates_in_words(Counter(trained=12_345, sampled=20), 10.0) == "tokens/s: trained 1,234, sampled 2"
    assert rates_in_words(Counter(), 10.0) is None


def test_clients_and_runs_are_told_as_they_come_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(config(tmp_path), base_models=FakeModels())
    with caplog.at_level(logging.INFO, "jax_client"):
        session = server.live.add_session(SessionInfo(display_name="night"))
        server.finish_session(session.session_id, "errored", "it\nbroke")
        server.close(10)
    told = [record.getMessage() for record in caplog.records]
    assert f"client {session.session_id} connected ('night')" in told
    assert f"client {session.session_id} ended: errored, 'it\\nbroke'" in told


def test_a_log_line_has_one_form(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    form = stages.LineFormatter()

    def line(level: int) -> str:
        return form.format(logging.LogRecord("jax_client.x", level, "x.py", 1, "it is %d", (3,), None))

    assert [line(level) for level in (logging.INFO, logging.WARNING, logging.ERROR)] == [
        "it is 3",
        "warning: it is 3",
        "error: it is 3",
    ]
    with stages.with_times():
        stages.say("now")
        assert line(logging.WARNING)[8:] == " warning: it is 3" and line(logging.INFO)[2] == ":"
    stages.say("then")
    first, second = capsys.readouterr().err.splitlines()
    assert first[8:] == " now" and second == "then"
