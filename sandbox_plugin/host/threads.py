"""Calls to the system that may never return, on threads that nothing joins.

A file on a dead mount holds whoever touches it, and no signal ends that. A thread pool would then keep the process
from ending, and a pool of two would be used up by two such calls. A thread of its own for each call costs some 0.1 ms.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import aiofiles.os

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _DaemonThreads(Executor):
    """Runs each call on a daemon thread of its own, which ends with the process."""

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, name="files", daemon=True).start()
        return future


_threads = _DaemonThreads()


def on_thread(function: Callable[_P, _T]) -> Callable[_P, Awaitable[_T]]:
    """The same function for the loop: it runs on a thread that may hang without holding up anything else.

    Whoever is cancelled while waiting goes on at once; the thread does not.
    """
    run: Callable[..., Awaitable[_T]] = aiofiles.os.wrap(function)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_T]:
        awaitable: Any = run(*args, executor=_threads, **kwargs)
        return awaitable  # type: ignore[no-any-return]

    return call
