"""What log lines look like on a console, and as JSON."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from names import PGPU

from sandbox_plugin.cli.logs import configure_logs, folded

LONG = "off-the-bus: 0000:1b:00.0 does not answer on the PCI bus (link speed Unknown, width 63)"


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def logged(log: Callable[[Any], object], *, log_format: str = "console") -> str:
    """What the log has after this, where stderr is a file."""
    stream = io.StringIO()
    configure_logs(log_format, "debug", stream)
    log(structlog.get_logger())
    return stream.getvalue()


def loss(log: Any) -> None:
    where = {"resource": PGPU, "device": "4", "pci_address": "0000:1b:00.0"}
    log.warning("device changed", **where, health="Unhealthy", reason=LONG)


@pytest.mark.usefixtures("_restored")
def test_on_a_console_an_event_begins_with_time_and_level_and_goes_on_indented() -> None:
    first, second = logged(loss).splitlines()
    assert re.fullmatch(
        r"\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \[warning\] device changed resource=nvidia.com/pgpu device=4 "
        r"pci_address=0000:1b:00.0 health=Unhealthy",
        first,
    )
    assert second == f"    reason='{LONG}'"


@pytest.mark.usefixtures("_restored")
def test_the_line_of_a_device_that_is_found_is_one_line() -> None:
    switch = {"resource": "nvidia.com/nvswitch", "device": "3", "pci_address": "0000:0a:00.0", "health": "Healthy"}
    (line,) = logged(lambda log: log.info("device found", **switch)).splitlines()
    assert len(line) <= 120


@pytest.mark.usefixtures("_restored")
def test_as_json_an_event_is_whole_and_one_line() -> None:
    (line,) = logged(loss, log_format="json").splitlines()
    assert json.loads(line)["reason"] == LONG


def test_a_traceback_below_an_event_is_not_folded() -> None:
    traceback = f"Traceback: {'word ' * 40}"
    assert folded(f"event reason='{LONG}' key=value\n{traceback}", 100).splitlines()[-1] == traceback


def test_a_value_that_no_line_can_hold_goes_on_at_a_blank_and_a_word_stays_whole() -> None:
    path = f"/{'p' * 130}"
    lines = folded(f"head event reason='{'word ' * 30}end' path={path} last=1", 120).splitlines()
    assert lines[0] == "head event"
    assert all(line.startswith("    ") for line in lines[1:])
    assert lines[-2:] == [f"    path={path}", "    last=1"]
    assert max(len(line) for line in lines[:-2]) <= 120
    assert " ".join(line.strip() for line in lines[1:-2]) == f"reason='{'word ' * 30}end'"


def test_colours_do_not_count() -> None:
    line = " ".join(f"\x1b[36mk{number}\x1b[0m=\x1b[35m{'v' * 9}\x1b[0m" for number in range(8))
    assert folded(line, 103) == line
    assert len(folded(line, 102).splitlines()) == 2


@contextmanager
def terminal(columns: int) -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A terminal to write to, and where what is written can be read."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(its, "w") as stream:
        try:
            yield stream, ours
        finally:
            os.close(ours)


def shown_until(text: str, terminal: int) -> str:
    """What a terminal has shown when this is there: it comes in pieces."""
    shown = ""
    while text not in shown:
        shown += os.read(terminal, 65536).decode()
    return shown


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("columns", "widest"), [(80, 80), (200, 120), (0, 120)])
def test_a_narrower_terminal_gets_narrower_lines_and_a_wider_one_no_wider_ones(columns: int, widest: int) -> None:
    with terminal(columns) as (stream, ours):
        configure_logs(None, "info", stream)
        log = structlog.get_logger()
        for count in range(20):
            log.info("counted", **{f"key{number}": "value" for number in range(count)})
        log.info("the end")
        shown = shown_until("the end", ours)
    widths = [len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in shown.split("\r\n")]
    assert "\x1b[" in shown
    assert widest - len(" key10=value") < max(widths) <= widest


@pytest.mark.usefixtures("_restored")
def test_a_terminal_gets_no_colours_where_a_person_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(100) as (stream, ours):
        configure_logs(None, "info", stream)
        structlog.get_logger().warning("plain")
        shown = shown_until("plain", ours)
    assert "[warning] plain" in shown
    assert "\x1b" not in shown
