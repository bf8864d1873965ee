"""What a reader of the host has to bear: files that hang, and a process that can open or start nothing more."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Trap:
    """Makes reading a file hang, until `release`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)

    def release(self) -> None:
        """Lets whoever hangs in it have the answer; the next reader finds a plain file again."""
        with self._file.open("r+b", buffering=0) as answer:  # to read and write: so it waits for nobody
            plain = self._file.with_name(f"{self._file.name}-plain")
            plain.write_bytes(self._content)
            plain.replace(self._file)
            answer.write(self._content)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process cannot open one file more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def no_threads() -> Iterator[None]:
    """No thread can be started, as at the limit of a pod's pids, and all that there are hang."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        patched.setattr("sandbox_plugin.host.threads._waiting", [])
        yield
