"""How a command ends when a signal asks it to, or when stdout takes nothing more: no traceback, nothing left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from daemon import ROOT, Places, clean_environment
from kubelet import TIMEOUT
from trials import tampered, wait_until

Start = Callable[..., subprocess.Popen[str]]
LIST = "list --fake-sysfs=gh200"


@pytest.fixture
def temporary(places: Places) -> Iterator[Path]:
    """Where the program makes its temporary folders, and leaves nothing."""
    folder = places.top / "tmp"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def start(places: Places, temporary: Path) -> Iterator[Start]:
    """Starts a command, by another program if that is asked for: `start("list --all", by=["nohup"])`.

    `run` gets the flags that keep it in its place. `code` runs in its process before anything else does.
    """
    started: list[subprocess.Popen[str]] = []

    def begin(command: str, *, by: tuple[str, ...] = (), code: str = "", **options: Any) -> subprocess.Popen[str]:
        arguments = [*places.flags("hgx-h100"), "--log-format=console"] if command == "run" else []
        environment = {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "", "PYTHONPATH": tampered(places, code)}
        process = subprocess.Popen(
            [*by, sys.executable, "-m", "sandbox_plugin", *command.split(), *arguments],
            **({"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
            text=True,
            cwd=ROOT,
            env=clean_environment(environment),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


def wait_for_a_tree(temporary: Path) -> None:
    """Until a tree is being made."""
    wait_until(lambda: any(temporary.rglob("sys/devices")), "a tree is begun")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for the end. Returns the exit status, and what was said on stderr."""
    _, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, errors


def wait_for_a_line(stream: IO[str] | None, words: str) -> None:
    """Until the program has said so."""
    assert stream is not None
    assert any(words in line for line in stream), f"it never said {words!r}"


# Signals


HOLD = """
import os, time
link = os.symlink
def hold(*arguments):
    link(*arguments)
    while True:
        time.sleep(0.05)
os.symlink = hold
"""
"""The making of a tree stops at the first link. In short sleeps: of a signal just before one is heard after it."""


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        ("run", signal.SIGTERM, 0),
        ("demo", signal.SIGHUP, 0),
        (LIST, signal.SIGINT, 128 + signal.SIGINT),
        ("fake-node create gh200 {temporary}/node", signal.SIGTERM, 128 + signal.SIGTERM),
    ],
)
def test_a_signal_while_a_tree_is_made_ends_the_command_and_leaves_no_tree(
    start: Start, temporary: Path, command: str, number: int, status: int
) -> None:
    process = start(command.format(temporary=temporary), code=HOLD)
    wait_for_a_tree(temporary)
    process.send_signal(number)
    assert end(process) == (status, "")


@pytest.mark.parametrize("has_begun", [False, True], ids=["while a tree is made", "while it runs"])
def test_signals_that_come_while_it_ends_change_nothing(start: Start, temporary: Path, has_begun: bool) -> None:
    process = start("run")
    wait_for_a_line(process.stderr, "starting") if has_begun else wait_for_a_tree(temporary)
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        time.sleep(0.002)  # else it would do nothing but count them
    status, errors = end(process)
    assert (status, errors.count("Error")) == (0, 0), errors


IN_AN_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("command", "module", "status"),
    [("run", "argparse", 0), ("run", "asyncio", 0), (LIST, "sandbox_plugin.cli.list_devices", 128 + signal.SIGTERM)],
)
def test_a_signal_while_modules_are_imported_ends_it_as_at_any_other_time(
    start: Start, command: str, module: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVERAGE_PROCESS_CONFIG", "")  # not measured: coverage itself would import some of these
    assert end(start(command, code=IN_AN_IMPORT.format(module=module))) == (status, "")


TURNED_INTO_ANOTHER = """
import os, signal
link = os.symlink
def turn(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise RuntimeError("something is wrong") from error
os.symlink = turn
"""


def test_a_signal_that_others_turn_into_another_error_ends_it_as_at_any_other_moment(start: Start) -> None:
    assert end(start(LIST, code=TURNED_INTO_ANOTHER)) == (128 + signal.SIGTERM, "")


def test_started_by_nohup_it_outlives_its_terminal_and_asked_for_its_tasks_it_goes_on(
    start: Start, temporary: Path
) -> None:
    process = start("run", by=("nohup",))
    wait_for_a_tree(temporary)
    process.send_signal(signal.SIGUSR1)  # there are none yet
    wait_for_a_line(process.stderr, "starting")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    wait_for_a_line(process.stderr, "tasks")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


# Stdout


@pytest.mark.parametrize("command", [LIST, "demo --preset=gh200", "--help"])
def test_what_cannot_be_printed_is_a_failure_in_one_line_or_without_a_word_if_the_reader_is_gone(
    start: Start, command: str
) -> None:
    with open("/dev/full", "w") as full:
        assert end(start(command, stdout=full)) == (1, "sandbox-plugin: stdout: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        assert end(start(command, stdout=pipe)) == (1, "")


def test_a_signal_ends_a_command_that_waits_for_its_reader(start: Start) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as unread, os.fdopen(writer, "w") as pipe:
        size = fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        process = start("list --all --output=json --fake-sysfs=hgx-h100", stdout=pipe)
        waiting = array("i", [0])
        wait_until(
            lambda: not fcntl.ioctl(unread, termios.FIONREAD, waiting) and waiting[0] == size, "the pipe is full"
        )
        process.send_signal(signal.SIGTERM)
        assert end(process) == (128 + signal.SIGTERM, "")
