"""Calls to the system that may never return, on threads that nothing joins.

A file on a dead mount holds whoever touches it, and no signal ends that. A thread pool would then keep the process
from ending, and a pool of two would be used up by two such calls.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial, wraps
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import aiofiles.os

_P = ParamSpec("_P")
_T = TypeVar("_T")


class DaemonThreads(Executor):
    """Runs each call on a thread that ends with the process, and has this name while it is at work.

    A thread that is done waits for the next call, whosever it is, or ends where enough others wait; for one that hangs
    nobody waits, and another takes its place. Raises OSError where none can be had, as at the limit of a pod's pids.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """The future cannot be cancelled, since nothing stops a thread."""
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()

        def work(is_done: Callable[[], None]) -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                answer = partial(future.set_exception, error)
            else:
                answer = partial(future.set_result, result)
            is_done()  # first: whoever gets the answer may have the next call
            answer()

        try:
            calls = _waiting.pop()
        except IndexError:
            calls = SimpleQueue()
            try:
                threading.Thread(target=_serve, args=(calls,), daemon=True).start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from None
        calls.put((self._name, work))
        return future


_Calls = SimpleQueue[tuple[str, Callable[[Callable[[], None]], None]]]

_waiting: list[_Calls] = []
"""Of each thread that waits, where it waits."""

_MOST_WAITING = 2
"""A scan's and an Allocate's: what a quiet daemon needs. More would stay for ever after a moment with much to do."""


def _serve(calls: _Calls) -> None:
    """One thread: a call after the other, as long as it may wait for the next."""
    thread = threading.current_thread()
    waits = True

    def is_done() -> None:
        nonlocal waits
        thread.name = "waits"
        waits = len(_waiting) < _MOST_WAITING
        if waits:
            _waiting.append(calls)

    while waits:
        name, work = calls.get()
        thread.name = name
        work(is_done)
        del work  # what it was about is not to live until the next call


_files = DaemonThreads("files")


def on_thread(function: Callable[_P, _T]) -> Callable[_P, Awaitable[_T]]:
    """The same function for the loop: it runs on a thread that may hang without holding up anything else.

    Whoever is cancelled while waiting goes on at once; the thread does not. Where no thread can be had it raises
    OSError.
    """
    run: Callable[..., Awaitable[_T]] = aiofiles.os.wrap(function)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_T]:
        awaitable: Any = run(*args, executor=_files, **kwargs)
        return awaitable  # type: ignore[no-any-return]

    return call
