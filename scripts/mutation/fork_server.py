"""How do thousands of short test runs avoid importing jax thousands of times? They are forked from one process.

`fork_server.py SOCKET` imports what does not change between runs and listens. A connection that sends the arguments of
pytest, one a line, gets the exit status back. `fork_server.py SOCKET ARGUMENT...` is the client, and exits with it.
No run has used jax before the fork, so none inherits threads of its backend.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import sys

MEMORY = 16 * 2**30  # some mutants ask for arrays without end


def client(path: str, arguments: list[str]) -> int:
    """Ask the server for one run; return its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall("\n".join(arguments).encode() + b"\0")
        answer = connection.recv(1)
    return answer[0] if answer else 1


def serve(path: str) -> None:
    """Carry out runs, one after the other, until the parent process closes standard input."""
    import hypothesis  # noqa: F401
    import jax.numpy  # noqa: F401
    import pytest  # noqa: F401

    sys.path[0] = os.getcwd()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while not request.endswith(b"\0"):
                    request += connection.recv(65536)
                run(connection, request[:-1].decode().split("\n"))


def run(connection: socket.socket, arguments: list[str]) -> None:
    """Fork a run and answer with its exit status; kill it where the client goes away before."""
    child = os.fork()
    if child == 0:
        os._exit(tests(arguments))
    done = os.pidfd_open(child)
    if done not in select.select([connection, done], [], [])[0]:
        os.killpg(child, signal.SIGKILL)
    os.close(done)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(bytes([os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1]))


def tests(arguments: list[str]) -> int:
    """Run pytest in this process, which was forked for it."""
    import pytest

    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    return int(pytest.main(arguments))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(client(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
