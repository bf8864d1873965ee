"""`sandbox-plugin demo` as a person runs it, with a terminal and without, and as one ends it."""

from __future__ import annotations

import fcntl
import io
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
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemon import ROOT, Places, clean_environment, run_command
from kubelet import TIMEOUT
from trials import wait_until

from sandbox_plugin.cli import options
from sandbox_plugin.cli.main import main

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


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """A demo on a terminal of its own."""

    process: subprocess.Popen[bytes]
    shown: io.FileIO
    screens: Iterator[str]
    """One screen after the other, without colours, until it ends."""


def screens_of(shown: io.FileIO) -> Iterator[str]:
    seen = b""
    with suppress(OSError):  # EIO: nobody has the terminal any more
        while piece := shown.read(65536):
            *whole, seen = (seen + piece).split(b"\x1b[H")
            yield from (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.decode()) for screen in whole)
    yield seen.decode(errors="replace")


TAKE_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Makes stdin the terminal whose end is a SIGHUP to the session."""


@contextmanager
def on_terminal(
    folder: Path, *flags: str, lines: int = 24, columns: int = 80, term: str = "xterm-256color"
) -> Iterator[Terminal]:
    ours, its = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as shown:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE_THE_TERMINAL, "-m", "sandbox_plugin", "demo", *flags],
            stdin=its,
            stdout=its,
            stderr=its,
            cwd=ROOT,
            env=clean_environment({"TMPDIR": str(folder), "TERM": term}),
            start_new_session=True,
        )
        os.close(its)
        try:
            yield Terminal(process=process, shown=shown, screens=screens_of(shown))
        finally:
            process.kill()
            process.wait()


def daemons_in(folder: Path) -> list[int]:
    """Processes with this folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def assert_nothing_is_left(places: Places) -> None:
    assert list(places.top.iterdir()) == []
    assert daemons_in(places.top) == []


BOTH = "nvidia.com/nvswitch: 4 of 4, nvidia.com/pgpu: 8 of 8 healthy"
GPUS = "nvidia.com/pgpu: {} of {} healthy"
SEVEN_OF_8, ALL_8, ONE_OF_2, ALL_2 = GPUS.format(7, 8), GPUS.format(8, 8), GPUS.format(1, 2), GPUS.format(2, 2)
NONE_OF_1, ALL_1 = GPUS.format(0, 1), GPUS.format(1, 1)
TOOK_4, TOOK_11, TOOK_0 = "it gets 4, 5, 6, 7 on NUMA node 0", "it gets 11", "it gets 0 on NUMA node 0"
AGAIN = "{} can be given out again"
OUTCOMES = {
    "hgx-h100": [BOTH, TOOK_4, SEVEN_OF_8, ALL_8, BOTH, SEVEN_OF_8, ALL_8, AGAIN.format("4, 5, 6, 7")],
    "workstation": [ALL_2, TOOK_11, ONE_OF_2, ALL_2, ALL_2, ONE_OF_2, ALL_2, AGAIN.format("11")],
    "gh200": [ALL_1, TOOK_0, ALL_1, AGAIN.format("0"), NONE_OF_1, ALL_1, NONE_OF_1, ALL_1],  # the pod ends early
}


def told_in(text: str) -> tuple[list[str], list[str]]:
    """The times and the outcomes of a story in plain lines."""
    chapter = r"^ *(\d+)\. .+\r?\n(?: {4}\S.+\r?\n)+ {4} *(\d\S* m?s)? {2,}(.+?)\r?$"
    chapters = re.findall(chapter, text, re.MULTILINE)
    assert [int(number) for number, *_ in chapters] == list(range(1, STEPS + 1))
    return [time for _, time, _ in chapters if time], [outcome for *_, outcome in chapters]


@pytest.mark.parametrize("preset", ["hgx-h100", "workstation"])
def test_without_a_terminal_the_story_is_told_once_with_times_and_outcomes(preset: str, places: Places) -> None:
    process = demo(places.top, "--preset", preset, FORCE_COLOR="1")  # as CI systems set it, without a terminal
    told, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    times, outcomes = told_in(told)
    assert len(times) == TIMED
    assert outcomes == OUTCOMES[preset]
    assert max(map(len, told.splitlines())) <= 80
    resources = 2 if preset == "hgx-h100" else 1
    summary = " ".join(told.partition("That is all.")[2].split())
    assert f"{STEPS} things happened, and the kubelet saw {TIMED} of them after " in summary
    assert f"That took {2 * resources} registrations, " in summary  # the kubelet restarts once
    assert "of devices and 1 Allocate. What to try next: " in summary
    assert_nothing_is_left(places)


