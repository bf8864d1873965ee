"""The end of the daemon comes within seconds, whatever hangs.

It begins with a signal, or with the first part that fails. Then all parts tidy up: streams, sockets, the lock. A part
that cannot, or a loop that hangs, must not leave a process that serves nothing and lives on.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
from collections import Counter
from typing import Any, TypeVar

import structlog

PATIENCE = 3.0
"""Seconds that the parts have to end."""
_LAST_WORDS = 0.5
"""Seconds before the forced end at which a loop that still turns says which tasks have not ended."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_T = TypeVar("_T")


class Shutdown:
    """Ends the process, with status 1, when its end has begun and does not come.

    Usage:

        shutdown = Shutdown()
        shutdown.watch(group.create_task(part()))    # if the part fails, the end begins
        shutdown.begin()                             # so it does when a signal comes, also within its handler
        shutdown.is_over()                           # nothing is left that could hang
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_begun = False
        self._has_failed = False

    def begin(self) -> None:
        """The end begins: the process has `PATIENCE` to end by itself."""
        if self._has_begun:
            return
        self._has_begun = True
        try:  # its thread is none of Python's: it works while the loop hangs, and prints what every thread is doing
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=2)
        except RuntimeError:  # no thread can be had, as at the limit of a pod's pids
            signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, PATIENCE - _LAST_WORDS, self._say_what_runs)

    def is_over(self) -> None:
        """All parts have ended. What the interpreter's own end takes, in a starved process, is no fault."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def watch(self, part: asyncio.Task[_T]) -> asyncio.Task[_T]:
        """If this part of the daemon fails, the end begins, and says so at once: others may take their time, or hang.

        Returns the same task.
        """
        self._loop = part.get_loop()
        part.add_done_callback(self._note)
        return part

    def _note(self, part: asyncio.Task[Any]) -> None:
        if not part.cancelled() and (error := part.exception()) is not None and not self._has_failed:
            self._has_failed = True
            self.begin()  # first: whoever reads the log may not be reading
            log.critical("a part of the daemon failed", exc_info=error)

    def _say_what_runs(self) -> None:
        log.critical("ends by force", reason=f"it has not ended for {PATIENCE:g} s", running=running_tasks())


def running_tasks() -> dict[str, int]:
    """How many tasks of this loop run which coroutine."""
    return dict(sorted(Counter(getattr(t.get_coro(), "__qualname__", "?") for t in asyncio.all_tasks()).items()))
