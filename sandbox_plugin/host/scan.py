"""Scans of the whole host, off the loop's thread.

A sysfs read can hang in the kernel where no signal reaches it, so a scan runs on daemon threads that nothing joins.
A function that has not answered for `patience` seconds is reported as unreadable and left to its thread; the others
are read on by a new one. There is never more than one thread for each function that hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.sweep import BUS, SILENCE, Remembered, Sweep
from sandbox_plugin.host.threads import DaemonThreads
from sandbox_plugin.model import HostFacts
from sandbox_plugin.tasks import happens

_GRACE = 0.05
"""Seconds that a thread gets once more when its time is over: this whole process may have been stopped, or starved."""
_IMPATIENCE = 0.1
"""Seconds for a read where others have used up the patience: what answers must not wait for what hangs."""

_threads = DaemonThreads("host-scan")


def scan_now(paths: HostPaths) -> HostFacts:
    """One scan of the whole host: for commands that have no loop. Raises `sysfs.OutOfResources`."""
    return asyncio.run(HostScanner(paths, on_late=lambda: None).scan())


class HostScanner:
    """Scans a host again and again without ever blocking the loop.

    `on_late` is called on the loop when something that hung has answered after all: a reason to scan again.
    """

    def __init__(self, paths: HostPaths, *, on_late: Callable[[], None], patience: float = 1.0) -> None:
        self._paths = paths
        self._on_late = on_late
        self._patience = patience
        self._hanging: set[str] = set()
        self._memory = Remembered()

    async def scan(self) -> HostFacts:
        """One scan of everything.

        Takes at most about twice `patience`, and `_IMPATIENCE` for each function beyond the second that newly hangs.
        Raises `sysfs.OutOfResources` when this process could not look at all.
        """
        began_at = time.monotonic()
        silence = HostFacts(unreachable=SILENCE, began_at=began_at)
        if BUS in self._hanging:
            return silence
        sweep = Sweep(paths=self._paths, began_at=began_at, memory=self._memory, hanging=frozenset(self._hanging))
        patience = self._patience
        try:
            while True:
                answer = _start(sweep)
                hung_at = await _hung_at(sweep, answer, patience)
                if hung_at is None:
                    return answer.result()
                self._hanging.add(hung_at)
                answer.add_done_callback(_on_loop(self._answered, hung_at))
                if hung_at == BUS:
                    return silence
                sweep.is_wanted = False
                sweep = sweep.without(hung_at)
                patience = max(_IMPATIENCE, began_at + 2 * self._patience - time.monotonic())
        finally:
            sweep.is_wanted = False

    def _answered(self, what: str) -> None:
        self._hanging.discard(what)
        self._on_late()


def _start(sweep: Sweep) -> Future[HostFacts]:
    try:
        return _threads.submit(sweep.run)
    except OSError as error:
        raise sysfs.OutOfResources(error.strerror) from None


async def _hung_at(sweep: Sweep, answer: Future[HostFacts], patience: float) -> str | None:
    """Waits for a sweep. Returns what it has been reading for longer than `patience`, or None: it has ended."""
    ended = asyncio.Event()
    answer.add_done_callback(_on_loop(ended.set))
    while not answer.done():
        reading = sweep.reading
        what, since = reading
        if await happens(ended, within=since + patience - time.monotonic()) or sweep.reading is not reading:
            continue
        # A process that was stopped, or got no CPU, comes here before its thread: that gets its turn first.
        await asyncio.sleep(_GRACE)
        if not answer.done() and sweep.reading is reading:
            return what
    return None


def _on_loop(callback: Callable[..., object], *args: object) -> Callable[[object], None]:
    """For a scan thread: calls this back on the loop that runs now, unless that has ended meanwhile."""
    loop = asyncio.get_running_loop()

    def call(_: object) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(callback, *args)

    return call
