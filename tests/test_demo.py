"""`sandbox-plugin demo` as a person without a terminal runs it, and as one ends it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
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
