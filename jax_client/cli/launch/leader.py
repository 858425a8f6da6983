"""What does `launch` do on host 0? It starts Ray's head, waits for all hosts, runs the program, and tells its end."""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import partial

import click

from jax_client.cli.launch import tied
from jax_client.cli.launch.board import Board, NoAnswerError
from jax_client.cli.launch.finding.addresses import answers, can_bind, joined
from jax_client.cli.launch.messages import say
from jax_client.cli.launch.plan import LOST_HOST, Plan
from jax_client.cli.launch.ray_node import RayNode
from jax_client.cli.program.child import Child
from jax_client.threads import start_thread

POLL_SECONDS = 0.5
REMIND_SECONDS = 30.0
# Another host asks each second whether there is an exit code.
SEEN_SECONDS = 15.0


def lead(plan: Plan, own: str, program: list[str]) -> int:
    """Run the program with all hosts; return its exit code, 128+n where signal n came before it started.

    Args:
        plan: of this launch.
        own: the address of this host, for the others.
        program: with its arguments.

    Raises:
        click.ClickException: the port is taken, Ray does not start, or hosts are missing.
    """
    if not can_bind(own, plan.port):
        raise click.ClickException(
            f"port {plan.port} of {own} is in use, perhaps by a Ray cluster that runs already ('ray stop' ends this "
            "user's); give another --port, on every host."
        )
    child = Child()
    with child.listening():
        node = RayNode(plan, own, own)
        try:
            return _with_ray(plan, own, program, child, node)
        finally:
            node.stop()


class _Stopped(Exception):
    """A signal arrived while no program ran, that could have been given it."""


def _with_ray(plan: Plan, own: str, program: list[str], child: Child, node: RayNode) -> int:
    try:
        board = _board(plan, own, child, node)
    except _Stopped:
        return 128 + child.received[0]
    code = 1  # of the other hosts, if this one fails
    try:
        board.put_hosts(plan.places.names)
        code = _run(plan, own, program, child, node, board)
    except click.exceptions.Exit as error:
        code = error.exit_code
        raise
    finally:
        _tell(plan, board, code)
    return code


def _board(plan: Plan, own: str, child: Child, node: RayNode) -> Board:
    """Wait until Ray's head serves."""
    say(f"starting Ray on {plan.label(0)}, {joined(own, plan.port)}; hosts from {plan.places.source}")
    end, why = time.monotonic() + plan.timeout, "it does not listen"
    while time.monotonic() < end:
        _check(child, node)
        if answers(own, plan.port):
            try:
                board = Board(joined(own, plan.port), plan.environment)
                if board.nodes()[plan.node_name(0)]:
                    return board
                why = "this host has not joined it"
            except NoAnswerError as error:
                why = str(error)
        time.sleep(POLL_SECONDS)
    node.keep_logs = True
    raise click.ClickException(f"Ray did not start in {plan.timeout:g} s: {why}. Its logs are in {node.directory}.")


def _check(child: Child, node: RayNode) -> None:
    if child.received:
        raise _Stopped
    if node.ended:
        say(node.last_lines())
        raise click.ClickException(f"Ray has ended on this host, as it says above. Its logs are in {node.directory}.")


def _run(plan: Plan, own: str, program: list[str], child: Child, node: RayNode, board: Board) -> int:
    """Run the program, and anew after it lost a host; return the exit code."""
    environment = dict(plan.environment) | {"RAY_ADDRESS": joined(own, plan.port), "JAX_CLIENT_HOSTS": "ray"}
    command = [sys.executable, "-I", "-S", tied.__file__, str(os.getpid()), *program]
    code = 0
    for attempt in range(plan.restarts + 1):
        if attempt:
            left = plan.restarts - attempt
            say(f"a host was lost, and what was trained is saved: the program runs anew ({left} more times)")
        try:
            _wait_for_hosts(plan, child, node, board)
        except _Stopped:
            return 128 + child.received[0]
        except click.ClickException as error:
            if not attempt:
                raise
            click.echo(f"error: {error.format_message()}", err=True)
            return code
        say(f"ready: {len(plan.places.names)} hosts ({', '.join(plan.places.names)}); running {program[0]}")
        ended = threading.Event()
        watch = start_thread("jax_client-launch", partial(_watch, child, node, board, ended))
        try:
            code = child.run(command, environment)
        finally:
            ended.set()
            watch.join()
        if code != LOST_HOST or child.received:
            break
    return code


def _wait_for_hosts(plan: Plan, child: Child, node: RayNode, board: Board) -> None:
    """Return once each host has one living node, and its launch has written something since the call."""
    others = range(1, len(plan.places.names))
    before: dict[int, str | None] = {}
    end, remind = time.monotonic() + plan.timeout, time.monotonic() + REMIND_SECONDS
    missing = list(others)
    while True:
        _check(child, node)
        try:
            for number in board.signals():
                child.relay(number)
            before = before or {i: board.beat_of(i) for i in others}
            nodes = board.nodes()
            # A host that was switched off is a living node to Ray for a minute more (measured: 65 s).
            missing = [i for i in others if nodes[plan.node_name(i)] != 1 or board.beat_of(i) in (None, before[i])]
            if not missing:
                return
        except NoAnswerError:
            pass  # it may be busy; the time limit holds
        shown = ", ".join(plan.label(i) for i in missing)
        if time.monotonic() > end:
            raise click.ClickException(
                f"after {plan.timeout:g} s these hosts are missing: {shown}. Start the same command once on each, and "
                f"look at what it prints there; the hosts must reach each other on port {plan.port} and on those that "
                "Ray chooses. --timeout gives them longer."
            )
        if time.monotonic() > remind:
            say(f"waiting for {shown}")
            remind += REMIND_SECONDS
        time.sleep(POLL_SECONDS)


def _watch(child: Child, node: RayNode, board: Board, ended: threading.Event) -> None:
    """While the program runs: give it what other hosts receive."""
    told = False
    while not ended.wait(POLL_SECONDS):
        if node.ended and not told:
            told = True
            say(f"warning: Ray has ended on this host; it printed:\n{node.last_lines()}")
        try:
            for number in board.signals():
                child.relay(number)
        except NoAnswerError:
            pass


def _tell(plan: Plan, board: Board, code: int) -> None:
    """Write the exit code, and wait until the hosts that are there have read it."""
    end = time.monotonic() + SEEN_SECONDS
    try:
        board.put_exit(code)
        while time.monotonic() < end:
            nodes, seen = board.nodes(), board.seen()
            if all(i in seen or not nodes[plan.node_name(i)] for i in range(1, len(plan.places.names))):
                return
            time.sleep(POLL_SECONDS)
    except NoAnswerError:
        return  # Ray has ended here: the other hosts notice that themselves
