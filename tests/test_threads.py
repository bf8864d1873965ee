"""The threads for calls that may hang: how many are left when nothing is to be done."""

from __future__ import annotations

import threading

from trials import wait_until

from sandbox_plugin.host.threads import DaemonThreads


def test_after_many_calls_at_once_two_threads_are_left_and_serve_the_next() -> None:
    files = DaemonThreads("files")
    go = threading.Event()
    calls = [files.submit(go.wait) for _ in range(8)]
    wait_until(lambda: threads_named("files") == 8, "all of them at work at once")
    go.set()
    assert all(call.result(timeout=10) for call in calls)
    wait_until(lambda: threads_named("waits") == 2, "two threads that wait")
    assert files.submit(threading.current_thread).result(timeout=10) in threading.enumerate()
    wait_until(lambda: threads_named("waits") == 2, "the thread waits again")


def threads_named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())
