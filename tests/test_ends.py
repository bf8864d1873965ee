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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from daemon import ROOT, Places, clean_environment
from kubelet import TIMEOUT
from trials import tampered, wait_until

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

Start = Callable[..., subprocess.Popen[str]]
OnAPreset = Mapping[str, list[str]]


@pytest.fixture
def temporary(places: Places) -> Path:
    """Where the program makes its temporary folders."""
    folder = places.top / "tmp"
    folder.mkdir()
    return folder


@pytest.fixture
def start(places: Places, temporary: Path) -> Iterator[Start]:
    """Starts a command, by another program if that is asked for: `start("list", "--all", by=["nohup"])`.

    `code` runs in its process before anything else does.
    """
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, by: Sequence[str] = (), code: str = "", **options: Any) -> subprocess.Popen[str]:
        environment = {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "", "PYTHONPATH": tampered(places, code)}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [*by, sys.executable, "-m", "sandbox_plugin", *arguments],
            **(streams | options),
            text=True,
            cwd=ROOT,
            env=clean_environment(environment),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


@pytest.fixture
def on_a_preset(places: Places, temporary: Path) -> dict[str, list[str]]:
    """The commands that make a preset's tree, with their flags."""
    return {
        "run": ["run", *places.flags("hgx-h100"), "--log-format=console"],
        "demo": ["demo"],
        "list": ["list", "--fake-sysfs=hgx-h100"],
        "fake-node": ["fake-node", "create", "hgx-h100", f"{temporary}/new/node"],
    }


def wait_for_a_tree(temporary: Path) -> None:
    """Until a tree is being made."""
    wait_until(lambda: any(temporary.glob("*/*/sys/devices")), "a tree is begun")


def wait_for_a_line(process: subprocess.Popen[str], words: str) -> None:
    """Until the program has said so."""
    stream = process.stderr if words == "starting" else process.stdout
    assert stream is not None
    assert any(words in line for line in stream), f"it never said {words!r}"


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for the end. Returns the exit status, and what was said on stderr."""
    _, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, errors


# Signals


NEVER_MADE = """
import os, time
link = os.symlink
def hold(*arguments):
    link(*arguments)
    time.sleep(60)
os.symlink = hold
"""
"""The making of a tree stops at the first link."""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", ["run", "demo", "list", "fake-node"])
def test_a_signal_while_a_tree_is_made_ends_the_command_and_leaves_no_tree(
    start: Start, on_a_preset: OnAPreset, temporary: Path, command: str, number: signal.Signals
) -> None:
    process = start(*on_a_preset[command], code=NEVER_MADE)
    wait_for_a_tree(temporary)
    process.send_signal(number)
    status, errors = end(process)
    graceful = command in ("run", "demo")
    assert status == (0 if graceful else 128 + number)
    assert "Traceback" not in errors
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("command", "words"), [("run", "starting"), ("demo", "A pod asks")])
def test_a_signal_later_is_a_graceful_end_too(
    start: Start, on_a_preset: OnAPreset, temporary: Path, command: str, words: str, number: signal.Signals
) -> None:
    process = start(*on_a_preset[command])
    wait_for_a_line(process, words)
    process.send_signal(number)
    status, errors = end(process)
    assert (status, "Traceback" in errors) == (0, False)
    assert list(temporary.iterdir()) == []
    if command == "run":
        assert f"reason={number.name}" in errors


@pytest.mark.parametrize(
    ("command", "words"), [("run", None), ("run", "starting"), ("demo", None), ("demo", "A pod asks")]
)
def test_signals_that_come_while_it_ends_change_nothing(
    start: Start, on_a_preset: OnAPreset, temporary: Path, command: str, words: str | None
) -> None:
    process = start(*on_a_preset[command])
    wait_for_a_line(process, words) if words else wait_for_a_tree(temporary)
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        for number in SIGNALS:
            process.send_signal(number)
        time.sleep(0.002)  # else it would do nothing but count them
    status, errors = end(process)
    assert (status, errors.count("Error")) == (0, 0), errors
    assert list(temporary.iterdir()) == []


def test_at_the_very_beginning_a_signal_leaves_nothing_either(
    start: Start, on_a_preset: OnAPreset, temporary: Path
) -> None:
    process = start(*on_a_preset["run"])
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] in (0, -signal.SIGTERM)
    assert list(temporary.iterdir()) == []


IN_AN_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("module", ["argparse", "typing", "dataclasses", "sandbox_plugin.cli.run", "asyncio", "rich"])
def test_a_signal_while_modules_are_imported_ends_it_as_at_any_other_time(
    start: Start, on_a_preset: OnAPreset, temporary: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is not imported before is of the interpreter's own start, or a handler of signals cannot do without."""
    monkeypatch.setenv("COVERAGE_PROCESS_CONFIG", "")  # not measured: coverage itself would import some of these
    for command, status in (("run", 0), ("list", 128 + signal.SIGTERM)):
        assert end(start(*on_a_preset[command], code=IN_AN_IMPORT.format(module=module))) == (status, "")
    assert list(temporary.iterdir()) == []


