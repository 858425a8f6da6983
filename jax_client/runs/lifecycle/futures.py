"""How does one future follow another?"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_here = threading.local()


def _mark() -> None:
    _here.answering = True


# Answers are shown to the user on a thread of their own: a slow callback must not hold up the engine.
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="jax_client-answers", initializer=_mark)


_answers = _thread()


def _after_fork() -> None:
    global _answers
    _answers = _thread()  # that of the parent's is not in the child


os.register_at_fork(after_in_child=_after_fork)


def on_answer_thread() -> bool:
    """Say whether this is the thread that completes the answers, where waiting for another one would never end."""
    return getattr(_here, "answering", False)


def background(function: Callable[[], A], name: str) -> Future[A]:
    """Run `function` on a daemon thread of its own and return the future of what it returns or raises."""
    answer: Future[A] = Future()

    def work() -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            value = function()
        except BaseException as error:
            answer.set_exception(error)
        else:
            answer.set_result(value)

    threading.Thread(target=work, name=f"jax_client-{name}", daemon=True).start()
    return answer


def link(
    source: Future[A],
    target: Future[B],
    convert: Callable[[A], B] | None = None,
    *,
    owner: object = None,
    hop: bool = False,
) -> None:
    """Complete `target` with what becomes of `source`; cancelling the target cancels the source.

    Args:
        source: the future to follow.
        target: a future that nothing else completes.
        convert: applied to the value, on the thread that completes the target; what it raises fails the target.
        hop: complete the target on the answer thread, not on the one that completes the source.
        owner: kept alive until the source is done, such as the run whose device state the source needs.
    """

    # Emptied at the end: a future keeps its callbacks, and these two would keep each other, and the owner.
    held = [source, owner]
    del owner

    def finished(done: Future[A]) -> None:
        held.clear()
        if done.cancelled():
            target.cancel()
        if not target.set_running_or_notify_cancel():
            return
        try:
            value: Any = done.result()
            if convert is not None:
                value = convert(value)
        except BaseException as error:
            target.set_exception(error)
        else:
            target.set_result(value)

    def cancelled(done: Future[B]) -> None:
        if done.cancelled() and held:
            held[0].cancel()

    def hopping(done: Future[A]) -> None:
        try:
            _answers.submit(finished, done)
        except RuntimeError:  # the interpreter is shutting down
            finished(done)

    target.add_done_callback(cancelled)
    source.add_done_callback(hopping if hop else finished)


def then(source: Future[A], convert: Callable[[A], B], *, owner: object = None) -> Future[B]:
    """Return the future of `convert(value of source)`, completed on the answer thread."""
    target: Future[B] = Future()
    link(source, target, convert, owner=owner, hop=True)
    return target


def settled(value: A) -> Future[A]:
    """Return a future that already has its value."""
    future: Future[A] = Future()
    future.set_result(value)
    return future
