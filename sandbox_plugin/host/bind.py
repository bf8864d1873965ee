"""Writing to sysfs, and loading modules: the only place that does.

A write to `unbind` waits until a VM lets go of the device, and no signal ends that (vfio_unregister_group_dev in
drivers/vfio/vfio_main.c); whoever touches the device's lock meanwhile waits too. A thread that waits so keeps its
process a zombie that nobody can reap, so whoever started it waits as well (seen on Linux 6.1). So a process of its own
does the writing: it is left to the kernel when it does not come back, and nothing of ours waits for it.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import subprocess
import sys
from contextlib import suppress
from types import TracebackType

_WRITER = """
import json, os, sys
for line in sys.stdin:
    path, text = json.loads(line)
    try:
        if text is None:
            descriptor = os.open(path, os.O_RDONLY)
            answer = [0, os.read(descriptor, 4096).decode("utf-8", "replace")]
        else:
            descriptor = os.open(path, os.O_WRONLY)
            os.write(descriptor, text.encode())
            answer = [0, ""]
        os.close(descriptor)
    except OSError as error:
        answer = [error.errno, ""]
    print(json.dumps(answer), flush=True)
"""
"""What the other process runs: it reads or writes one file for each line that it gets, in one call each."""


class HostKernel:
    """The kernel of this host, through /sys. Each call takes `patience` seconds at most.

    After a TimeoutError the call still waits in the kernel; what is asked next goes to another process.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._writer: subprocess.Popen[str] | None = None

    def __enter__(self) -> HostKernel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            assert self._writer.stdin is not None
            self._writer.stdin.close()
            self._writer.wait()  # it waits for nothing but the next line
            _leave(self._writer)

    def write(self, path: str, text: str) -> None:
        """Writes to one file of sysfs. Raises TimeoutError, and OSError with the kernel's answer."""
        self._ask(path, text)

    def read(self, path: str) -> str:
        """What a file says that may hang, without white space around. Raises as `write` does."""
        return self._ask(path, None).strip()

    def load(self, module: str) -> None:
        """Loads a module as modprobe does. Raises OSError that says what is missing, and TimeoutError."""
        modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if modprobe is None:
            raise OSError(errno.ENOENT, f"there is no modprobe here: `modprobe {module}` on the host, then try again")
        try:
            # Not with capture_output: after the timeout that would wait for a modprobe that the kernel holds.
            process = subprocess.Popen(
                [modprobe, module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            _, said = process.communicate(timeout=self._patience)
        except subprocess.TimeoutExpired:
            process.kill()
            _leave(process)
            raise TimeoutError(errno.ETIMEDOUT, f"no end of modprobe in {self._patience:g} s") from None
        if process.returncode != 0:
            why = " ".join(said.split()) or f"status {process.returncode}"
            raise OSError(errno.ENOENT, f"modprobe {module} fails: {why} (a container needs the host's /lib/modules)")

    def _ask(self, path: str, text: str | None) -> str:
        if self._writer is None:
            # In a session of its own: a signal from the terminal is for us, and must not end half of the work.
            self._writer = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WRITER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        writer = self._writer
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            writer.stdin.write(json.dumps([path, text]) + "\n")
            writer.stdin.flush()
            if not select.select([writer.stdout], [], [], self._patience)[0]:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer for {self._patience:g} s", path)
            line = writer.stdout.readline()
            if not line:
                raise OSError(errno.EIO, "the process that writes has ended", path)
        except BaseException:  # a signal too
            self._writer = None
            _leave(writer)
            raise
        number, content = json.loads(line)
        if number:
            raise OSError(number, os.strerror(number), path)
        return str(content)


def _leave(process: subprocess.Popen[str]) -> None:
    """Has no more to do with a process, which may be one that the kernel holds: it ends when that lets it."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    if process.poll() is None:
        process.returncode = 0  # else the interpreter warns of it, and keeps it to wait for
