"""How does one future follow another?

`link` completes a future with the value or the error of another one, converted if asked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar, cast

from jax_client.threads import Workers, complete, start_thread

A = TypeVar("A")
B = TypeVar("B")

# Answers are shown to the user on a thread of their own: a slow callback must not hold up the engine.
_answers = Workers("jax_client-answers", 1)


def on_answer_thread() -> bool:
    """Return whether this is the thread that completes the answers, where waiting for another one would never end."""
    return _answers.runs_this_thread()


def background(function: Callable[[], A], name: str) -> Future[A]:
    """Run `function` on a thread of its own; return the future of its result.

    Where Python starts no thread any more, the caller runs it, and the future is done.
    """
    _answers.grow_to(1)  # while threads can be started
    answer: Future[A] = Future()
    try:
        start_thread(f"jax_client-{name}", partial(complete, answer, function))
    except RuntimeError:
        complete(answer, function)
    return answer


def link(
    source: Future[A],
    target: Future[B],
    convert: Callable[[A], B] | None = None,
    *,
    error: Callable[[BaseException], BaseException] | None = None,
    owner: object = None,
    hop: bool = False,
) -> None:
    """Complete `target` as `source` is completed; cancelling the target cancels the source.

    Args:
        source: the future to follow.
        target: a future that nothing else completes.
        convert: `f(value) -> value of the target`, on the thread that completes the target; an error in it fails the
            target. None takes the value as it is.
        error: `f(error of source or convert) -> error of the target`; None takes it as it is.
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
        # Not raised here: the error would keep this frame and this frame its future, with all that its frames hold.
        raised, value = done.exception(), None
        if raised is None:
            try:
                value = cast("B", done.result()) if convert is None else convert(done.result())
            except BaseException as problem:
                raised = problem
        if raised is None:
            target.set_result(cast("B", value))
        else:
            target.set_exception(raised if error is None else error(raised))

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
