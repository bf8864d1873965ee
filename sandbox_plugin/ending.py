"""The end of the daemon: it must come, within seconds, whatever hangs.

The end begins with a signal, or with the first part that fails. From then on the other parts tidy up: streams, sockets,
the lock. A part that cannot, or a loop that hangs, must not leave a process that serves nothing and lives on.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

import structlog

from sandbox_plugin.host.threads import start_thread

PATIENCE = 3.0
"""Seconds between the beginning of the end and the end."""
_LAST_WORDS = 0.5
"""Seconds for the last log line: whoever reads the log may be gone."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_T = TypeVar("_T")


class Ending:
    """Ends the process when its end has begun and does not come.

    Usage:

        ending = Ending()
        async with Parts(ending) as group:      # a part that fails begins the end, with status 1
            ...
        ending.begin(0)                         # so does whoever receives a signal, also in its handler
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._status: int | None = None
        self._has_begun = threading.Event()
        self._has_failed = False
        # A thread: it works while the loop hangs. From the start: none may be left when the end begins.
        start_thread("ending", self._watch)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Whose tasks are to be named, should they not end."""
        self._loop = loop

    def begin(self, status: int) -> None:
        """The end begins: in a few seconds the process ends with this status, if it has not ended itself by then."""
        if self._status is None:
            self._status = status
            self._has_begun.set()

    def failed(self, error: BaseException) -> None:
        """A part failed. The first one is logged at once: the others may take their time to end, or hang."""
        if not self._has_failed:
            self._has_failed = True
            self.begin(1)  # first: whoever reads the log may not be reading
            log.critical("a part of the daemon failed", exc_info=error)

    def _watch(self) -> None:
        self._has_begun.wait()
        time.sleep(PATIENCE)
        try:
            start_thread("last words", self._say_what_runs).join(_LAST_WORDS)
        finally:  # also where there is no thread for them
            os._exit(self._status or 0)

    def _say_what_runs(self) -> None:
        running = asyncio.all_tasks(self._loop) if self._loop is not None else ()
        tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in running)
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        log.critical(
            "ended by force",
            reason=f"the process should have ended {PATIENCE:g} s ago",
            running=dict(sorted(tasks.items())),
            threads=sorted(thread.name for thread in threading.enumerate()),
            main_thread="".join(traceback.format_stack(frame, limit=3)) if frame is not None else None,
        )


class Parts(asyncio.TaskGroup):
    """A TaskGroup that tells of a task that failed when it fails, not only when all others have ended."""

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self._ending = ending

    def create_task(
        self,
        coro: Generator[Any, None, _T] | Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[_T]:
        task = super().create_task(coro, name=name, context=context)
        task.add_done_callback(self._note)
        return task

    def _note(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._ending.failed(error)
