"""Calls to the system that may never return, on threads that nothing joins.

A file on a dead mount holds whoever touches it, and no signal ends that. A thread pool would then keep the process
from ending, and a pool of two would be used up by two such calls. A thread of its own for each call costs some 0.1 ms.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import aiofiles.os

_P = ParamSpec("_P")
_T = TypeVar("_T")


def is_lack_of_threads(error: BaseException) -> bool:
    """Whether somebody else's code failed because no thread could be had."""
    return type(error) is RuntimeError and str(error) == "can't start new thread"


class DaemonThreads(Executor):
    """Runs each call on a thread of its own, of this name, that ends with the process.

    Raises OSError where none can be had, as at the limit of a pod's pids.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """The future cannot be cancelled, since nothing stops a thread."""
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        try:
            threading.Thread(target=work, name=self._name, daemon=True).start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None
        return future


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
