"""What do host 0 and the others do in each case? Ray is replaced by a dictionary, so that a case takes no time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from jax_client.cli.launch import follower, leader
from jax_client.cli.launch.board import Board, NoAnswerError
from jax_client.cli.launch.finding.places import Places
from jax_client.cli.launch.plan import Plan

NAMES = ("a", "b")


class Memory(Board):
    """The texts of a launch in a dictionary, and how many nodes Ray would have."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.alive = Counter({"0:a": 1, "1:b": 1})
        self.lost, self._beats, self.asked = False, 0, 0

    def beat_of(self, index: int) -> str | None:
        """Another text each time, as of a launch that is there."""
        self.asked += 1
        return f"{self.asked}" if self.alive[f"{index}:b"] else None

    def nodes(self) -> Counter[str]:
        if self.lost:
            raise NoAnswerError("gone")
        return self.alive

    def _put(self, key: str, text: str) -> None:
        if self.lost:
            raise NoAnswerError("gone")
        self.texts[key] = text

    def _get(self, key: str) -> str | None:
        if self.lost:
            raise NoAnswerError("gone")
        return self.texts.get(key)

    def _keys(self, prefix: str) -> list[str]:
        return [key for key in self.texts if key.startswith(prefix)]


class Node:
    """Ray on this host, which is not."""

    made: list[Node]

    def __init__(self, *_: object) -> None:
        self.ended = self.keep_logs = self.stopped = False
        self.directory = Path("/tmp/logs")
        Node.made.append(self)

    def last_lines(self) -> str:
        return "  Ray: it broke"

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made, Node.made = Memory(), []
    for module in (leader, follower):
        monkeypatch.setattr(module, "Board", lambda *_: made)
        monkeypatch.setattr(module, "RayNode", Node)
        monkeypatch.setattr(module, "answers", lambda *_: not made.lost)
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follower, "refuses", lambda *_: made.lost)
    monkeypatch.setattr(leader, "can_bind", lambda *_: True)
    monkeypatch.setattr(leader, "SEEN_SECONDS", 0.1)
    monkeypatch.setattr(follower, "resolve", lambda name: "10.0.0.1")
    return made


def plan(index: int, **settings: Any) -> Plan:
    places = Places(names=NAMES, index=index, source="--hosts")
    defaults: dict[str, Any] = {"port": 6379, "timeout": 0.5, "restarts": 0, "environment": dict(os.environ)}
    return Plan(places=places, **defaults | settings)


def program(path: Path, *codes: int) -> list[str]:
    """A program that ends with one of these codes after the other."""
    code = (
        f"import sys; from pathlib import Path; path = Path({str(path)!r}); path.touch(); n = len(path.read_text()); "
        f"path.write_text('x' * (n + 1)); sys.exit({list(codes)!r}[n])"
    )
    return [sys.executable, "-I", "-S", "-c", code]


def soon(*steps: Callable[[], object]) -> None:
    """Take steps on another thread, each until it returns something true."""

    def take() -> None:
        for step in steps:
            while not step():
                time.sleep(0.01)

    threading.Thread(target=take, daemon=True).start()


def send(number: int) -> Callable[[], bool]:
    """Return a step that sends this process a signal once it has a handler; without one it would end."""
    before = signal.getsignal(number)

    def step() -> bool:
        if signal.getsignal(number) == before:
            return False
        os.kill(os.getpid(), number)
        return True

    return step


def lead(board: Memory, command: list[str], **settings: Any) -> int:
    code = leader.lead(plan(0, **settings), "10.0.0.1", command)
    assert board.texts["exit"] == str(code) and board.hosts() == NAMES and Node.made[0].stopped
    return code


@pytest.mark.parametrize(
    ("codes", "restarts", "expected", "runs"),
    [([4], 3, 4, 1), ([75], 0, 75, 1), ([75, 75, 6], 2, 6, 3), ([75, 75, 6], 1, 75, 2), ([0], 0, 0, 1)],
)
def test_a_program_that_lost_a_host_runs_anew(board, tmp_path, codes, restarts, expected, runs):
    assert lead(board, program(tmp_path / "n", *codes), restarts=restarts) == expected
    assert len((tmp_path / "n").read_text()) == runs


def test_a_host_that_is_missing_is_named_and_the_others_are_told(board, tmp_path):
    # Ray still counts one that was switched off; or none is there.
    for nodes in (2, 0):
        board.alive["1:b"] = nodes
        with pytest.raises(click.ClickException, match=r"after 0.5 s these hosts are missing: host 1 \(b\)\. Start"):
            leader.lead(plan(0), "10.0.0.1", program(tmp_path / "n"))
        assert board.texts["exit"] == "1" and not (tmp_path / "n").exists()


def test_a_host_that_does_not_come_back_leaves_the_programs_code(board, tmp_path, monkeypatch, capsys):
    run = leader.Child.run

    def lose(self: Any, *arguments: Any) -> int:
        code = run(self, *arguments)
        board.alive["1:b"] = 0
        return code

    monkeypatch.setattr(leader.Child, "run", lose)
    assert lead(board, program(tmp_path / "n", 75, 0), restarts=2) == 75
    assert "error: after 0.5 s these hosts are missing: host 1 (b)." in capsys.readouterr().err


def test_signals_before_the_program_starts_end_all(board, tmp_path):
    board.alive["1:b"] = 0
    board.texts["signal:1"] = "15"
    assert lead(board, program(tmp_path / "n", 0), timeout=30) == 143
    board.texts.clear()
    soon(send(signal.SIGHUP))
    assert lead(board, program(tmp_path / "n", 0), timeout=30) == 129
    assert not (tmp_path / "n").exists()