IDS = {
    "hgx-h100": "The NVSwitches come first on the bus and have 0 to 3, so the GPUs begin at 4.",
    "gh200": "An ID is the N of a VFIO node, /dev/vfio/devices/vfioN. Times run",
    "workstation": "an ID is the number of an IOMMU group. The GPUs begin at 11 because functions before them",
}


@pytest.mark.parametrize("preset", IDS)
def test_it_says_first_what_an_id_is_and_why_those_of_the_gpus_begin_where_they_do(preset: str, places: Places) -> None:
    process = demo(places.top, "--preset", preset)
    assert process.stdout is not None
    said = "".join(process.stdout.readline() for _ in range(6))
    process.terminate()
    process.communicate(timeout=TIMEOUT)
    assert IDS[preset] in " ".join(said.split())


CLAIMED = "[1b-00-0] [43-00-0] [52-00-0] [61-00-0]"
SLICES = "{} in 1 slice of generation {}; the driver is registered"
REFUSED = "request gpu1: device pci-{} (nvidia.com/pgpu={}) cannot be given: claim default/training-gpus holds it"
LOST = (
    "taint unhealthy=off-the-bus:NoSchedule; the kubelet hears: {} does not answer on the PCI bus (link speed Unknown, "
    "width 63)"
)
GIVEN_BACK, WELL = "{} CDI specs of the claim removed, none is left", "pci-{} has no taint any more, and is Healthy"
TO_NVIDIA = "taint unhealthy=not-bound:NoSchedule; the kubelet hears: {} is bound to nvidia, not to a vfio driver"
FOUR = (
    "it gets 1b:00.0, 43:00.0, 52:00.0, 61:00.0 on NUMA node 0; nodes of 1b:00.0: /dev/vfio/devices/vfio4, /dev/iommu,"
)
OUTCOMES_OF_CLAIMS = {
    "hgx-h100": [
        SLICES.format("12 devices", 1),
        f"{FOUR} /dev/vfio/59, /dev/vfio/vfio",
        REFUSED.format("0000-1b-00-0", 4),
        SLICES.format("12 devices", 2),
        LOST.format("0000:1b:00.0"),
        GIVEN_BACK.format(5),
        WELL.format("0000-1b-00-0"),
        TO_NVIDIA.format("0000:df:00.0"),
        WELL.format("0000-df-00-0"),
    ],
    "workstation": [
        SLICES.format("2 devices", 1),
        "it gets 01:00.0; nodes of 01:00.0: /dev/vfio/11, /dev/vfio/vfio",
        REFUSED.format("0000-01-00-0", 11),
        SLICES.format("2 devices", 2),
        LOST.format("0000:01:00.0"),
        GIVEN_BACK.format(2),
        WELL.format("0000-01-00-0"),
        TO_NVIDIA.format("0000:02:00.0"),
        WELL.format("0000-02-00-0"),
    ],
}


@pytest.mark.parametrize("preset", OUTCOMES_OF_CLAIMS)
def test_with_dra_the_story_is_one_of_claims_and_their_slices(preset: str, places: Places) -> None:
    process = demo(places.top, "--dra", "--preset", preset)
    told, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert max(map(len, told.splitlines())) <= 80
    chapter = r"^ *\d+\. .+\n(?: {4}\S.+\n)+ {4} *\d\S* m?s {2}((?:.+\n)+)"
    outcomes = [" ".join(outcome.split()) for outcome in re.findall(chapter, told, re.MULTILINE)]
    assert outcomes == OUTCOMES_OF_CLAIMS[preset]
    summary = " ".join(told.partition("That is all.")[2].split())
    assert "9 things happened, and the API server and the kubelet saw 9 of them after " in summary
    assert "That took 2 registrations, " in summary  # the kubelet restarts once
    assert "about health, and 1 claim prepared. What to try next: " in summary
    assert_nothing_is_left(places)


@pytest.mark.parametrize(("lines", "columns"), [(24, 80), (40, 120)])
def test_with_dra_the_terminal_shows_slices_claims_taints_the_story_and_the_log(
    places: Places, lines: int, columns: int
) -> None:
    with on_terminal(places.top, "--dra", lines=lines, columns=columns) as terminal:
        prepared = (
            "hgx-h100-vfio.sandbox-plugin-0  generation 1, 12 devices, 0 tainted",
            f"gpu, NUMA 0: {CLAIMED}",
            f"training-gpus of training-vm: prepared {CLAIMED}",
            "A pod asks by a claim for 4 GPUs",
        )
        refused = ("same-gpu-again of other-vm: refused [1b-00-0]", "A second claim names 1b:00.0", "claim refused: ")
        lost = ("12 devices, 1 tainted", "prepared [!1b-00-0] [43-00-0]", "GPU 1b:00.0 falls off the PCI bus")
        given_back = ("ResourceClaims: what pods have been given", "none", "The pod ends.")
        for parts in (prepared, refused, lost, given_back):
            shown = next(screen for screen in terminal.screens if all(part in screen for part in parts))
            drawn = shown.split("\r\n")
            assert len(drawn) <= lines, "the screen is longer than the terminal"
            assert max(map(len, drawn)) <= columns, "a line is wider than the terminal"
        terminal.process.send_signal(signal.SIGINT)
        *_, last = terminal.screens
        assert "That is all." in last
        assert terminal.process.wait(timeout=TIMEOUT) == 0
    assert_nothing_is_left(places)


