"""Signals that end the program: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone).

The first of them ends what is under way, and those that come meanwhile are ignored, so that nothing is left behind.
Apart from asyncio's signal handlers, which are there only as long as its loop: a preset's tree is made before the loop
and removed after it. What is imported here is imported before signals are attended to, so it must be little.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal asked the program to end. As a KeyboardInterrupt does, it may come out of any line."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interrupting() -> Iterator[None]:
    """For the whole life of a command: the first signal raises `Interrupted`, and later ones do nothing."""
    interrupted: list[Interrupted] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        _do_nothing_more()
        interrupted.append(Interrupted(number))
        raise interrupted[0]

    former = {number: signal.signal(number, interrupt) for number in _ending()}
    try:
        yield
    except BaseException:
        if interrupted:  # whatever others have made of it: `class` statements, for one, raise a RuntimeError
            raise interrupted[0] from None
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is not interrupt:
            _ignore_for_good()
        else:
            for number, handler in former.items():
                signal.signal(number, handler)


def run_until_signal(
    work: Callable[[], Coroutine[None, None, None]],
    actions: Mapping[signal.Signals, Callable[[], None]],
    at_signal: Callable[[], None] = lambda: None,
) -> signal.Signals | None:
    """Runs `work` in a loop of its own until it ends, or until a signal cancels it. Returns that signal.

    `actions` are called in the loop when their signals come. `at_signal` is called for each signal that ends the
    program, at once, also while the loop hangs. To be called within `interrupting`.
    """
    import asyncio  # here, because it takes a while, in which `interrupting` should be at work already

    ended_by: list[signal.Signals] = []
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    async def attended() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def look() -> None:
            for number in map(signal.Signals, os.read(reader, 1024)):
                if number in actions:
                    actions[number]()
                elif not ended_by:
                    ended_by.append(number)
                    task.cancel()

        loop.add_reader(reader, look)
        try:
            await work()
        except asyncio.CancelledError:
            if not ended_by:
                raise
        finally:
            loop.remove_reader(reader)

    try:
        # The interpreter writes the number of each signal into the pipe, and that wakes the loop: a handler alone does
        # not, when the signal comes just before the loop begins to wait.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _ending():
            signal.signal(number, lambda *_: at_signal())
        for number in actions:
            signal.signal(number, _nothing)
        asyncio.run(attended())
    finally:
        _do_nothing_more()
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)
    return ended_by[0] if ended_by else None


def _nothing(number: int, _: FrameType | None) -> None:
    """Handles a signal that has been noted elsewhere, or that comes when the program is ending already.

    Not SIG_IGN: of a signal that came just before that was set the interpreter would say so on stderr.
    """


def _ending() -> list[signal.Signals]:
    """The signals that end the program: not SIGHUP if `nohup` has started it."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hangs_up else [])]


def _do_nothing_more() -> None:
    for number in _ending():
        signal.signal(number, _nothing)


def _ignore_for_good() -> None:
    """The interpreter takes its handlers away before the process has ended; what is ignored stays so."""
    ending = _ending()
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    for number in ending:
        signal.signal(number, signal.SIG_IGN)