REMOVED_IN_TWO_STEPS = """
def rmtree(folder, **options):
    shutil.rmtree = whole
    whole(folder + "/gh200/sys")
    os.kill(os.getpid(), signal.SIGTERM)
whole, shutil.rmtree = shutil.rmtree, rmtree
"""
TURNED_INTO_ANOTHER = """
def create(folder, preset):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise RuntimeError("something is wrong") from error
options.FakeNode.create = create
"""


@pytest.mark.parametrize("change", [REMOVED_IN_TWO_STEPS, TURNED_INTO_ANOTHER], ids=["removal", "another error"])
def test_a_signal_at_an_unlucky_moment_ends_it_as_at_any_other(temporary: Path, change: str) -> None:
    imports = "import os, shutil, signal, sys\nfrom sandbox_plugin.cli import options\n"
    call = "from sandbox_plugin.cli.main import main\nsys.exit(main(['list', '--fake-sysfs=gh200']))"
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}{change}{call}"],
        capture_output=True,
        cwd=ROOT,
        timeout=TIMEOUT,
        env=clean_environment({"TMPDIR": str(temporary)}),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, b"", b"")
    assert list(temporary.iterdir()) == []


def test_started_by_nohup_it_outlives_its_terminal(start: Start, on_a_preset: OnAPreset) -> None:
    process = start(*on_a_preset["run"], by=["nohup"])
    wait_for_a_line(process, "starting")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    assert any("tasks" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def test_asked_for_its_tasks_before_there_are_any_it_goes_on(
    start: Start, on_a_preset: OnAPreset, temporary: Path
) -> None:
    process = start(*on_a_preset["run"])
    wait_for_a_tree(temporary)
    process.send_signal(signal.SIGUSR1)
    wait_for_a_line(process, "starting")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


# Stdout


PRINTING = [
    ["list", "--fake-sysfs=gh200"],
    ["list", "--fake-sysfs=gh200", "--output=json"],
    ["demo", "--preset=gh200"],
    ["fake-node", "presets"],
    ["--help"],
    ["--version"],
]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_what_cannot_be_printed_is_a_failure_in_one_line(start: Start, temporary: Path, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        assert end(start(*arguments, stdout=full)) == (1, "sandbox-plugin: stdout: No space left on device\n")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_is_gone_ends_it_without_a_word(start: Start, temporary: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        assert end(start(*arguments, stdout=pipe)) == (1, "")
    assert list(temporary.iterdir()) == []


def test_a_reader_that_goes_in_the_middle_ends_the_demo_without_a_word(start: Start, temporary: Path) -> None:
    process = start("demo", "--preset=gh200")
    wait_for_a_line(process, "1. The daemon starts")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(TIMEOUT) == 1
    assert list(temporary.iterdir()) == []


def test_a_signal_ends_a_command_that_waits_for_its_reader(start: Start) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as unread, os.fdopen(writer, "w") as pipe:
        size = fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        process = start("list", "--all", "--output=json", "--fake-sysfs=hgx-h100", stdout=pipe)
        waiting = array("i", [0])
        wait_until(
            lambda: not fcntl.ioctl(unread, termios.FIONREAD, waiting) and waiting[0] == size, "the pipe is full"
        )
        process.send_signal(signal.SIGTERM)
        assert end(process) == (128 + signal.SIGTERM, "")