def test_with_dra_a_daemon_that_ends_ends_the_demo_with_its_reason(places: Places) -> None:
    process = demo(places.top, "--dra", SANDBOX_PLUGIN_DRA_EVICT="whim")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the daemon ended" in errors
    assert "SANDBOX_PLUGIN_DRA_EVICT" in errors
    assert errors.count("\n") == 1
    assert_nothing_is_left(places)


def test_with_dra_the_settings_of_whoever_starts_it_do_not_lead_the_daemon_elsewhere(places: Places) -> None:
    elsewhere = {"SANDBOX_PLUGIN_API_SERVER": "http://127.0.0.1:1", "SANDBOX_PLUGIN_DRA_DRIVER_NAME": "a.driver"}
    process = demo(places.top, "--dra", "--preset=gh200", SANDBOX_PLUGIN_DRA="off", NODE_NAME="another", **elsewhere)
    told, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "That is all." in told


def test_with_dra_where_aiohttp_is_not_installed_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "find_spec", lambda _: None)
    assert main(["demo", "--dra"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "--dra: aiohttp is not installed: install the package with its extra, sandbox-plugin[dra]" in said.err


def test_on_a_terminal_that_cannot_draw_the_story_is_told_in_plain_lines(places: Places) -> None:
    with on_terminal(places.top, "--preset=gh200", term="dumb") as terminal:
        text = "".join(terminal.screens)
        assert terminal.process.wait(timeout=TIMEOUT) == 0
    assert "\x1b" not in text
    assert told_in(text)[1] == OUTCOMES["gh200"]


@pytest.mark.parametrize(("lines", "columns"), [(24, 80), (50, 140)])
def test_on_a_terminal_it_shows_the_devices_the_story_and_the_log_until_ctrl_c(
    places: Places, lines: int, columns: int
) -> None:
    with on_terminal(places.top, lines=lines, columns=columns) as terminal:
        # Something of each part: the devices, the first and the last line of a chapter, the daemon's log.
        parts = ("[4] [5] [6] [7]", "A pod asks for 4", TOOK_4, "allocated: nvidia.com/pgpu 4,5,6,7")
        shown = next(screen for screen in terminal.screens if all(part in screen for part in parts))
        drawn = shown.split("\r\n")
        assert len(drawn) <= lines, "the screen is longer than the terminal"
        assert max(map(len, drawn)) <= columns, "a line is wider than the terminal"
        assert "GPUs from 4: NVSwitches have 0 to 3" in shown
        terminal.process.send_signal(signal.SIGINT)
        *_, last = terminal.screens
        summary = last.partition("That is all.")[2]
        assert "What to try next:" in summary
        assert max(map(len, summary.splitlines())) <= 80
        assert terminal.process.wait(timeout=TIMEOUT) == 0
    assert_nothing_is_left(places)


@pytest.mark.parametrize(("flags", "shown"), [((), "nvidia.com/pgpu"), (("--dra",), "generation 1")])
def test_a_terminal_that_is_closed_ends_it_and_leaves_nothing(
    places: Places, flags: tuple[str, ...], shown: str
) -> None:
    with on_terminal(places.top, *flags) as terminal:
        next(screen for screen in terminal.screens if shown in screen)
        terminal.shown.close()
        assert terminal.process.wait(timeout=TIMEOUT) in (0, 1)  # 1 if writing fails before the signal comes
    assert_nothing_is_left(places)


def test_signals_in_the_middle_leave_nothing_also_one_that_comes_while_the_daemon_ends(places: Places) -> None:
    process = demo(places.top)
    assert process.stdout is not None
    while "A pod asks" not in process.stdout.readline():
        assert process.poll() is None
    (daemon,) = daemons_in(places.top)
    os.kill(daemon, signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: has_pending(daemon, signal.SIGTERM), "the daemon is asked to end")
        process.send_signal(signal.SIGINT)
    finally:
        os.kill(daemon, signal.SIGCONT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert_nothing_is_left(places)


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether this signal waits for a process that is stopped."""
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending, 16) >> (number - 1) & 1)


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
