"""What does `launch` do on a host that is not the first? It joins host 0's Ray, and stays until host 0 has ended."""

from __future__ import annotations

import signal
import time

import click

from jax_client.cli.launch.board import Board, NoAnswerError
from jax_client.cli.launch.finding.addresses import answers, joined, refuses, resolve
from jax_client.cli.launch.messages import say
from jax_client.cli.launch.plan import Plan
from jax_client.cli.launch.ray_node import RayNode
from jax_client.cli.launch.tokens import shown_token
from jax_client.cli.program.child import Child

POLL_SECONDS = 1.0
# Host 0 is given up when its Ray has not answered for so long, or at once when nothing listens there any more.
LOST_SECONDS = 20.0
# A Ray that ends so soon, so often in a row, would do so for ever.
SHORT_SECONDS, SHORT_LIVES = 30.0, 3


def follow(plan: Plan, own: str) -> int:
    """Join host 0 and wait for its end; return the exit code that it tells.

    Args:
        plan: of this launch.
        own: the address of this host, for the others.

    Raises:
        click.ClickException: host 0 is not found, is one of other hosts, or is lost; or Ray does not start here.
    """
    # It runs no program, and has what it received.
    signals = Child()
    with signals.listening():
        found = _find_head(plan, signals)
        if found is None:
            return 128 + signals.received[0]
        board, head = found
        follower = _Follower(plan, own, head, board, RayNode(plan, head, own), signals)
        try:
            return follower.wait()
        finally:
            follower.node.stop()


def _find_head(plan: Plan, signals: Child) -> tuple[Board, str] | None:
    """Return the texts of this launch and the address of host 0; None where a signal came first."""
    say(f"waiting for {plan.label(0)}, as {plan.label(plan.places.index)}; hosts from {plan.places.source}")
    end, why = time.monotonic() + plan.timeout, ""
    while time.monotonic() < end:
        if signals.received:
            return None
        head = resolve(plan.places.names[0])
        if head is None:
            why = "its name is not known here"
        elif not answers(head, plan.port):
            why = f"nothing answers at {joined(head, plan.port)}"
        else:
            try:
                board = Board(joined(head, plan.port), plan.environment)
                hosts = board.hosts()
            except NoAnswerError as error:
                if "InvalidAuthToken" in str(error):
                    raise click.ClickException(
                        f"{plan.label(0)} does not accept this host's token: they have different tokens, or this one "
                        f"was started with --no-auth. Copy {shown_token(plan.environment)} of that host to this one."
                    ) from None
                why = f"what answers at {joined(head, plan.port)} says: {error}"
            else:
                if hosts == plan.places.names:
                    return board, head
                if hosts is not None:
                    raise click.ClickException(
                        f"{plan.label(0)} was started for the hosts {', '.join(hosts)}, this one for "
                        f"{', '.join(plan.places.names)}; give the same hosts, in the same order, on each."
                    )
                why = f"the Ray at {joined(head, plan.port)} is none that launch started, or has just begun"
        time.sleep(POLL_SECONDS)
    raise click.ClickException(
        f"{plan.label(0)} was not found in {plan.timeout:g} s: {why}. Start the same command there, with the same "
        "--port and the same token; --timeout gives it longer."
    )


class _Follower:
    def __init__(self, plan: Plan, own: str, head: str, board: Board, node: RayNode, signals: Child) -> None:
        self._plan, self._own, self._head = plan, own, head
        self._board, self.node, self._signals = board, node, signals
        self._joined, self._started, self._short_lives = False, time.monotonic(), 0
        self._passed_on = False

    def wait(self) -> int:
        """Return the exit code once host 0 has told it, 128+n where it is lost after signal n came here."""
        plan, received = self._plan, self._signals.received
        answered, refused = time.monotonic(), 0
        while True:
            try:
                if (code := self._board.exit_code()) is not None:
                    self._board.put_seen(plan.places.index)
                    say(f"{plan.label(0)} has ended with exit code {code}")
                    return code
                self._tell()
                answered, refused = time.monotonic(), 0
            except NoAnswerError:
                refused = refused + 1 if refuses(self._head, plan.port) else 0
                if refused > 1 or time.monotonic() - answered > LOST_SECONDS:
                    lost = f"{plan.label(0)} is lost: its Ray no longer answers, and it told no exit code. Look there."
                    if not received:
                        raise click.ClickException(lost) from None
                    say(lost)
                    return 128 + received[0]
            if received.count(signal.SIGINT) > 1:
                return 128 + signal.SIGINT
            # After a signal this host is about to stop: nothing is started on it.
            if self.node.ended and not received:
                self._start_anew()
            time.sleep(POLL_SECONDS)

    def _tell(self) -> None:
        """Write that this launch is there, and what it received."""
        plan, received = self._plan, self._signals.received
        self._board.beat(plan.places.index)
        if received and not self._passed_on:
            self._board.put_signal(plan.places.index, received[0])
            self._passed_on = True
            name = signal.Signals(received[0]).name
            say(f"{name}: the program on {plan.label(0)} gets it; this host stays until that has ended")
        if not self._joined and self._board.nodes()[plan.node_name(plan.places.index)]:
            self._joined = True
            say(f"joined {plan.label(0)}")

    def _start_anew(self) -> None:
        lived = time.monotonic() - self._started
        self._short_lives = self._short_lives + 1 if lived < SHORT_SECONDS else 0
        say(self.node.last_lines())
        logs = f"Its logs are in {self.node.directory}."
        if not self._joined or self._short_lives >= SHORT_LIVES:
            raise click.ClickException(f"Ray has ended on this host, as it says above. {logs}")
        say(f"warning: Ray has ended on this host, as it says above, and is started anew. {logs}")
        self.node.stop()
        self.node = RayNode(self._plan, self._head, self._own)
        self._joined, self._started = False, time.monotonic()
