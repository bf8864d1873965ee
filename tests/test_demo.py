"""`sandbox-plugin demo` as a person without a terminal runs it, and as one ends it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from daemon import ROOT, Places, clean_environment, run_command

STEPS = 8
TIMED = 7
"""The pod's end is the kubelet's own."""


def demo(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """Starts a demo whose temporary folder lies in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox_plugin", "demo", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=clean_environment({"TMPDIR": str(folder), **environment}),
    )


@contextmanager
def on_terminal(folder: Path, lines: int, columns: int) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[str]]]:
    """A demo on a terminal of its own, and one screen after the other, without colours, until it ends."""
    ours, its = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as shown:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        program = [sys.executable, "-m", "sandbox_plugin", "demo"]
        environment = clean_environment({"TMPDIR": str(folder), "TERM": "xterm-256color"})
        process = subprocess.Popen(program, stdin=its, stdout=its, stderr=its, cwd=ROOT, env=environment)
        os.close(its)

        def screens() -> Iterator[str]:
            seen = b""
            with suppress(OSError):  # EIO: nobody has the terminal any more
                while piece := shown.read(65536):
                    *whole, seen = (seen + piece).split(b"\x1b[H")
                    yield from (re.sub(r"\x1b\[[0-9;?]*[a-z]", "", screen.decode()) for screen in whole)
            yield seen.decode()

        try:
            yield process, screens()
        finally:
            process.kill()
            process.wait()


def processes_in(folder: Path) -> list[int]:
    """Processes with this folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in line:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("preset", ["hgx-h100", "workstation"])
def test_without_a_terminal_the_story_is_told_once_with_measured_times(preset: str, places: Places) -> None:
    process = demo(places.top, "--preset", preset)
    told, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert [int(number) for number in re.findall(r"^ *(\d+)\. ", told, re.MULTILINE)] == list(range(1, STEPS + 1))
    assert len(re.findall(r"^ +\d+(?:\.\d+)? m?s  ", told, re.MULTILINE)) == TIMED
    assert list(places.top.iterdir()) == []
    assert processes_in(places.top) == []


@pytest.mark.parametrize(("lines", "columns"), [(24, 80), (50, 140)])
def test_on_a_terminal_it_shows_the_devices_the_story_and_the_log_until_ctrl_c(
    places: Places, lines: int, columns: int
) -> None:
    with on_terminal(places.top, lines, columns) as (process, screens):
        allocated = ("[4] [5] [6] [7]", "A pod asks for 4", "allocated: nvidia.com/pgpu 7")  # one for each part
        shown = next(screen for screen in screens if all(part in screen for part in allocated))
        assert shown.rstrip().endswith("╯"), "the screen is longer than the terminal"
        process.send_signal(signal.SIGINT)
        assert list(screens)
        assert process.wait(timeout=15) == 0
    assert list(places.top.iterdir()) == []
    assert processes_in(places.top) == []


def test_sigterm_in_the_middle_leaves_nothing_behind(places: Places) -> None:
    process = demo(places.top)
    assert process.stdout is not None
    while "A pod asks" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 0
    assert list(places.top.iterdir()) == []
    assert processes_in(places.top) == []


def test_a_daemon_that_ends_ends_the_demo_with_its_reason(places: Places) -> None:
    process = demo(places.top, P_GPU_ALIAS="not valid")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the daemon ended" in errors
    assert "P_GPU_ALIAS" in errors
    assert errors.count("\n") == 1


def test_a_preset_that_there_is_not_gets_one_line() -> None:
    done = run_command("demo", "--preset", "cray-1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hgx-h100" in done.stderr