def test_a_program_is_not_run_anew_after_a_signal(board, tmp_path):
    ready = tmp_path / "ready"
    board.texts["signal:1"] = "15"
    board.signals = lambda: []  # it comes while the program runs
    soon(ready.exists, lambda: delattr(board, "signals") is None)
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
    code += f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    assert lead(board, [sys.executable, "-I", "-S", "-c", code], restarts=5) == 75


def test_a_port_that_is_taken_and_a_ray_that_breaks(board, monkeypatch):
    monkeypatch.setattr(leader, "RayNode", lambda *_: broken())
    with pytest.raises(click.ClickException, match=r"Ray has ended on this host, as it says above\. Its logs"):
        leader.lead(plan(0), "10.0.0.1", ["true"])
    monkeypatch.setattr(leader, "can_bind", lambda *_: False)
    with pytest.raises(click.ClickException, match=r"port 6379 of 10.0.0.1 is in use"):
        leader.lead(plan(0), "10.0.0.1", ["true"])


def broken() -> Node:
    node = Node()
    node.ended = True
    return node


def test_another_host_ends_with_the_code_that_it_is_told(board):
    board.put_hosts(NAMES)
    soon(lambda: "beat:1" in board.texts, lambda: board.put_exit(7) is None)
    assert follower.follow(plan(1), "10.0.0.2") == 7
    assert board.seen() == {1} and "beat:1" in board.texts and Node.made[0].stopped


def test_another_host_passes_a_signal_on_and_stays(board, capsys):
    board.put_hosts(NAMES)
    soon(send(signal.SIGTERM), board.signals, lambda: board.put_exit(5) is None)
    assert follower.follow(plan(1), "10.0.0.2") == 5
    assert board.signals() == [15] and "SIGTERM: the program on host 0 (a) gets it" in capsys.readouterr().err


@pytest.mark.parametrize("signalled", [False, True])
def test_host_0_is_lost(board, capsys, signalled):
    board.put_hosts(NAMES)
    lose = lambda: setattr(board, "lost", True) is None  # noqa: E731
    soon(*([send(signal.SIGTERM), board.signals] if signalled else [lambda: "beat:1" in board.texts]), lose)
    if signalled:
        assert follower.follow(plan(1), "10.0.0.2") == 143
        assert "host 0 (a) is lost" in capsys.readouterr().err
    else:
        with pytest.raises(click.ClickException, match=r"host 0 \(a\) is lost: its Ray no longer answers"):
            follower.follow(plan(1), "10.0.0.2")
    assert Node.made[0].stopped


def test_host_0_that_is_silent_is_lost_after_a_while(board, monkeypatch):
    monkeypatch.setattr(follower, "refuses", lambda *_: False)  # nothing comes back at all
    monkeypatch.setattr(follower, "LOST_SECONDS", 0.3)
    board.put_hosts(NAMES)
    soon(lambda: "beat:1" in board.texts, lambda: setattr(board, "lost", True) is None)
    with pytest.raises(click.ClickException, match="is lost"):
        follower.follow(plan(1), "10.0.0.2")


def test_host_0_is_not_found_or_is_another(board, monkeypatch):
    with pytest.raises(click.ClickException, match="is none that launch started, or has just begun"):
        follower.follow(plan(1), "10.0.0.2")
    board.put_hosts(("a", "b", "c"))
    with pytest.raises(click.ClickException, match="was started for the hosts a, b, c, this one for a, b; give the"):
        follower.follow(plan(1), "10.0.0.2")
    board.lost = True
    with pytest.raises(click.ClickException, match=r"host 0 \(a\) was not found in 0.5 s: nothing answers at 10.0.0.1"):
        follower.follow(plan(1), "10.0.0.2")
    monkeypatch.setattr(follower, "resolve", lambda name: None)
    with pytest.raises(click.ClickException, match="its name is not known here"):
        follower.follow(plan(1), "10.0.0.2")
    soon(send(signal.SIGTERM))
    assert follower.follow(plan(1, timeout=30), "10.0.0.2") == 143


def test_ray_that_dies_is_started_anew_but_not_for_ever(board, monkeypatch):
    board.put_hosts(NAMES)

    def kill() -> bool:
        Node.made[-1].ended = True
        return True

    # It has joined when it beats a second time.
    joined = lambda: board.texts.get("beat:1", "").partition(" ")[2] not in ("", "1")  # noqa: E731
    soon(joined, kill, lambda: len(Node.made) == 2, lambda: board.put_exit(0) is None)
    assert follower.follow(plan(1), "10.0.0.2") == 0
    assert len(Node.made) == 2 and all(node.stopped for node in Node.made)
    # It has never joined; then it dies again and again.
    board.texts.pop("exit")
    board.alive["1:b"] = 0
    monkeypatch.setattr(follower, "RayNode", lambda *_: broken())
    Node.made.clear()
    with pytest.raises(click.ClickException, match="Ray has ended on this host"):
        follower.follow(plan(1), "10.0.0.2")
    assert len(Node.made) == 1
    board.alive["1:b"] = 1
    Node.made.clear()
    with pytest.raises(click.ClickException, match="Ray has ended on this host"):
        follower.follow(plan(1), "10.0.0.2")
    assert len(Node.made) == follower.SHORT_LIVES
